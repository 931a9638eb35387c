"""What ``quantization_config`` says of compressed-tensors' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swquant.checkpoint.shards import shown
from swquant.checkpoint.sources.base import EIGHT_BIT_FLOATS, ScaleGrid, unreadable

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """One of ``config_groups``, as far as it tells of weights.

    Attributes:
        format: One of :data:`FORMATS`.
        bits: Of a code.
        codes: Dtypes that a code has where it is not packed.
        symmetric: Whether there are no zero points.
        strategy: What shares a scale: ``tensor``, ``channel``, ``group`` or ``block``.
        group: Inputs of a group, where groups share a scale.
        block: Rows and columns of a block, where blocks share a scale.
    """

    format: str
    bits: int
    codes: tuple[torch.dtype, ...]
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    def grid(self, columns: int) -> ScaleGrid | None:
        """Of the scales of a weight with so many inputs; ``None`` if there is one scale for all."""
        if self.block is not None:
            return ScaleGrid(*self.block)
        return None if self.strategy == "tensor" else ScaleGrid(1, self.group or columns)


def schemes_of(directory: Path, settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The different schemes of the weights.

    Args:
        directory: Named in messages.
        settings: ``quantization_config``.

    Raises:
        SwquantError: Something in them is not read.
    """
    sparsity, transforms = settings.get("sparsity_config"), settings.get("transform_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise unreadable(directory, f"'{METHOD}'", f"the sparsity format {shown(str(sparsity['format']))}")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise unreadable(directory, f"'{METHOD}'", "transforms of the activations (transform_config)")
    groups = settings.get("config_groups")
    values: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [
        _scheme(directory, group["weights"], group.get("format") or settings.get("format"))
        for group in values
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    if not schemes:
        raise unreadable(directory, f"'{METHOD}'", "no scheme of weights in config_groups")
    return tuple(dict.fromkeys(schemes))


def _scheme(directory: Path, weights: Mapping[str, Any], form: object) -> Scheme:
    if form not in FORMATS:
        raise unreadable(directory, f"'{METHOD}'", f"the format {shown(str(form))}")
    bits, kind, symmetric = weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True)
    integers = kind == "int" and type(bits) is int and (1 < bits <= 8 if form == PACKED else bits == 8)
    floats = kind == "float" and bits == 8 and form in ("float-quantized", "naive-quantized") and symmetric is True
    if not (integers or floats) or not isinstance(symmetric, bool):
        what = f"weights of {shown(str(bits))} bits, type {shown(str(kind))}, in the format {form!r}"
        raise unreadable(directory, f"'{METHOD}'", what)
    if weights.get("actorder") in ("group", "dynamic"):
        raise unreadable(directory, f"'{METHOD}'", "groups of inputs out of order (actorder)")
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "block" and form != PACKED and _is_block(block):
        size = None
    elif strategy == "group" and type(size) is int and size > 0:
        block = None
    elif strategy in ("tensor", "channel"):
        size = block = None
    else:
        what = (
            f"the strategy {shown(str(strategy))}, group_size {shown(str(size))}, block_structure {shown(str(block))}"
        )
        raise unreadable(directory, f"'{METHOD}'", what)
    codes = EIGHT_BIT_FLOATS[:1] if floats else (torch.int8,)
    sides = (block[0], block[1]) if block else None
    return Scheme(str(form), int(bits or 0), codes, symmetric, str(strategy), size, sides)


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
