"""End to end: the scales of all blocks together, trained against the original model's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.methods.base import Part, Rate, Setting, Subject
from swquant.phases.scale_training import ScaleTraining

EPOCHS = 8
LEARNING_RATE = 1e-2
K_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class EndToEnd:
    """EfficientQAT's second step (E2E-QP; Chen et al., arXiv 2407.11062), against the original model's predictions.

    It comes last: codes and zero points stay as the methods before it left them.

    Attributes:
        epochs: Passes over the calibration samples; ``None`` is 8, times the preset's effort.
        batch_size: Samples per step.
        learning_rate: AdamW's at the beginning, for the logarithm of a scale's magnitude; ``None`` is 1e-2, on K grids,
            where 256 weights share what is trained, 3e-3.
        norms: Train the weights of the blocks' norms too.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    learning_rate: Rate | None = None
    norms: bool = False

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One part, behind the last block."""
        epochs = self.epochs if self.epochs is not None else setting.scaled(EPOCHS)
        usual = LEARNING_RATE if setting.spec.k_grid is None else K_LEARNING_RATE
        work = ScaleTraining(epochs, self.batch_size, self.learning_rate or usual, self.norms)
        decides: set[Subject] = {"scales", "norms"} if self.norms else {"scales"}
        return (Part("end_to_end", work, frozenset(decides), trained=True),)
