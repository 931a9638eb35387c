"""What was chosen for a size, as run states and reports keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

_Bytes = Annotated[int, Field(ge=0)]
_Cost = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Option:
    """A grid that some matrices could have.

    Attributes:
        grid: Its name, or ``kept``.
        bits: Of a code; ``None`` where they are kept.
        bytes: What they take then.
        kl: What that costs, in nats per token.
    """

    grid: str
    bits: int | None
    bytes: _Bytes
    kl: _Cost


@dataclass(frozen=True)
class Allotted:
    """Matrices whose grids were chosen together.

    Attributes:
        name: Of the first, or of a list of experts, or ``embedding`` or ``head``.
        kind: What they are in their block, e.g. ``self_attn.q_proj``.
        layer: Number of their block; ``None`` of the embedding and the head.
        matrices: Their names in the block.
        chosen: Which of ``options`` they got.
        options: All there were, fewest bytes first.
    """

    name: str
    kind: str
    layer: Annotated[int, Field(ge=0)] | None
    matrices: tuple[str, ...]
    chosen: Annotated[int, Field(ge=0)]
    options: tuple[Option, ...]

    @property
    def option(self) -> Option:
        """What they got; raises ``ValueError`` where there is none of its number."""
        if self.chosen >= len(self.options):
            raise ValueError(f"{self.name} has no option {self.chosen}")
        return self.options[self.chosen]


@dataclass(frozen=True)
class Other:
    """Another size.

    Attributes:
        size: In bytes.
        kl: The least sum of costs there, in nats per token; ``None`` where nothing is so small.
    """

    size: _Bytes
    kl: _Cost | None


@dataclass(frozen=True)
class Measured:
    """A choice whose KL was measured, rounded to the nearest and alone in the model.

    Attributes:
        name: Of the matrices.
        grid: Of the choice.
        estimate: Its KL by the curvature, in nats per token; ``None`` of the embedding and the head.
        measured: Its KL.
    """

    name: str
    grid: str
    estimate: _Cost | None
    measured: _Cost


@dataclass(frozen=True)
class Allocation:
    """Grids for a size.

    Attributes:
        asked: What a run has to ask for to go on with these grids, see :func:`swquant.allocation.asked_of`.
        settings: Keys of the recipe that were chosen, as files have them.
        size: Bytes that the files of the weights may take.
        bytes: What they take at most.
        smallest: The least that they could take.
        largest: What they would take with everything kept.
        kl: The sum of the costs, in nats per token.
        units: What was chosen.
        around: A size a little below, and one a little above.
        checks: What was measured.
        tokens: On which costs were measured.
        seconds: What that took.
    """

    asked: str
    settings: Mapping[str, Any]
    size: _Bytes
    bytes: _Bytes
    smallest: _Bytes
    largest: _Bytes
    kl: _Cost
    units: tuple[Allotted, ...]
    around: tuple[Other, ...]
    checks: tuple[Measured, ...]
    tokens: _Bytes
    seconds: float

    @staticmethod
    def from_mapping(values: Any) -> Allocation:
        """From plain values; raises ``ValueError`` where they are none."""
        return _ALLOCATION.validate_python(values)


_ALLOCATION = TypeAdapter(Allocation)
