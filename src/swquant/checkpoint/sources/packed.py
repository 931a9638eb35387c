"""compressed-tensors: integers packed into words, and integers or floats of 8 bits as they are.

::

    X.weight_packed      int32 [out, ceil(in * bits / 32)]   pack-quantized
    X.weight             int8 or float8 [out, in]            int-, float- and naive-quantized
    X.weight_scale       one for each group, channel, block, or the tensor
    X.weight_zero_point  packed along the output where the weight is packed; asymmetric only
    X.weight_shape       int64 [2]                           where the weight is packed

``W = (code - zero) * scale`` in the scale's dtype, as the compressed-tensors package has it, then in the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored, shown
from swquant.checkpoint.sources.base import (
    FLOATS,
    INSTEAD,
    Found,
    ScaleGrid,
    dtype_of,
    require_plain_rest,
    require_tensor,
    unreadable,
    widened,
    wrong_shape,
)
from swquant.checkpoint.sources.schemes import METHOD, PACKED, Scheme, schemes_of
from swquant.errors import SwquantError
from swquant.quant.bits import packed_words, unpack

_WORD_ROWS = 32
"""Zero points of so many rows fill whole words."""
_WEIGHT = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_UNUSED = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"),
)
"""Static scales of activations and of the cache, which plain weights do not need."""


@dataclass(frozen=True)
class Packed:
    """One weight.

    Attributes:
        module: Its module's name on disk.
        shape: ``(out, in)``.
        bits: Of a packed code; ``None`` if the weight is stored a byte each.
        grid: Of its scales; ``None`` if there is one scale for all.
        symmetric: Whether it has no zero points.
        dtype: Of the result.
    """

    module: str
    shape: tuple[int, int]
    bits: int | None
    grid: ScaleGrid | None
    symmetric: bool
    dtype: torch.dtype

    def rows(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """See :class:`swquant.checkpoint.sources.base.Widening`."""
        name = f"{self.module}.weight_scale"
        whole = self.grid is None
        scale = files.read(name) if self.grid is None else files.part(name, *self.grid.covering(start, stop))
        values = self._codes(files, start, stop).to(scale.dtype)
        if not self.symmetric:
            zero = self._zeros(files, start, stop).to(scale.dtype)
            values -= zero.reshape(()) if whole else self._spread(zero, start, stop)
        values *= scale.reshape(()) if whole else self._spread(scale, start, stop)
        return values.to(self.dtype)

    def _spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        assert self.grid is not None
        values = values.reshape(values.shape[0], -1)
        return self.grid.spread(values, start, stop, self.shape[1])

    def _codes(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """Signed codes ``[stop - start, in]``."""
        if self.bits is None:
            return files.part(f"{self.module}.weight", start, stop)
        words = files.part(f"{self.module}.weight_packed", start, stop)
        return unpack(words, self.bits, self.shape[1]).short() - (1 << self.bits - 1)

    def _zeros(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """Signed zero points of the blocks' rows."""
        name = f"{self.module}.weight_zero_point"
        if self.grid is None:
            return files.read(name)
        if self.bits is None:
            return files.part(name, *self.grid.covering(start, stop))
        first, last = start // _WORD_ROWS, -(-stop // _WORD_ROWS)
        total = packed_words(self.shape[0], self.bits)
        words = files.part(name, first * self.bits, min(last * self.bits, total))
        count = min(last * _WORD_ROWS, self.shape[0]) - first * _WORD_ROWS
        zeros = unpack(words.T, self.bits, count).T.short() - (1 << self.bits - 1)
        return zeros[start - first * _WORD_ROWS : stop - first * _WORD_ROWS]


