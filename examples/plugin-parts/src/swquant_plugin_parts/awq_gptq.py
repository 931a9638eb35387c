"""AWQ's scales, then GPTQ, under one name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swquant.methods.awq import AWQ
from swquant.methods.base import Part, Setting
from swquant.methods.gptq import GPTQ


@dataclass(frozen=True)
class AwqGptq:
    """``awq + gptq(damping=...)``.

    Attributes:
        damping: Added to the Hessian's diagonal, as a share of its mean.
    """

    damping: float = 0.01

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """The parts of both; GPTQ is not the first."""
        return (*AWQ().parts(setting), *GPTQ(damping=self.damping).parts(replace(setting, first=False)))
