"""A quantized decoder on its way into ``model.onnx``, its data file and what stands beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Encode, QuantizedModel, entries
from swquant.checkpoint.writer import Written, copy_sidecars, write_beside
from swquant.formats.onnx_layout import (
    DATA,
    MODEL,
    OTHER_GRIDS,
    PROPERTY,
    DecoderLayout,
    decoder_layout,
    onnx_types,
    require_onnx,
)
from swquant.formats.reading import generation_settings, grid_settings
from swquant.places import require_unused
from swquant.quant.qtensor import QTensor

if TYPE_CHECKING:
    from onnx import TensorProto

GENAI_CONFIG = "genai_config.json"
_PAGE, _LINE = 1 << 12, 1 << 6
_LARGE = 1 << 20
"""Tensors from this size on begin on a page, so that they can be mapped; smaller ones on a cache line."""


def write_decoder(directory: Path, model: QuantizedModel, encode: Encode, accuracy_level: int) -> Written:
    """Write a model for onnxruntime and onnxruntime-genai, and flush it to the disk.

    Tensors go to ``model.onnx.data`` as they come, so memory holds one part of the model; then come ``model.onnx``,
    the graph with their places, ``genai_config.json``, ``config.json`` and the sidecars. Equal models give equal bytes.

    Args:
        directory: An empty directory, or one to be made.
        model: The model.
        encode: See :meth:`swquant.formats.onnx.Onnx.encode`.
        accuracy_level: See :data:`swquant.formats.onnx_layout.ACCURACY_LEVEL`.

    Raises:
        SwquantError: ``directory`` is in use, or the graph does not cover the model.
        OSError: The disk is full or fails.
    """
    require_onnx()
    layout = decoder_layout(model.outline.config)
    require_unused(directory)
    directory.mkdir(parents=True, exist_ok=True)
    copy_sidecars(directory, model.sidecars)
    with (directory / DATA).open("wb") as file:
        data = _DataFile(file)
        shapes = _write_tensors(data, model, encode, layout)
        _flush(file)
    with (directory / MODEL).open("wb") as file:
        file.write(_graph_bytes(model, layout, data.entries, shapes, accuracy_level))
        _flush(file)
    genai = json.dumps(genai_config(layout, directory), indent=2) + "\n"
    write_beside(directory, model.outline.config, {**model.extra_files, GENAI_CONFIG: genai})
    return Written((DATA,), data.tensor_bytes)


def written_bytes(model: QuantizedModel, encode: Encode, accuracy_level: int) -> int:
    """Bytes that :func:`write_decoder` makes of ``model.onnx`` and its data, found by writing them nowhere."""
    layout = decoder_layout(model.outline.config)
    with Path(os.devnull).open("wb") as nowhere:
        data = _DataFile(nowhere)
        shapes = _write_tensors(data, model, encode, layout)
    return data.end + len(_graph_bytes(model, layout, data.entries, shapes, accuracy_level))


def genai_config(layout: DecoderLayout, directory: Path) -> dict[str, Any]:
    """What onnxruntime-genai wants to know: names of inputs and outputs, sizes, special tokens, greedy search.

    Token ids in the ``generation_config.json`` of ``directory`` come before those of ``config.json``; the padding is
    the first end token where none is given. What is no token of the model, such as a padding of -1, is not given.
    """
    given = (_special(settings, layout.vocabulary) for settings in (layout.special, generation_settings(directory)))
    special = {name: value for found in given for name, value in found.items()}
    end = special.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) else end
    tokens = {"pad_token_id": first_end, **special}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": layout.head_dim,
        "hidden_size": layout.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": layout.heads,
        "num_hidden_layers": len(layout.windows),
        "num_key_value_heads": layout.key_value_heads,
    }
    known = {name: value for name, value in tokens.items() if value is not None}
    return {
        "model": {
            "type": layout.family,
            "vocab_size": layout.vocabulary,
            "context_length": layout.context,
            **known,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": layout.longest_text, "past_present_share_buffer": True},
    }


class _DataFile:
    """The data file as it grows, and where each tensor lies in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.entries: dict[str, TensorProto] = {}
        self.tensor_bytes = self.end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        from onnx import TensorProto

        content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        offset = self._align(_PAGE if content.nbytes >= _LARGE else _LINE)
        entry = TensorProto(name=name, data_type=onnx_types()[tensor.dtype], dims=tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", offset), ("length", content.nbytes)):
            entry.external_data.add(key=key, value=str(value))
        self._file.write(content.data)
        self.end = offset + content.nbytes
        self.entries[name] = entry
        self.tensor_bytes += content.nbytes

    def _align(self, unit: int) -> int:
        self._file.write(bytes(-self.end % unit))
        return self.end + -self.end % unit


def _write_tensors(
    data: _DataFile, model: QuantizedModel, encode: Encode, layout: DecoderLayout
) -> dict[str, tuple[int, int]]:
    """All tensors, and the rotary tables; ``(out, in)`` of each quantized module."""
    from swquant.formats.onnx_graph import COS, SIN

    shapes: dict[str, tuple[int, int]] = {}
    for part in model.parts():
        for name, value in entries(part):
            if isinstance(value, QTensor):
                module = name.removesuffix(".weight")
                tensors = dict(encode(module, value, model.outline.dtype))
                rows, columns = tensors.pop(f"{module}.shape").tolist()
                shapes[module] = (rows, columns)
                for full, tensor in tensors.items():
                    data.add(full, tensor)
            else:
                data.add(name, value)
    for name, table in zip((COS, SIN), layout.rotary_tables(), strict=True):
        data.add(name, table)
    return shapes


def _graph_bytes(
    model: QuantizedModel,
    layout: DecoderLayout,
    entries: Mapping[str, TensorProto],
    shapes: Mapping[str, tuple[int, int]],
    accuracy_level: int,
) -> bytes:
    """``model.onnx``."""
    from onnx import helper

    from swquant.formats.onnx_graph import CONTRIB, IR_VERSION, OPSET, DecoderGraph

    outline = model.outline
    bits = {module: spec.bits for module, spec in outline.grids.items()}
    graph = DecoderGraph(layout, entries, shapes, bits, accuracy_level).build()
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    whole = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="swquant")
    grid = grid_settings(outline.most)
    if outline.others:
        grid[OTHER_GRIDS] = {module: grid_settings(spec) for module, spec in outline.others.items()}
    helper.set_model_props(whole, {PROPERTY: json.dumps(grid)})
    return whole.SerializeToString(deterministic=True)


def _special(settings: Mapping[str, Any], vocabulary: int) -> dict[str, int | list[int]]:
    """Special tokens that settings name and the model has; several may end a text."""
    found: dict[str, int | list[int]] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(name)
        given = value if isinstance(value, list) and name == "eos_token_id" else [value]
        ids = [one for one in given if type(one) is int and 0 <= one < vocabulary]
        if ids:
            found[name] = ids if given is value else ids[0]
    return found


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
