"""GPTQ: integers packed along the input, in the first and the second version of the layout.

::

    X.qweight  int32 [in * bits / 32, out]
    X.qzeros   int32 [groups, out * bits / 32]   zero points; less one in the first version
    X.scales   float16 [groups, out]
    X.g_idx    int32 [in]                        each input's group, in any order with act-order; may be missing

``W = scale * (code - zero)`` in the scale's dtype, as GPTQModel has it, then in the model's.

Some files name the first version and store zero points as the second does, or the other way round
(vllm-project/vllm#38966), which moves every weight by a scale. Where the grid is symmetric, the zero point is known,
``2**(bits - 1)``, and what is stored tells the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored, shown
from swquant.checkpoint.sources.base import (
    FLOATS,
    INSTEAD,
    Found,
    dtype_of,
    require_plain_rest,
    require_tensor,
    unreadable,
    widened,
    wrong_shape,
)
from swquant.errors import SwquantError
from swquant.quant.bits import packed_words, unpack

METHOD = "gptq"
BITS = (2, 4, 8)
"""Those of which whole codes fill a word."""
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Gptq:
    """One weight.

    Attributes:
        module: Its module's name on disk.
        inputs: Of the module.
        bits: Of a code.
        group: Inputs of a group where ``g_idx`` is missing.
        groups: How many there are.
        first_version: Whether zero points are stored less one.
        dtype: Of the result.
    """

    module: str
    inputs: int
    bits: int
    group: int
    groups: int
    first_version: bool
    dtype: torch.dtype

    def rows(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """See :class:`swquant.checkpoint.sources.base.Widening`; rows lie in the files as columns."""
        group = self._group_of(files)
        codes = unpack(files.columns(f"{self.module}.qweight", start, stop).T, self.bits, self.inputs)
        scale = files.columns(f"{self.module}.scales", start, stop).T
        zero = self._zeros(files, start, stop)
        steps = codes.to(scale.dtype).sub_(zero.to(scale.dtype)[:, group])
        return steps.mul_(scale[:, group]).to(self.dtype)

    def _zeros(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """``[stop - start, groups]``."""
        each = 32 // self.bits
        first, last = start // each, -(-stop // each)
        words = files.columns(f"{self.module}.qzeros", first, last)
        if self.first_version:
            # readers add to the word, not to each field: that undoes the subtraction of a zero point of 0 as well
            words = words + _signed(sum(1 << shift for shift in range(0, 32, self.bits)))
        zeros = unpack(words, self.bits, (last - first) * each)
        return zeros[:, start - first * each : stop - first * each].T

    def _group_of(self, files: Checkpoint) -> Tensor:
        name = f"{self.module}.g_idx"
        if not files.has(name):
            return torch.arange(self.inputs) // self.group
        group = files.read(name).long()
        if bool((group < 0).any()) or bool((group >= self.groups).any()):
            raise SwquantError(
                f"{shown(name)} in {files.tensors[name].file} names groups from {int(group.min())} to "
                f"{int(group.max())}, expected 0 to {self.groups - 1}; {INSTEAD}"
            )
        return group


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def find(files: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every packed weight, checked by its header.

    Raises:
        SwquantError: The settings or a shape are not those of a checkpoint that is read.
    """
    bits, size, first_version = _settings(files, settings)
    found: dict[str, tuple[Stored, Gptq]] = {}
    used: set[str] = set()
    for name in files.tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        if files.has(f"{module}.weight"):
            raise SwquantError(f"{files.directory} holds {shown(module)} both packed and plain; {INSTEAD}")
        found[f"{module}.weight"] = _weight(files, module, bits, size, first_version=first_version)
        used |= {f"{module}.{part}" for part in _PARTS if files.has(f"{module}.{part}")}
    require_plain_rest(files, found, frozenset(used), f"'{METHOD}'")
    note = f"the source's {len(found)} weights, quantized by gptq, are dequantized"
    if settings.get("sym") is True and _is_other_version(files, next(iter(found.values()))[1]):
        found = {name: (stored, replace(one, first_version=not first_version)) for name, (stored, one) in found.items()}
        held, named = (2, 1) if first_version else (1, 2)
        note += f"; zero points are stored as in version {held} of the layout, though its settings name version {named}"
    return Found(found, frozenset(used), note)


def _is_other_version(files: Checkpoint, one: Gptq) -> bool:
    """Whether all zero points of a symmetric weight are what the other version would store for the middle."""
    words = files.read(f"{one.module}.qzeros")
    outputs = files.tensors[f"{one.module}.scales"].shape[1]
    return bool((unpack(words, one.bits, outputs) == (1 << one.bits - 1) - (not one.first_version)).all())


def _settings(files: Checkpoint, settings: Mapping[str, Any]) -> tuple[int, int | None, bool]:
    """Bits, inputs of a group, and whether it is the first version of the layout."""
    bits, size = settings.get("bits"), settings.get("group_size")
    version = settings.get("checkpoint_format", settings.get("format", METHOD))
    if type(bits) is not int or bits not in BITS:
        raise unreadable(files.directory, f"'{METHOD}'", f"{shown(str(bits))} bits")
    if type(size) is not int or (size < 1 and size != -1):
        raise unreadable(files.directory, f"'{METHOD}'", f"group_size {shown(str(size))}")
    if (
        version not in (METHOD, "gptq_v2")
        or settings.get("is_marlin_format")
        or settings.get("pack_dtype")
        not in (
            None,
            "int32",
        )
    ):
        raise unreadable(files.directory, f"'{METHOD}'", f"the layout {shown(str(version))}")
    dynamic = settings.get("dynamic")
    if dynamic and not (isinstance(dynamic, dict) and all(str(key).startswith("-:") for key in dynamic)):
        raise unreadable(files.directory, f"'{METHOD}'", "settings of single modules (dynamic)")
    return bits, None if size == -1 else size, version == METHOD


def _weight(files: Checkpoint, module: str, bits: int, size: int | None, *, first_version: bool) -> tuple[Stored, Gptq]:
    name = f"{module}.qweight"
    stored = require_tensor(files, name, (torch.int32,))
    if len(stored.shape) != 2 or stored.shape[0] * 32 % bits:
        raise wrong_shape(name, stored, "two dimensions")
    words, outputs = stored.shape
    inputs = words * 32 // bits
    group = size or inputs
    groups = -(-inputs // group)
    scales = require_tensor(files, f"{module}.scales", FLOATS, (groups, outputs))
    require_tensor(files, f"{module}.qzeros", (torch.int32,), (groups, packed_words(outputs, bits)))
    if files.has(f"{module}.g_idx"):
        require_tensor(files, f"{module}.g_idx", (torch.int32, torch.int64), (inputs,))
    dtype = dtype_of(files.config) or scales.dtype
    shape = (outputs, inputs)
    return widened(stored, shape, dtype), Gptq(module, inputs, bits, group, groups, first_version, dtype)
