"""The form of a method: it names the parts that a run goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from swquant.phases.base import Phase
from swquant.phases.scale_training import ScaleTraining
from swquant.quant.spec import QuantSpec

Subject = Literal["basis", "equivalence", "clips", "grid", "weights", "rounding", "norms", "scales", "codes"]
"""What a part can decide: the basis of the residual stream, scales moved between layers, clips of the min-max grid, an
explicit grid, the weights, how they are rounded, the norms, and the scales and codes end to end."""


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""An option that is a learning rate."""


@dataclass(frozen=True)
class Rotation:
    """Rotate the residual stream and the value heads before the first block; see `swquant.checkpoint.rotation`."""


@dataclass(frozen=True)
class Part:
    """One thing that a run does.

    Attributes:
        name: What it is called in messages.
        work: What is done: to the checkpoint before the first block, to each block, or to the model after the last.
        decides: What it settles.
        discards: What would be lost of what parts before it settled.
        trained: Whether it learns by gradients; two trained parts cannot decide one thing.
    """

    name: str
    work: Rotation | Phase | ScaleTraining
    decides: frozenset[Subject]
    discards: frozenset[Subject] = frozenset()
    trained: bool = False


@dataclass(frozen=True)
class Setting:
    """What a method may base its defaults on.

    Attributes:
        spec: The grid.
        others: Grids that some matrices are on instead.
        norm_biases: Whether the norms before the linears have biases.
        effort: Factor of the preset on the published amount of training; it has no effect on explicit numbers.
        first: No method stands before this one in the recipe, or a rotation alone.
    """

    spec: QuantSpec
    norm_biases: bool
    effort: float
    first: bool = True
    others: tuple[QuantSpec, ...] = ()

    def scaled(self, published: int) -> int:
        """A published number of epochs or steps, times the effort."""
        return max(1, round(published * self.effort))

    def starts(self, asked: str | None) -> bool:
        """Whether a method brings its own start along: asked for, or by itself where it is first."""
        return asked != "none" and (asked is not None or self.first)


class Method(Protocol):
    """A frozen dataclass whose fields are the method's options; its file's name is its name in recipes."""

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """The parts in order; none at all is round-to-nearest."""
        ...