def find(files: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every weight with a scale, checked by its header.

    Raises:
        SwquantError: The settings or a shape are not those of a checkpoint that is read.
    """
    schemes = schemes_of(files.directory, settings)
    found: dict[str, tuple[Stored, Packed]] = {}
    used = {name for name in files.tensors if name.rpartition(".")[2] in _UNUSED}
    for name in files.tensors:
        module, _, kind = name.rpartition(".")
        if kind == "weight_g_idx":
            raise unreadable(files.directory, f"'{METHOD}'", "groups of inputs out of order (weight_g_idx)")
        if kind in ("weight_packed", "weight_scale") and f"{module}.weight" not in found:
            found[f"{module}.weight"] = _weight(files, module, schemes)
            used |= {f"{module}.{part}" for part in _WEIGHT if files.has(f"{module}.{part}")}
    require_plain_rest(files, found, frozenset(used), f"'{METHOD}'")
    note = f"the source's {len(found)} weights, quantized by compressed-tensors, are dequantized"
    return Found(found, frozenset(used), note)


def _weight(files: Checkpoint, module: str, schemes: tuple[Scheme, ...]) -> tuple[Stored, Packed]:
    """The one way to read a weight that fits its tensors.

    Raises:
        SwquantError: None fits, or two that differ.
    """
    packed = files.has(f"{module}.weight_packed")
    if packed and files.has(f"{module}.weight"):
        raise SwquantError(f"{files.directory} holds {shown(module)} both packed and plain; {INSTEAD}")
    fitting: dict[Packed, Stored] = {}
    problem: SwquantError | None = None
    for scheme in schemes:
        if (scheme.format == PACKED) != packed:
            continue
        try:
            stored, one = _by_scheme(files, module, scheme)
        except SwquantError as error:
            problem = problem or error
        else:
            fitting.setdefault(one, stored)
    if len(fitting) == 1:
        ((one, stored),) = fitting.items()
        return stored, one
    if fitting:
        raise unreadable(files.directory, f"'{METHOD}'", f"several config_groups that fit {shown(module)}")
    raise problem or unreadable(files.directory, f"'{METHOD}'", f"no format of config_groups that fits {shown(module)}")


def _by_scheme(files: Checkpoint, module: str, scheme: Scheme) -> tuple[Stored, Packed]:
    name = f"{module}.weight"
    if scheme.format == PACKED:
        stored = require_tensor(files, f"{name}_packed", (torch.int32,))
        shape = _packed_shape(files, module, stored, scheme.bits)
    else:
        stored = require_tensor(files, name, scheme.codes)
        if len(stored.shape) != 2:
            raise wrong_shape(name, stored, "two dimensions")
        shape = stored.shape[0], stored.shape[1]
    if scheme.group is not None and shape[1] % scheme.group:
        raise wrong_shape(name, stored, f"whole groups of {scheme.group} inputs")
    grid = scheme.grid(shape[1])
    scale = require_tensor(files, f"{name}_scale", FLOATS)
    _require_grid(f"{name}_scale", scale, grid, shape)
    if not scheme.symmetric:
        _require_zeros(files, f"{name}_zero_point", scheme, grid, shape)
    dtype = dtype_of(files.config) or scale.dtype
    bits = scheme.bits if scheme.format == PACKED else None
    return widened(stored, shape, dtype), Packed(module, shape, bits, grid, scheme.symmetric, dtype)


def _packed_shape(files: Checkpoint, module: str, packed: Stored, bits: int) -> tuple[int, int]:
    """``(out, in)``, which the words of a packed weight do not tell alone."""
    name = f"{module}.weight_shape"
    require_tensor(files, name, (torch.int64, torch.int32), (2,))
    rows, columns = files.read(name).tolist()
    expected = (rows, packed_words(columns, bits))
    if rows < 1 or columns < 1 or packed.shape != expected:
        raise wrong_shape(
            f"{module}.weight_packed",
            packed,
            f"{list(expected)} for {bits} bits and the {[rows, columns]} of weight_shape",
        )
    return rows, columns


def _require_grid(name: str, stored: Stored, grid: ScaleGrid | None, shape: tuple[int, int]) -> None:
    if grid is None:
        if stored.shape not in ((), (1,), (1, 1)):
            raise wrong_shape(name, stored, "one value for the whole weight")
        return
    down, across = grid.shape(*shape)
    if stored.shape != (down, across) and (across != 1 or stored.shape != (down,)):
        raise wrong_shape(name, stored, str([down, across]))


def _require_zeros(
    files: Checkpoint, name: str, scheme: Scheme, grid: ScaleGrid | None, shape: tuple[int, int]
) -> None:
    if scheme.format != PACKED or grid is None:
        _require_grid(name, require_tensor(files, name, (torch.int8,)), grid, shape)
        return
    down, across = grid.shape(*shape)
    require_tensor(files, name, (torch.int32,), (packed_words(down, scheme.bits), across))
