"""Scales and shifts moved between a block's layers: other parameters, the same function at full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from swquant.families.base import Equivalence, NormLinears, QueryKey, UpDown
from swquant.learnables.base import BlockFacts
from swquant.quant.deferred import defer
from swquant.quant.draft import Draft
from swquant.quant.through import wide_dtype, widened


def source_of(pair: Equivalence) -> str:
    """The module whose output is divided: the norm, the value, query or up projection; it names the pair."""
    if isinstance(pair, NormLinears):
        return pair.norm
    if isinstance(pair, UpDown):
        return pair.up
    return pair.query if isinstance(pair, QueryKey) else pair.value


def fed_by(pair: Equivalence) -> tuple[str, ...]:
    """The linears whose input is transformed; none for a query-key pair."""
    if isinstance(pair, NormLinears):
        return pair.linears
    if isinstance(pair, UpDown):
        return (pair.down,)
    return () if isinstance(pair, QueryKey) else (pair.output,)


def move(
    draft: Draft,
    pairs: Iterable[Equivalence],
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor],
    facts: BlockFacts,
) -> Draft:
    """Divide each pair's source by its scale after taking off its shift, and undo both after it; differentiable.

    Args:
        draft: The parameters.
        pairs: Between which modules.
        scales: By :func:`source_of`: per channel of the source's output, ``[channels]``; for value-output pairs of the
            key-value heads alone; for query-key pairs ``[key_value_heads, free]``, where rotary positions leave half of
            a head's channels free.
        shifts: Likewise, where there is one.
        facts: Heads.

    Returns:
        The draft with other parameters; the extents of changed weights are unknown.
    """
    params = dict(draft.params)
    for pair in pairs:
        source = source_of(pair)
        scale, shift = scales[source], shifts.get(source)
        if isinstance(pair, QueryKey):
            per_key = torch.cat((scale, scale), -1) if pair.rotary else scale
            _divide_output(params, pair.query, per_query_head(per_key.flatten(), facts), None)
            _divide_output(params, pair.key, 1 / per_key.flatten(), None)
            continue
        _divide_output(params, source, scale, shift, pair.offset if isinstance(pair, NormLinears) else 0.0)
        if not isinstance(pair, NormLinears | UpDown):
            scale = per_query_head(scale, facts)
            shift = None if shift is None else per_query_head(shift, facts)
        for linear in fed_by(pair):
            _multiply_input(params, linear, scale, shift)
    slots = {
        name: slot if params[name] is draft.params[name] else replace(slot, extent=None)
        for name, slot in draft.slots.items()
    }
    return replace(draft, params=params, slots=slots)


def per_key_head(channels: Tensor, facts: BlockFacts) -> Tensor:
    """View channels of all query heads as ``[key_value_heads, query heads of each, head_dim]``."""
    return channels.view(facts.key_value_heads, facts.heads // facts.key_value_heads, -1)


def per_query_head(channels: Tensor, facts: BlockFacts) -> Tensor:
    """Repeat channels of the key and value heads for the query heads that share them, flat."""
    per_head = channels.view(facts.key_value_heads, -1)
    return per_head.repeat_interleave(facts.heads // facts.key_value_heads, dim=0).flatten()


def _divide_output(
    params: dict[str, Tensor], module: str, scale: Tensor, shift: Tensor | None, offset: float = 0.0
) -> None:
    """``(output - shift) / scale`` of a norm or a linear, merged into its parameters.

    A norm that multiplies by ``weight + offset`` gets the weight ``(weight + offset) / scale - offset``.
    """
    weight, bias = params[f"{module}.weight"], params.get(f"{module}.bias")
    if weight.dim() == 1:
        params[f"{module}.weight"] = (widened(weight) + offset) / scale - offset if offset else widened(weight) / scale
    else:
        params[f"{module}.weight"] = _later(_over_rows, weight, scale)
    if bias is not None:
        params[f"{module}.bias"] = (widened(bias) if shift is None else widened(bias) - shift) / scale


def _multiply_input(params: dict[str, Tensor], linear: str, scale: Tensor, shift: Tensor | None) -> None:
    """Undo ``(input - shift) / scale`` within the linear that receives it."""
    weight = params[f"{linear}.weight"]
    if shift is not None:
        params[f"{linear}.bias"] = widened(params[f"{linear}.bias"]) + widened(weight) @ shift
    params[f"{linear}.weight"] = _later(_times_columns, weight, scale)


def _later(change: Callable[[Tensor, Tensor], Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    return defer(change, weight, scale, shape=weight.shape, dtype=wide_dtype(weight))


def _over_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return widened(weight) / scale.unsqueeze(1)


def _times_columns(weight: Tensor, scale: Tensor) -> Tensor:
    return widened(weight) * scale
