"""GGUF: one file that llama.cpp and what is built on it load, codes as they were trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, QuantizedModel
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import require_fits, require_tensor, stored_bytes
from swquant.formats.gguf_blocks import BlockType, block_type
from swquant.formats.gguf_model import describe_model
from swquant.formats.gguf_reader import read_gguf
from swquant.formats.gguf_writer import (
    FILE,
    beside_bytes,
    import_gguf,
    rehearse,
    require_named,
    tensor_names,
    write_gguf,
)
from swquant.formats.kquant_blocks import K_GRIDS
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import UNIFORM, QuantSpec

_LOAD = """\
from llama_cpp import Llama  # the package llama-cpp-python
model = Llama(model_path=f"{path}/model.gguf")"""


class Gguf:
    """``model.gguf`` for llama.cpp, with ``config.json`` and the tokenizer's files beside it.

    The grid decides the type of blocks, :mod:`swquant.formats.gguf_blocks` tells their bytes::

        2 bits, symmetric, groups of 64 or 128     Q2_0
        4 bits, symmetric or not                   Q4_0, Q4_1
        8 bits, symmetric                          Q8_0
        the K grids                                Q2_K, Q3_K, Q4_K

    A group of several blocks, or a channel, repeats its scale in each. ``encode`` gives ``name.weight``,
    ``uint8 [out, bytes]``; in the file, rows of a LLaMA's query and key projections change places.
    """

    name: ClassVar[str] = "gguf"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM, *K_GRIDS)
    carries: ClassVar[bool] = False

    def refusal(self, spec: QuantSpec) -> str | None:
        """llama.cpp has no blocks for some grids."""
        if block_type(spec) is not None:
            return None
        if (spec.bits, spec.symmetric) == (2, True):
            return "llama.cpp's Q2_0 has a scale for 64 weights; choose groups of 64 or 128"
        symmetry = "symmetric" if spec.symmetric else "asymmetric"
        return (
            f"llama.cpp has no {symmetry} blocks of {spec.bits} bits with a scale of their own; "
            "choose 2 bits symmetric, 4 bits, 8 bits symmetric, or a K grid"
        )

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The model and its tokenizer must be known to llama.cpp; the notes say where it computes something else."""
        require_fits(self, outline, mixed=True, ends=True)
        import_gguf()
        model = describe_model(outline.config)
        for name, ((_, columns), spec) in outline.ends.items():
            kind_of(spec).require_divides(name, columns)
        for name, (rows, columns) in outline.linears.items():
            kind_of(outline.grids[name]).require_divides(name, columns)
            order = model.row_order(name)
            if order is not None and len(order) != rows:
                raise SwquantError(f"{name} has {rows} outputs, where the heads of config.json have {len(order)}")
        known = tensor_names(model)
        for name in (*(f"{module}.weight" for module in (*outline.linears, *outline.ends)), *(outline.plain or ())):
            require_named(name, known, model)
        notes = [*model.notes, *rehearse(outline, model).notes]
        kinds = {kind_of(spec).name for spec in outline.specs}
        if "Q2_0" in kinds:
            notes.append(
                "Q2_0 came to llama.cpp in summer 2026: older releases refuse it, and on x86 processors, for which it "
                "has no kernel yet, it runs at two fifths of the speed of Q2_K (--grid q2_k)"
            )
        if "Q4_1" in kinds:
            notes.append(
                "llama.cpp's Q4_1 keeps scale times zero point in 11 bits: weights move by up to 2**-11 of that"
            )
        return tuple(notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weight's blocks, row by row; scales are half floats whatever the model's dtype."""
        return {f"{name}.weight": _pack(name, q)}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`."""
        kind = kind_of(spec)
        packed = require_tensor(tensors, f"{name}.weight", torch.uint8, 2)
        if packed.shape[1] == 0 or packed.shape[1] % kind.nbytes:
            raise SwquantError(f"{name}.weight has rows of {packed.shape[1]} bytes, expected blocks of {kind.nbytes}")
        columns = packed.shape[1] // kind.nbytes * kind.weights
        spec.require_divides(name, columns)
        return kind.unpack(name, packed, spec, columns)

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """``model.gguf``, ``config.json`` without quantization, the tokenizer's files."""
        return write_gguf(directory, model, _pack)

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model of a ``model.gguf`` that :meth:`write` has written."""
        return read_gguf(directory, config, self.decode) if (directory / FILE).is_file() else None

    def loading(self, outline: Outline) -> str:
        """llama-cpp-python's class."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Blocks of the grid's type."""
        return rows * kind_of(outline.spec).row_bytes(columns)

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are, vectors in float32."""
        vectors = [stored for stored in plain if len(stored.shape) == 1]
        others = [stored for stored in plain if len(stored.shape) != 1]
        return stored_bytes(others) + 4 * sum(math.prod(stored.shape) for stored in vectors)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Metadata with the whole tokenizer, and the tensors' names."""
        return beside_bytes(outline)


def kind_of(spec: QuantSpec) -> BlockType:
    """The type of blocks that holds weights on such a grid.

    Raises:
        SwquantError: There is none.
    """
    kind = block_type(spec)
    if kind is None:
        raise SwquantError(f"gguf cannot hold {spec.label}: {Gguf().refusal(spec)}")
    return kind


def _pack(name: str, q: QTensor) -> Tensor:
    kind = kind_of(q.spec)
    kind.require_divides(name, q.codes.shape[1])
    return kind.pack(name, q)
