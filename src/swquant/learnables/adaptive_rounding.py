"""Progressive adaptive rounding: soft decisions to round up or down, hardened in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.learnables.base import BlockFacts, Theta
from swquant.learnables.rectified import rectified_logit, rectified_sigmoid
from swquant.quant.deferred import defer
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import Grid, group
from swquant.quant.rounding import Rounding
from swquant.quant.spec import QuantSpec

THRESHOLDS = (
    *(0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21),
    *(0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005),
)
"""Shares of decisions that stay soft, round by round: the schedule of the authors' LLaMA configurations."""

LOGIT = ".logit"


@dataclass(frozen=True)
class AdaptiveRounding:
    r"""Progressive adaptive rounding (TesseraQ, arXiv 2410.19103, section 3.2).

    On a fixed grid each weight has a logit ``v`` and a soft decision ``h``, which starts where the weight itself is::

        codes = clamp(floor(w / scale) + h(v) + zero, 0, 2**bits - 1),   h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)
        v at the start: h(v) = w / scale - floor(w / scale)

    Before a round, the decisions of each weight farthest from a half become hard: those whose ``|h - 0.5|`` is above
    its quantile at the round's threshold. Their logits become infinite, where the gradient is zero; the rest trains.
    After the last round every decision is hard, and the state holds it as a bool.

    The sigmoid is the rectified one of the authors' code; the paper writes a plain one. Decisions are ordered by
    ``|v|``, which is the order of ``|h - 0.5|`` and goes on where ``h`` is 0 or 1 already.

    Memory: the logits, their gradient and what the optimizer keeps of them, and one ``h``, all of the size of the
    block's weights.

    Attributes:
        learning_rate: Of the logits; 1e-3 in the authors' configurations.
        thresholds: Falling shares of soft decisions, see :func:`soft_share`.
    """

    learning_rate: float = 1e-3
    thresholds: tuple[float, ...] = THRESHOLDS
    writes: ClassVar[frozenset[str]] = frozenset({"grid", "rounding"})

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.thresholds, reverse=True))
        if not ordered or ordered != self.thresholds or not 0 <= ordered[-1] <= ordered[0] <= 1:
            raise SwquantError(f"thresholds fall from 1 to 0, got {self.thresholds}")

    @property
    def weight_decay(self) -> float:
        """None: the decay of an infinite logit is infinite."""
        return 0.0

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Logits ``[out, in]`` of the weights' own fractions, and what the grid consists of as constants."""
        theta: Theta = {}
        with torch.no_grad():
            for name, slot in draft.slots.items():
                grid = grid_of(draft.params[name], slot)
                theta |= {f"{name}.grid.{part}": value for part, value in grid.parts.items()}
                theta[name + LOGIT] = _own_logits(draft.params[name], grid, slot.spec).requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Set each slot's grid and rounding."""
        slots = {
            name: replace(
                slot,
                grid=slot.spec.kind.grid(_parts(theta, f"{name}.grid."), slot.spec),
                rounding=Rounding(_decisions(theta[name + LOGIT]), up=True),
            )
            for name, slot in draft.slots.items()
        }
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Harden what the next round's threshold says, or everything when no round is left."""
        for key, value in theta.items():
            if not key.endswith(LOGIT):
                continue
            if done == rounds:
                theta[key] = value > 0
                continue
            share = soft_share(self.thresholds, (done + 1) / rounds)
            limit = order_statistic(value.abs().flatten(), math.floor(share * (value.numel() - 1)))
            value.masked_fill_(value > limit, math.inf).masked_fill_(value < -limit, -math.inf)

    def project(self, theta: Theta) -> None:
        """Logits are unconstrained."""


def soft_share(thresholds: tuple[float, ...], progress: float) -> float:
    """The threshold of a schedule at ``progress`` in (0, 1]: the k-th of n at k / n, 1 at 0, linear in between."""
    place = progress * len(thresholds)
    index = min(math.floor(place + 1e-9), len(thresholds))
    points = (1.0, *thresholds, thresholds[-1])
    return points[index] + (place - index) * (points[index + 1] - points[index])


def order_statistic(values: Tensor, rank: int) -> float:
    """The value at ``rank`` (from 0) of ``values``, which are not negative, in ascending order.

    A bisection over the bit patterns, which order numbers like the numbers themselves: some 31 comparisons of
    ``values`` in float32, and no memory but one bool each, on any device and for any count.
    """
    patterns = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    low, high = 0, int(patterns.max())
    while low < high:
        middle = (low + high) // 2
        if int((patterns <= middle).sum()) > rank:
            high = middle
        else:
            low = middle + 1
    return float(torch.tensor(low, dtype=patterns.dtype).view(values.dtype))


def _parts(theta: Theta, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in theta.items() if key.startswith(prefix)}


def _own_logits(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    grouped = group(weight, spec)
    ratio = (grouped if grid.shift is None else grouped + grid.shift) / grid.scale
    return rectified_logit(ratio.sub_(ratio.floor())).view(weight.shape)


def _decisions(logits: Tensor) -> Tensor:
    if logits.dtype == torch.bool:
        return logits
    return defer(rectified_sigmoid, logits, shape=logits.shape, dtype=logits.dtype)
