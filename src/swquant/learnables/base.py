"""The form of a learnable: explicit state and pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from swquant.families.base import Equivalence
from swquant.quant.draft import Draft

Theta = dict[str, Tensor]
"""A learnable's state: name to tensor. Those that require a gradient are trained, the others are constants."""


@dataclass(frozen=True)
class ChannelRange:
    """Least and greatest value of each channel of a linear's input over the calibration tokens, ``[in_features]``."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class BlockFacts:
    """What a learnable may know of the block besides its parameters.

    Attributes:
        inputs: The quantized linears in the order in which they run, those that read one tensor together.
        equivalences: Finds the pairs of modules between which scales can move; each has been proven on this block.
        heads: Query heads.
        key_value_heads: Key and value heads, fewer than ``heads`` under grouped-query attention.
        input_ranges: Runs the full-precision block over the calibration inputs and returns the channel ranges of the
            named linears' inputs.
    """

    inputs: tuple[tuple[str, ...], ...]
    equivalences: Callable[[], tuple[Equivalence, ...]]
    heads: int
    key_value_heads: int
    input_ranges: Callable[[Sequence[str]], Mapping[str, ChannelRange]]


class Learnable(Protocol):
    """Something that training can change about a draft.

    ``init`` makes the state, the same for the same arguments; ``apply`` is a pure and differentiable function from
    state and draft to draft; ``enter`` and ``project`` change the state in place. ``writes`` names what ``apply`` sets:
    fields of slots, ``"weights"`` (those of slots) or ``"norms"``; two learnables that write the same thing cannot
    train in one phase.
    """

    writes: ClassVar[frozenset[str]]

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate for this state."""
        ...

    @property
    def weight_decay(self) -> float:
        """The optimizer's weight decay for this state."""
        ...

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """The state to start from."""
        ...

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """The draft under this state."""
        ...

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Prepare for a round of training with ``done`` of ``rounds`` before it; called once more when all are."""
        ...

    def project(self, theta: Theta) -> None:
        """Bring the state back to its domain after a step."""
        ...
