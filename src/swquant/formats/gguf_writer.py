"""GGUF files on their way out, by llama.cpp's own package."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, QuantizedModel, entries
from swquant.checkpoint.writer import Written, copy_sidecars, write_beside
from swquant.errors import SwquantError, reason_of
from swquant.formats.gguf_blocks import block_type
from swquant.formats.gguf_model import ROPE_FREQS, YARN_BETAS, Model, Rope, describe_model, reorder
from swquant.formats.gguf_tokenizer import Vocabulary, read_vocabulary
from swquant.formats.reading import grid_settings
from swquant.places import require_unused
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

FILE = "model.gguf"
OTHER_GRIDS = "swquant.grids"
"""The key under which weights on other grids than most stand, as JSON by our names."""

QUANTIZATION_VERSION = 2
"""Of the layout of blocks."""

_INFO, _ALIGNMENT = 8 + 4 + 4 + 8, 32
"""Bytes of a tensor's entry beside its name and sizes: lengths, type and place; and of what tensors begin at."""

_PLAIN_IDS: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}

Pack = Callable[[str, QTensor], Tensor]


@dataclass(frozen=True)
class _Entry:
    """A tensor as the file holds it: its bytes, its shape and the number of its type."""

    content: Tensor
    shape: tuple[int, ...]
    type_id: int


def import_gguf() -> Any:
    """The gguf package.

    Raises:
        SwquantError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise SwquantError('GGUF files need the package gguf: pip install "swquant[gguf]"') from error
    return gguf


def tensor_names(model: Model) -> dict[str, str]:
    """llama.cpp's names of modules, by ours; those that its architecture has not are left out.

    Raises:
        SwquantError: The installed package is older than the architecture.
    """
    gguf = import_gguf()
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if model.architecture.name not in architectures:
        raise SwquantError(
            f"the installed package gguf does not know the architecture {model.architecture.name}: pip install -U gguf"
        )
    known = gguf.get_tensor_name_map(architectures[model.architecture.name], model.blocks)
    named = {module: known.get_name(module) for module in model.modules()}
    return {module: name for module, name in named.items() if name is not None}


def require_named(full: str, names: Mapping[str, str], model: Model) -> str:
    """llama.cpp's name of the tensor ``full``, given those of modules.

    Raises:
        SwquantError: It has none.
    """
    module, _, suffix = full.rpartition(".")
    if module not in names or suffix not in ("weight", "bias"):
        raise SwquantError(f"llama.cpp's {model.architecture.name} has no tensor {full}; choose another format")
    return f"{names[module]}.{suffix}"


def rehearse(outline: Outline, model: Model) -> Vocabulary:
    """Write all of a file but its tensors, and take it away again; returns the tokenizer that was written.

    Raises:
        SwquantError: llama.cpp has no such tokenizer, or its package does not write such metadata.
    """
    vocabulary = read_vocabulary(outline.directory, model.settings)
    metadata_bytes(outline, model, vocabulary)
    return vocabulary


def metadata_bytes(outline: Outline, model: Model, vocabulary: Vocabulary) -> int:
    """Bytes of all of a file but its tensors and their names, by writing it and taking it away again.

    Raises:
        SwquantError: llama.cpp's package does not write such metadata.
    """
    gguf = import_gguf()
    with tempfile.TemporaryDirectory() as place:
        writer: Any = gguf.GGUFWriter(Path(place) / FILE, model.architecture.name)
        with closing(writer):
            try:
                _add_metadata(writer, model, outline, vocabulary)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.flush()
                return (Path(place) / FILE).stat().st_size
            except (ValueError, TypeError, OverflowError, struct.error) as error:
                raise SwquantError(
                    f"llama.cpp's package does not write this model's metadata ({reason_of(error)}); "
                    "choose another format"
                ) from error


def beside_bytes(outline: Outline) -> int:
    """See :meth:`swquant.formats.base.Format.beside_bytes`: metadata, names, and each tensor's way to a multiple of 32.

    The divisors of rotary frequencies, which no checkpoint has, are of the metadata here.
    """
    model = describe_model(outline.config)
    names = tensor_names(model)
    found: dict[str, tuple[int, int]] = {}
    for module, (rows, columns) in (
        *outline.linears.items(),
        *((name, end) for name, (end, _) in outline.ends.items()),
    ):
        kind = block_type(outline.grids[module] if module in outline.grids else outline.ends[module][1])
        assert kind is not None
        found[f"{module}.weight"] = 2, rows * kind.row_bytes(columns)
    for name, shape in (outline.plain or {}).items():
        found[name] = len(shape), math.prod(shape) * (4 if len(shape) == 1 else outline.dtype.itemsize)
    infos = sum(len(require_named(name, names, model)) + _INFO + 8 * dims for name, (dims, _) in found.items())
    divisors = 0
    if model.rope.divisors is not None:
        divisors = len(ROPE_FREQS) + _INFO + 8 + model.rope.divisors.numel() * 4 + _ALIGNMENT
    metadata = metadata_bytes(outline, model, read_vocabulary(outline.directory, model.settings))
    return metadata + infos + divisors + _ALIGNMENT + sum(-nbytes % _ALIGNMENT for _, nbytes in found.values())


def write_gguf(directory: Path, quantized: QuantizedModel, pack: Pack) -> Written:
    """Write ``model.gguf`` into ``directory``, and the configuration and the tokenizer's files beside it.

    The parts are gone through twice, for the header and for the tensors, so memory holds one at a time.

    Args:
        directory: An empty directory, or one to be made.
        quantized: The model.
        pack: From a weight's name and the weight to its blocks.

    Raises:
        SwquantError: llama.cpp has no such model or tokenizer, or no tensor of some name.
    """
    require_unused(directory)
    outline, gguf = quantized.outline, import_gguf()
    model = describe_model(outline.config)
    vocabulary = read_vocabulary(outline.directory, model.settings)
    names = tensor_names(model)
    directory.mkdir(parents=True, exist_ok=True)
    copy_sidecars(directory, quantized.sidecars)
    writer: Any = gguf.GGUFWriter(directory / FILE, model.architecture.name)
    with closing(writer):
        _add_metadata(writer, model, outline, vocabulary)
        size = 0
        int8 = torch.empty(0, dtype=torch.int8).numpy().dtype  # the package rescales shapes of uint8 by types it knows
        for name, entry in _entries(quantized, model, names, pack):
            writer.add_tensor_info(name, entry.shape, int8, entry.content.nbytes, raw_dtype=entry.type_id)
            size += entry.content.nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, entry in _entries(quantized, model, names, pack):
            writer.write_tensor_data(entry.content.numpy())
        writer.flush()
    with (directory / FILE).open("rb+") as file:
        os.fsync(file.fileno())
    write_beside(directory, outline.config, quantized.extra_files)
    return Written((FILE,), size)


def _entries(
    quantized: QuantizedModel, model: Model, names: Mapping[str, str], pack: Pack
) -> Iterator[tuple[str, _Entry]]:
    """The file's tensors in order."""
    if model.rope.divisors is not None:
        yield ROPE_FREQS, _plain(model.rope.divisors)
    for part in quantized.parts():
        for full, value in entries(part):
            name, module = require_named(full, names, model), full.rpartition(".")[0]
            order = model.row_order(module)
            if isinstance(value, Tensor):
                rows = value if order is None else value[order]
                # In float32, as transformers adds it: float16 has no digits left for small weights.
                entry = _plain(rows.float() + model.offset(module) if model.offset(module) else rows)
            else:
                entry = _packed(full, reorder(value, order), pack)
            yield name, entry


