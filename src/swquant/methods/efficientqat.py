"""EfficientQAT: everything in a block, block by block, then the scales end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.methods.base import Part, Setting
from swquant.methods.block_ap import BlockAP
from swquant.methods.end_to_end import EndToEnd


@dataclass(frozen=True)
class EfficientQAT:
    """EfficientQAT (Chen et al., arXiv 2407.11062): ``block_ap + end_to_end``, each with its own defaults.

    For their other options write the two with ``+`` between them.

    Attributes:
        epochs: Of ``block_ap``.
        scale_epochs: Of ``end_to_end``.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    scale_epochs: Annotated[int, Field(ge=0)] | None = None

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """The parts of both."""
        return (*BlockAP(epochs=self.epochs).parts(setting), *EndToEnd(epochs=self.scale_epochs).parts(setting))
