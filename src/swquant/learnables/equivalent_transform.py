"""Learnable equivalent transformation: scales and shifts moved between layers, exact at full precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from swquant.families.base import Equivalence, NormLinears, QueryKey, UpDown
from swquant.learnables.base import BlockFacts, ChannelRange, Theta
from swquant.learnables.moves import fed_by, move, per_key_head, source_of
from swquant.quant.draft import Draft, better_sign
from swquant.quant.grid import extent_of
from swquant.quant.through import widened

LEAST_INITIAL_SCALE = 1e-5
LEAST_SCALE = 1e-2


@dataclass(frozen=True)
class EquivalentTransform:
    r"""Learnable equivalent transformation (OmniQuant, arXiv 2308.13137, section 3.3, eqs. 3 and 5).

    A linear ``Y = X W + B`` after a norm becomes, with per-channel scale ``s`` and shift ``d``::

        Y = ((X - d) / s) (s * W) + (B + d W)

    where ``(X - d) / s`` is merged into the norm. The same holds between the value and the output projection of
    attention, and between queries and keys, where the scale alone applies: ``(Q / s) (s * K)^T``.

    Scales start as in SmoothQuant (arXiv 2211.10438, eq. 4), ``max|X|**alpha / max|W|**(1 - alpha)``, shifts as in
    Outlier Suppression+ (arXiv 2304.09145, eq. 4), ``(max X + min X) / 2``, query-key scales at 1. Where a shift is
    learned, ``max|X|`` is that of the shifted input.

    Departures from the authors' code: the queries' and keys' scales are shared by the two channels that rotary
    positions mix and by the query heads of a key head, without which the transformed block is another function;
    shifts also train in weight-only quantization, where the code turns them off although they take the input's mean
    out of the error; the largest weight is taken over all linears after a norm, as in SmoothQuant, instead of over
    one of them; the channel ranges are of the inputs that the quantized model so far produces.

    Attributes:
        learning_rate: Of scales and shifts; 5e-3 in the paper.
        weight_decay: Likewise; 0 in the paper.
        alpha: Exponent of the initial scale.
        shift: Learn shifts where the block has the biases that they need.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    alpha: float = 0.5
    shift: bool = True
    writes: ClassVar[frozenset[str]] = frozenset({"weights", "norms", "sign", "extent"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Initial scales and shifts, and the signs that symmetric grids take on the transformed weights."""
        fed = {pair: fed_by(pair) for pair in _pairs(facts)}
        ranges = facts.input_ranges([linears[0] for linears in fed.values() if linears])
        theta: Theta = {}
        for pair, linears in fed.items():
            if linears:
                theta |= self._init_fed(pair, linears, ranges[linears[0]], draft, facts)
            else:
                theta |= _init_query_key(pair, draft, facts)
        with torch.no_grad():
            moved = self.apply(theta, draft, facts)
            signs = {
                f"{name}.sign": better_sign(moved.params[name], extent_of(moved.params[name], slot.spec), slot.spec)
                for name, slot in moved.slots.items()
                if slot.extent is None and slot.spec.symmetric
            }
        return {key: value.requires_grad_() for key, value in theta.items()} | signs

    def _init_fed(
        self, pair: Equivalence, linears: tuple[str, ...], seen: ChannelRange, draft: Draft, facts: BlockFacts
    ) -> Theta:
        source = source_of(pair)
        weight = torch.stack([widened(draft.params[f"{linear}.weight"]).abs().amax(0) for linear in linears]).amax(0)
        low, high = seen.low, seen.high
        if not isinstance(pair, NormLinears):
            low, high = per_key_head(low, facts).amin(1), per_key_head(high, facts).amax(1)
            weight = per_key_head(weight, facts).amax(1)
        biased = all(f"{module}.bias" in draft.params for module in (source, *linears))
        theta: Theta = {}
        if self.shift and biased:
            theta[f"{source}.shift"] = ((low + high) / 2).flatten()
            largest = (high - low) / 2
        else:
            largest = torch.maximum(high, -low)
        scale = largest.clamp(min=LEAST_INITIAL_SCALE) ** self.alpha / weight.clamp(min=LEAST_INITIAL_SCALE) ** (
            1 - self.alpha
        )
        theta[f"{source}.scale"] = scale.clamp(min=LEAST_SCALE).flatten()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Move scales and shifts between the block's parameters; the extents of changed weights become unknown."""
        scales, shifts = (
            {key.removesuffix(kind): value for key, value in theta.items() if key.endswith(kind)}
            for kind in (".scale", ".shift")
        )
        moved = move(draft, _pairs(facts), scales, shifts, facts)
        slots = {
            name: slot if slot is draft.slots[name] else replace(slot, sign=theta.get(f"{name}.sign", slot.sign))
            for name, slot in moved.slots.items()
        }
        return replace(moved, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep scales away from zero, at 0.01 or more in magnitude, as the authors' code does."""
        for key, value in theta.items():
            if key.endswith(".scale"):
                value.copy_(torch.where(value < 0, value.clamp(max=-LEAST_SCALE), value.clamp(min=LEAST_SCALE)))


def _pairs(facts: BlockFacts) -> list[Equivalence]:
    """The paper's pairs; it moves nothing between the up and the down projection."""
    return [pair for pair in facts.equivalences() if not isinstance(pair, UpDown)]


def _init_query_key(pair: Equivalence, draft: Draft, facts: BlockFacts) -> Theta:
    assert isinstance(pair, QueryKey)
    rows = draft.params[f"{pair.key}.weight"].shape[0] // facts.key_value_heads
    free = rows // 2 if pair.rotary else rows
    like = widened(draft.params[f"{pair.key}.weight"][:0])
    return {f"{pair.query}.scale": like.new_ones(facts.key_value_heads, free)}
