"""Learnable equivalent transformation: scales and shifts moved between layers, exact at full precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swquant.families.base import Equivalence, NormLinears, QueryKey
from swquant.learnables.base import BlockFacts, ChannelRange, Theta
from swquant.quant.draft import Draft, better_sign
from swquant.quant.grid import extent_of

LEAST_INITIAL_SCALE = 1e-5
LEAST_SCALE = 1e-2


@dataclass(frozen=True)
class EquivalentTransform:
    r"""Learnable equivalent transformation (OmniQuant, arXiv 2308.13137, section 3.3, eqs. 3 and 5).

    A linear ``Y = X W + B`` behind a norm becomes, with per-channel scale ``s`` and shift ``d``::

        Y = ((X - d) / s) (s * W) + (B + d W)

    where ``(X - d) / s`` is merged into the norm. The same holds between the value and the output projection of
    attention, and between queries and keys, where the scale alone applies: ``(Q / s) (s * K)^T``.

    Scales start as in SmoothQuant (arXiv 2211.10438, eq. 4), ``max|X|**alpha / max|W|**(1 - alpha)``, shifts as in
    Outlier Suppression+ (arXiv 2304.09145, eq. 4), ``(max X + min X) / 2``, query-key scales at 1. Where a shift is
    learned, ``max|X|`` is that of the shifted input.

    Departures from the authors' code: the queries' and keys' scales are shared by the two channels that rotary
    positions mix and by the query heads of a key head, without which the transformed block is another function;
    shifts also train in weight-only quantization, where the code turns them off although they take the input's mean
    out of the error; the largest weight is taken over all linears behind a norm, as in SmoothQuant, instead of over
    one of them; the channel ranges are of the inputs that the quantized model so far produces.

    Attributes:
        learning_rate: Of scales and shifts; 5e-3 in the paper.
        alpha: Exponent of the initial scale.
        shift: Learn shifts where the block has the biases that they need.
    """

    learning_rate: float = 5e-3
    alpha: float = 0.5
    shift: bool = True
    writes: ClassVar[frozenset[str]] = frozenset({"params", "sign", "extent"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Initial scales and shifts, and the signs that symmetric grids take on the transformed weights."""
        fed = {pair: _fed(pair) for pair in facts.family.equivalences}
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
        source = _source(pair)
        weight = torch.stack([draft.params[f"{linear}.weight"].float().abs().amax(0) for linear in linears]).amax(0)
        low, high = seen.low, seen.high
        if not isinstance(pair, NormLinears):
            low, high = _per_key_head(low, facts).amin(1), _per_key_head(high, facts).amax(1)
            weight = _per_key_head(weight, facts).amax(1)
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
        params = dict(draft.params)
        for pair in facts.family.equivalences:
            source = _source(pair)
            scale, shift = theta[f"{source}.scale"], theta.get(f"{source}.shift")
            if isinstance(pair, NormLinears):
                _divide_output(params, pair.norm, scale, shift)
                for linear in pair.linears:
                    _multiply_input(params, linear, scale, shift)
            elif isinstance(pair, QueryKey):
                per_key = torch.cat((scale, scale), -1) if pair.rotary else scale
                _divide_output(params, pair.query, _per_query_head(per_key.flatten(), facts), None)
                _divide_output(params, pair.key, 1 / per_key.flatten(), None)
            else:
                _divide_output(params, pair.value, scale, shift)
                wide = None if shift is None else _per_query_head(shift, facts)
                _multiply_input(params, pair.output, _per_query_head(scale, facts), wide)
        slots = {
            name: slot
            if params[name] is draft.params[name]
            else replace(slot, extent=None, sign=theta.get(f"{name}.sign", slot.sign))
            for name, slot in draft.slots.items()
        }
        return replace(draft, params=params, slots=slots)

    def project(self, theta: Theta) -> None:
        """Keep scales away from zero, at 0.01 or more in magnitude, as the authors' code does."""
        for key, value in theta.items():
            if key.endswith(".scale"):
                small = value.abs() < LEAST_SCALE
                value[small] = torch.where(value[small] < 0, -LEAST_SCALE, LEAST_SCALE)


def _source(pair: Equivalence) -> str:
    """The module whose output is divided: the norm, the value or the query projection; it names the pair's state."""
    if isinstance(pair, NormLinears):
        return pair.norm
    return pair.query if isinstance(pair, QueryKey) else pair.value


def _fed(pair: Equivalence) -> tuple[str, ...]:
    """The linears whose input is transformed; none for a query-key pair."""
    if isinstance(pair, NormLinears):
        return pair.linears
    return () if isinstance(pair, QueryKey) else (pair.output,)


def _init_query_key(pair: Equivalence, draft: Draft, facts: BlockFacts) -> Theta:
    assert isinstance(pair, QueryKey)
    rows = draft.params[f"{pair.key}.weight"].shape[0] // facts.key_value_heads
    free = rows // 2 if pair.rotary else rows
    device = draft.params[f"{pair.key}.weight"].device
    return {f"{pair.query}.scale": torch.ones(facts.key_value_heads, free, device=device)}


def _per_key_head(channels: Tensor, facts: BlockFacts) -> Tensor:
    """View channels of all query heads as ``[key_value_heads, query heads of each, head_dim]``."""
    return channels.view(facts.key_value_heads, facts.heads // facts.key_value_heads, -1)


def _per_query_head(channels: Tensor, facts: BlockFacts) -> Tensor:
    """Repeat channels of the key and value heads for the query heads that share them, flat."""
    per_head = channels.view(facts.key_value_heads, -1)
    return per_head.repeat_interleave(facts.heads // facts.key_value_heads, dim=0).flatten()


def _divide_output(params: dict[str, Tensor], module: str, scale: Tensor, shift: Tensor | None) -> None:
    """``(output - shift) / scale`` of a norm or a linear, merged into its parameters."""
    weight, bias = params[f"{module}.weight"], params.get(f"{module}.bias")
    params[f"{module}.weight"] = weight.float() / (scale if weight.dim() == 1 else scale.unsqueeze(1))
    if bias is not None:
        params[f"{module}.bias"] = (bias.float() if shift is None else bias.float() - shift) / scale


def _multiply_input(params: dict[str, Tensor], linear: str, scale: Tensor, shift: Tensor | None) -> None:
    """Undo ``(input - shift) / scale`` within the linear that receives it."""
    weight = params[f"{linear}.weight"].float()
    if shift is not None:
        params[f"{linear}.bias"] = params[f"{linear}.bias"].float() + weight @ shift
    params[f"{linear}.weight"] = weight * scale
