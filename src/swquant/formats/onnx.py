"""ONNX, MatMulNBits: whole decoders with a key-value cache for onnxruntime and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, Part, QuantizedModel
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import cast_exactly, require_fits, require_tensor, stored_bytes, zeros_on
from swquant.formats.onnx_layout import ACCURACY_LEVEL, MODEL, decoder_layout, require_onnx
from swquant.formats.onnx_reader import read_decoder
from swquant.formats.onnx_writer import write_decoder, written_bytes
from swquant.formats.reading import require_shape
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import UNIFORM, QuantSpec

WIDTHS = (2, 4, 8)
CHANNEL_BLOCK = 128
"""Block size of weights with one scale per channel; onnxruntime's fast 2-bit kernels end there."""

_LOAD = """\
import onnxruntime_genai
model = onnxruntime_genai.Model(path)
tokenizer = onnxruntime_genai.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # as transformers does
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=256)  # of prompt and answer: the cache is allocated for as many tokens
generator = onnxruntime_genai.Generator(model, parameters)"""


class Onnx:
    """A graph of onnxruntime's operators, ``MatMulNBits`` for each quantized weight.

    For a weight ``[out, in]`` of ``bits`` bits in blocks of ``g``::

        name.codes        uint8 [out, ceil(in / g), g * bits / 8]           along the input, low bits first
        name.scales       dtype [out, ceil(in / g)]                         in the model's dtype, of either sign
        name.zero_points  uint8 [out, ceil(ceil(in / g) * bits / 8)]        along the blocks; asymmetric only
        name.shape        int64 [2]                                         (out, in); attributes N and K of the node

    A block is a group; a channel is cut into blocks of 128 that repeat its scale and zero point, the last one filled
    up with codes that onnxruntime ignores. Without zero points onnxruntime takes ``2**(bits - 1)``, which is ours.
    """

    name: ClassVar[str] = "onnx"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = False

    def refusal(self, spec: QuantSpec) -> str | None:
        """3 bits have no kernel."""
        if spec.bits in WIDTHS:
            return None
        return "onnxruntime's MatMulNBits takes 2, 4 or 8 bits; choose 2 or 4, or another format"

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The graph must be known for the family and its settings; the note is about 8-bit activations."""
        require_fits(self, outline, mixed=True)
        layout = decoder_layout(outline.config)
        require_onnx()
        rounding = (
            "onnxruntime rounds the inputs of quantized layers to 8 bits as it computes (accuracy level "
            f"{ACCURACY_LEVEL}), so its logits differ slightly from the report's; see docs/onnx.md"
        )
        length, size = layout.longest_text, layout.cache_bytes * layout.longest_text
        if length == layout.context:
            return (rounding,)
        cache = (
            "onnxruntime-genai allocates its cache for max_length tokens of prompt and answer: genai_config.json sets "
            f"{length} of {layout.context}, which takes {size / 1e6:.0f} MB, and set_search_options another number"
        )
        return (rounding, cache)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack codes and zero points; see the class for names and shapes."""
        out_features, in_features = q.codes.shape
        block = _block_size(q.spec)
        blocks = -(-in_features // block)
        padded = torch.nn.functional.pad(q.codes, (0, blocks * block - in_features))
        scale = q.scale.expand(out_features, blocks).contiguous()
        tensors = {
            f"{name}.codes": _pack_bytes(padded.view(out_features, blocks, block), q.spec.bits),
            f"{name}.scales": cast_exactly(f"{name}.scales", scale, dtype),
            f"{name}.shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if not q.spec.symmetric:
            tensors[f"{name}.zero_points"] = _pack_bytes(q.zero.expand(out_features, blocks), q.spec.bits)
        return tensors

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`."""
        bits, block = spec.bits, _block_size(spec)
        shape = require_tensor(tensors, f"{name}.shape", torch.int64, 1)
        if len(shape) != 2 or bool((shape < 1).any()):
            raise SwquantError(f"{name}.shape holds {shape.tolist()[:4]}, expected a weight's two sizes")
        out_features, in_features = (int(size) for size in shape)
        spec.require_divides(name, in_features)
        blocks = -(-in_features // block)
        packed = _require(tensors, f"{name}.codes", torch.uint8, (out_features, blocks, block * bits // 8))
        scale = _require(tensors, f"{name}.scales", None, (out_features, blocks)).float()
        if spec.symmetric:
            if f"{name}.zero_points" in tensors:
                raise SwquantError(f"{name} has zero points, and the model is said to be symmetric")
            zero = torch.full((out_features, blocks), spec.mid_code, dtype=torch.uint8)
        else:
            words = _require(tensors, f"{name}.zero_points", torch.uint8, (out_features, -(-blocks * bits // 8)))
            zero = _unpack_bytes(words, bits)[:, :blocks]
        codes = _unpack_bytes(packed, bits).flatten(1)[:, :in_features].contiguous()
        return uniform(codes, _per_group(name, scale, spec), _per_group(name, zero, spec), spec)

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """``model.onnx``, its data, ``config.json`` and onnxruntime-genai's configuration."""
        return write_decoder(directory, model, self.encode, ACCURACY_LEVEL)

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model of a ``model.onnx`` that :meth:`write` has written."""
        return read_decoder(directory, config, self.decode) if (directory / MODEL).is_file() else None

    def loading(self, outline: Outline) -> str:
        """onnxruntime-genai's model and tokenizer; its ``Generator`` keeps the cache."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Whole blocks of codes, scales in the model's dtype, zero points in whole bytes a row, the shape."""
        spec, block = outline.spec, _block_size(outline.spec)
        blocks = -(-columns // block)
        codes, scales = blocks * block * spec.bits // 8, blocks * outline.dtype.itemsize
        zeros = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
        return rows * (codes + scales + zeros) + 2 * 8

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are, and the rotary positions' sines and cosines."""
        layout = decoder_layout(outline.config)
        return stored_bytes(plain) + 4 * layout.context * layout.head_dim

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """The graph, and what tensors are moved on by to begin on a page; shapes stand in the graph alone."""
        return written_bytes(_hollow(outline), self.encode, ACCURACY_LEVEL) - tensors


def _hollow(outline: Outline) -> QuantizedModel:
    """A model of such weights, all zero."""

    def parts() -> Iterator[Part]:
        for name, shape in (outline.plain or {}).items():
            yield {name: torch.zeros(shape, dtype=outline.dtype)}
        for name, shape in outline.linears.items():
            yield {f"{name}.weight": zeros_on(outline.grids[name], *shape)}

    return QuantizedModel(outline, parts)


def _block_size(spec: QuantSpec) -> int:
    return spec.group_size or CHANNEL_BLOCK


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [..., n]`` to ``uint8 [..., ceil(n * bits / 8)]``, the first code in a byte's lowest bits."""
    per_byte = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    fields = filled.unflatten(-1, (-1, per_byte))
    packed = fields[..., 0].clone()
    for index in range(1, per_byte):
        packed |= fields[..., index] << (index * bits)
    return packed


def _unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack_bytes`; the codes that filled up the last byte are still there."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed.unsqueeze(-1).bitwise_right_shift(shifts) & ((1 << bits) - 1)).flatten(-2)


def _per_group(name: str, values: Tensor, spec: QuantSpec) -> Tensor:
    """A value per block to one per group, of a channel's blocks the first."""
    if spec.group_size is not None:
        return values.contiguous()
    if bool((values != values[:, :1]).any()):
        raise SwquantError(f"the blocks of a row of {name} differ in scale or zero point, expected one per channel")
    return values[:, :1].contiguous()


def _require(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, expected: tuple[int, ...]) -> Tensor:
    tensor = require_tensor(tensors, name, dtype, len(expected))
    require_shape(name, tensor, expected)
    return tensor