def _plain(tensor: Tensor) -> _Entry:
    """Matrices in their own dtype, norms and biases in float32, as llama.cpp wants them."""
    stored = (tensor.float() if tensor.dim() == 1 else tensor).detach().cpu().contiguous()
    return _Entry(stored.view(-1).view(torch.uint8), tuple(stored.shape), _PLAIN_IDS[stored.dtype])


def _packed(name: str, weight: QTensor, pack: Pack) -> _Entry:
    kind = block_type(weight.spec)
    assert kind is not None
    return _Entry(pack(name, weight).view(-1), tuple(weight.codes.shape), kind.type_id)


def _add_metadata(writer: Any, model: Model, outline: Outline, vocabulary: Vocabulary) -> None:
    """All of a file but its tensors."""
    _add_model(writer, import_gguf(), model)
    _add_grid(writer, outline.most)
    if outline.others:
        others = {name: grid_settings(spec) for name, spec in outline.others.items()}
        writer.add_string(OTHER_GRIDS, json.dumps(others))
    _add_vocabulary(writer, vocabulary)


def _add_model(writer: Any, gguf: Any, model: Model) -> None:
    settings = model.settings
    writer.add_type("model")
    writer.add_block_count(model.blocks)
    writer.add_context_length(int(settings["max_position_embeddings"]))
    writer.add_embedding_length(int(settings["hidden_size"]))
    writer.add_feed_forward_length(int(settings["intermediate_size"]))
    writer.add_head_count(int(settings["num_attention_heads"]))
    writer.add_head_count_kv(int(settings["num_key_value_heads"]))
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(float(settings["rms_norm_eps"]))
    writer.add_vocab_size(int(settings["vocab_size"]))
    writer.add_rope_dimension_count(model.head_dim)
    _add_rope(writer, gguf, model.rope)
    for key, value in model.fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{model.architecture.name}.{key}", value)


def _add_rope(writer: Any, gguf: Any, rope: Rope) -> None:
    writer.add_rope_freq_base(rope.base)
    if rope.scaling is None:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope.scaling))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original)
        writer.add_rope_scaling_attn_factors(rope.attention)
        writer.add_rope_scaling_yarn_beta_fast(YARN_BETAS["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(YARN_BETAS["beta_slow"])


def _add_grid(writer: Any, spec: QuantSpec) -> None:
    """llama.cpp's type of most weights, and our grid of these, which blocks do not tell: a group may be several."""
    kind = block_type(spec)
    assert kind is not None
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_string("swquant.grid", spec.grid)
    writer.add_uint32("swquant.bits", spec.bits)
    writer.add_uint32("swquant.group_size", spec.group_size or 0)
    writer.add_bool("swquant.symmetric", spec.symmetric)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.words)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_LONG.get(name, name)}_token_id", token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.templates:
        named = [{"name": name, "template": text} for name, text in vocabulary.templates.items()]
        writer.add_chat_template(named if len(named) > 1 else named[0]["template"])


_LONG: Mapping[str, str] = {"unk": "unknown", "pad": "padding"}
"""Special tokens whose names are longer in the file."""
