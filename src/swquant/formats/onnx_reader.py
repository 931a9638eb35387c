"""``model.onnx`` and its data on their way back to codes; either file may hold anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Decode, Outline, Part, QuantizedModel, model_dtype
from swquant.checkpoint.reader import Checkpoint
from swquant.errors import SwquantError
from swquant.formats.onnx_layout import DATA, MODEL, OTHER_GRIDS, PROPERTY, onnx_types, require_onnx
from swquant.formats.reading import grid_from, grids_by_name, spec_from
from swquant.quant.spec import QuantSpec

GRAPH_LIMIT = 256 << 20
"""The graph of a decoder takes some kilobytes for each layer."""

_SUFFIXES = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the data file; checked against the file's size."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


def read_decoder(directory: Path, config: Mapping[str, Any], decode: Decode) -> QuantizedModel:
    """The model that :func:`swquant.formats.onnx_writer.write_decoder` has written.

    The graph is read without its data, and each tensor's place checked against the data file's size. Tensors are read
    when ``parts`` comes to them.

    Args:
        directory: Holds ``model.onnx`` and ``model.onnx.data``.
        config: The content of ``config.json``.
        decode: See :meth:`swquant.formats.onnx.Onnx.decode`.

    Raises:
        SwquantError: A file is damaged, or the model is not one that swquant wrote.
    """
    require_onnx()
    graph = _load(directory)
    spec_of = _specs_of(directory, graph)
    places = _places(directory, graph)
    shapes = _shapes(directory, graph, spec_of)
    grids = {module: spec_of(module) for module in shapes}
    quantized = {f"{module}.{suffix}" for module in shapes for suffix in _SUFFIXES}
    plain = [name for name in places if name not in quantized and name not in _tables()]
    floating = [place.dtype for name, place in places.items() if name in plain]

    def parts() -> Iterator[Part]:
        for name in plain:
            yield {name: _read(directory, name, places[name])}
        for module, shape in shapes.items():
            names = [name for name in (f"{module}.{suffix}" for suffix in _SUFFIXES) if name in places]
            tensors = {name: _read(directory, name, places[name]) for name in names}
            tensors[f"{module}.shape"] = torch.tensor(shape, dtype=torch.int64)
            yield {f"{module}.weight": decode(module, tensors, grids[module])}

    dtype = model_dtype(config) or (floating[0] if floating else torch.float32)
    outline = Outline(directory, config, dtype, shapes, grids, ())
    return QuantizedModel(outline, parts, Checkpoint(directory, config, {}).sidecars())


def _load(directory: Path) -> Any:
    """The graph, without its data."""
    import onnx
    from google.protobuf.message import DecodeError

    path = directory / MODEL
    try:
        if path.stat().st_size > GRAPH_LIMIT:
            raise SwquantError(
                f"{path} is larger than {GRAPH_LIMIT >> 20} MB, expected a graph with its data beside it"
            )
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise SwquantError(f"{path} is damaged or not an ONNX file; write it again") from error
    except OSError as error:
        raise SwquantError(f"{path} cannot be read ({error.strerror or error}); check the file") from error


def _specs_of(directory: Path, model: Any) -> Callable[[str], QuantSpec]:
    """The grid of each module that the model's metadata tell."""
    told = [entry.value for entry in model.metadata_props if entry.key == PROPERTY]
    if not told:
        raise SwquantError(f"{directory / MODEL} was not written by swquant, which reads its own ONNX files only")
    try:
        grid = json.loads(told[0])
        told_grid = grid["bits"], grid["group_size"], grid["symmetric"]
        others = dict(grid.get(OTHER_GRIDS, {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SwquantError(f"{directory / MODEL} tells no grid in its metadata; write it again") from error
    most = spec_from(directory / MODEL, *told_grid)
    return grids_by_name(most, {name: grid_from(directory / MODEL, own) for name, own in others.items()})


def _places(directory: Path, model: Any) -> dict[str, _Place]:
    """Places of all tensors in the data file, by name."""
    from onnx import TensorProto

    dtypes = {number: dtype for dtype, number in onnx_types().items()}
    path = directory / DATA
    try:
        size = path.stat().st_size
    except OSError as error:
        raise SwquantError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    found: dict[str, _Place] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name, shape = _text(tensor.name), tuple(int(width) for width in tensor.dims)
        if tensor.data_type not in dtypes:
            raise SwquantError(f"{directory / MODEL} holds {name!r:.200} in a type that swquant does not write")
        dtype = dtypes[tensor.data_type]
        told = {entry.key: entry.value for entry in tensor.external_data}
        if told.get("location") != DATA:
            raise SwquantError(f"{directory / MODEL} puts {name!r:.200} outside of {DATA}; write it again")
        offset, length = _integer(told.get("offset")), _integer(told.get("length"))
        whole = all(width > 0 for width in shape) and offset >= 0 and name not in found
        if not whole or length != math.prod(shape) * dtype.itemsize or offset + length > size:
            raise SwquantError(
                f"{directory / MODEL} puts {name!r:.200}, {length} bytes at {offset}, where {DATA} of {size} bytes has "
                "no such tensor; one of both is damaged, write them again"
            )
        found[name] = _Place(dtype, shape, offset, length)
    return found


def _text(value: str | bytes) -> str:
    """A name; protobuf leaves one that is not UTF-8 in bytes, and such a name is nobody's."""
    return value if isinstance(value, str) else ""


def _integer(text: str | None) -> int:
    """A number of at most 18 digits; -1 if it is none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else -1


def _shapes(directory: Path, model: Any, spec_of: Callable[[str], QuantSpec]) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each quantized module, from its node."""
    shapes: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        codes = _text(node.input[1]) if len(node.input) > 2 else ""
        module = codes.removesuffix(".codes")
        if module == codes or numbers.get("bits") != spec_of(module).bits or not {"N", "K"} <= numbers.keys():
            raise SwquantError(f"{directory / MODEL} has a MatMulNBits that swquant did not write; write it again")
        shapes[module] = (numbers["N"], numbers["K"])
    if not shapes:
        raise SwquantError(f"{directory / MODEL} holds no MatMulNBits, so nothing in it is quantized")
    return shapes


def _tables() -> tuple[str, str]:
    """Names of the rotary tables, which follow from ``config.json``."""
    from swquant.formats.onnx_graph import COS, SIN

    return COS, SIN


def _read(directory: Path, name: str, place: _Place) -> Tensor:
    path = directory / DATA
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            content = bytearray(file.read(place.length))
    except OSError as error:
        raise SwquantError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    if len(content) != place.length:
        raise SwquantError(f"{path} ends within {name!r:.200}; write it again")
    tensor = torch.frombuffer(content, dtype=place.dtype).view(place.shape)
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise SwquantError(f"{name!r:.200} in {path} holds NaN or infinite values; write it again")
    return tensor
