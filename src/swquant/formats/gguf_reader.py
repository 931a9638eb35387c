"""Models that swquant has written as GGUF, read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, Part, QuantizedModel, model_dtype
from swquant.checkpoint.reader import Checkpoint
from swquant.errors import SwquantError
from swquant.formats.gguf_blocks import block_type
from swquant.formats.gguf_file import PLAIN_TYPES, Header, open_gguf
from swquant.formats.gguf_model import ROPE_FREQS, Model, describe_model, reorder
from swquant.formats.gguf_writer import FILE, OTHER_GRIDS, tensor_names
from swquant.formats.reading import grid_from, grids_by_name, spec_from
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

Decode = Callable[[str, Mapping[str, Tensor], QuantSpec], QTensor]


def read_gguf(directory: Path, config: Mapping[str, Any], decode: Decode) -> QuantizedModel:
    """The model in ``directory``; tensors are read when ``parts`` comes to them.

    Args:
        directory: With ``model.gguf``.
        config: The content of ``config.json``.
        decode: From a weight's name, its blocks and the grid to the weight.

    Raises:
        SwquantError: The file is damaged, was written by other software, or belongs to another model.
    """
    file = open_gguf(directory / FILE)
    spec_of = _specs(file, directory)
    blocks = config.get("num_hidden_layers")
    if type(blocks) is not int or not 0 < blocks <= len(file.tensors):
        raise SwquantError(f"{file.path} has no tensors for the {blocks!r:.40} blocks of config.json; write it again")
    model = describe_model(config)
    names = _our_names(file, model)
    linears, grids = _linears(file, names, spec_of)
    dtype = model_dtype(config) or _dtype(file)

    def parts() -> Iterator[Part]:
        for name, full in names.items():
            module, value = full.rpartition(".")[0], file.read(name)
            order = model.row_order(module)
            inverse = None if order is None else order.argsort()
            if inverse is not None and len(inverse) != len(value):
                raise SwquantError(f"{full} in {file.path} has {len(value)} rows, config.json says {len(inverse)}")
            if module in grids and full.endswith(".weight"):
                yield {full: reorder(decode(module, {full: value}, grids[module]), inverse)}
            else:
                rows = value if inverse is None else value[inverse]
                offset = model.offset(module)
                yield {full: _narrowed(rows - offset if offset else rows, dtype)}

    ends = {name: (linears[name], grids[name]) for name in (model.family.embedding, model.family.head) if name in grids}
    inside = {name: spec for name, spec in grids.items() if name not in ends}
    if not inside:
        raise SwquantError(f"{file.path} holds no quantized weight in its blocks")
    shapes = {name: linears[name] for name in inside}
    outline = Outline(directory, dict(config), dtype, shapes, inside, (model.family.head,), ends=ends)
    return QuantizedModel(outline, parts, Checkpoint(directory, config, {}).sidecars())


def _specs(file: Header, directory: Path) -> Callable[[str], QuantSpec]:
    """The grid of each module, if it is quantized."""
    fields = file.fields
    if "swquant.grid" not in fields:
        raise SwquantError(f"{file.path} was written by other software; swquant reads back only what it wrote")
    group_size, grid = fields.get("swquant.group_size") or None, str(fields["swquant.grid"])
    most = spec_from(directory, fields.get("swquant.bits"), group_size, fields.get("swquant.symmetric"), grid)
    try:
        others = dict(json.loads(str(fields.get(OTHER_GRIDS, "{}"))))
    except (ValueError, TypeError, RecursionError) as error:
        raise SwquantError(f"{file.path} tells no grids in {OTHER_GRIDS}; write it again") from error
    return grids_by_name(most, {name: grid_from(directory, settings) for name, settings in others.items()})


def _our_names(file: Header, model: Model) -> dict[str, str]:
    """Our full names by the file's, without what is computed from the configuration."""
    modules = {name: module for module, name in tensor_names(model).items()}
    named: dict[str, str] = {}
    for name in file.tensors:
        if name == ROPE_FREQS:
            continue
        module, _, suffix = name.rpartition(".")
        if module not in modules or suffix not in ("weight", "bias"):
            raise SwquantError(f"{file.path} holds {name!r:.80}, which the model of config.json does not have")
        named[name] = f"{modules[module]}.{suffix}"
    return named


def _linears(
    file: Header, names: Mapping[str, str], spec_of: Callable[[str], QuantSpec]
) -> tuple[dict[str, tuple[int, int]], dict[str, QuantSpec]]:
    """The quantized modules, their shapes and their grids; each of its grid's type."""
    found: dict[str, tuple[int, int]] = {}
    grids: dict[str, QuantSpec] = {}
    for name, full in names.items():
        stored = file.tensors[name]
        if stored.type_id in PLAIN_TYPES:
            continue
        module = full.removesuffix(".weight")
        spec = grids[module] = spec_of(module)
        kind = block_type(spec)
        if kind is None or stored.type_id != kind.type_id:
            raise SwquantError(f"{full} in {file.path} has the type number {stored.type_id}, not that of {spec.label}")
        rows, columns = stored.shape
        found[module] = rows, columns
    if not found:
        raise SwquantError(f"{file.path} holds no quantized weight")
    return found, grids


def _dtype(file: Header) -> torch.dtype:
    """That of the matrices that are not quantized."""
    plain = [tensor for tensor in file.tensors.values() if tensor.type_id in PLAIN_TYPES and len(tensor.shape) == 2]
    return PLAIN_TYPES[plain[0].type_id] if plain else torch.float32


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's dtype, where that holds every value: files keep norms and biases in float32."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
