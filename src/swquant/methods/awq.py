"""AWQ: scales by the inputs' magnitudes and clipped ranges, both by search; no training."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.errors import SwquantError
from swquant.methods.base import Part, Setting, Subject
from swquant.phases.awq_clip import AwqClip
from swquant.phases.awq_scale import AwqScale

CLIPS_LOSE: frozenset[Subject] = frozenset({"clips", "grid", "rounding"})
SCALES_LOSE: frozenset[Subject] = frozenset({"clips", "grid", "rounding", "weights"})


@dataclass(frozen=True)
class AWQ:
    """AWQ (Lin et al., arXiv 2306.00978): ``(AwqScale, AwqClip)``, alone or before a method that trains.

    Attributes:
        scale: Search and move the scales.
        clip: Search the clips.

    Raises:
        SwquantError: If both are off.
    """

    scale: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if not self.scale and not self.clip:
            raise SwquantError("awq has neither scales nor clips to search: leave one of the two on")

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """Scales, then clips on the moved weights."""
        scales = Part("awq scales", AwqScale(), frozenset({"equivalence"}), discards=SCALES_LOSE)
        clips = Part("awq clips", AwqClip(), frozenset({"clips"}), discards=CLIPS_LOSE)
        return ((scales,) if self.scale else ()) + ((clips,) if self.clip else ())
