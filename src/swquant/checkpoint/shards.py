"""Safetensors files of a model directory: which there are, what their headers say, and what is wrong with them.

They may come from a stranger; what is wrong with a file is said in one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from swquant.errors import SwquantError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NARROW = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Floats of 8 bits, which only a quantized model has: alone they are not its weights."""
_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_JSON_LIMIT = 100 << 20
_CONVERT = (
    "convert pickled weights where you trust them: load the model with transformers and call "
    "save_pretrained(path, safe_serialization=True)"
)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
        file: The safetensors file that holds it.
        key: Its name there.
        dtype: Its dtype there.
        shape: Its shape.
        nbytes: Its size.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def find_shards(directory: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the tensors that the index promises from it."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        _refuse_weightless(directory)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SwquantError(f"{index} has no weight_map; take the index that the model's author published")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise SwquantError(
                f"{index} puts {shown(name)} into {shown(str(file))}, expected the name of a safetensors file "
                "beside it; download the model from its author"
            )
        shards.setdefault(directory / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise SwquantError(f"{index} names {shown(shard.name)}, which is missing; download the model again")
    return shards


def _is_plain(file: str) -> bool:
    """Whether it names a file in the same directory, on any system."""
    return file.endswith(".safetensors") and not any(mark in file for mark in "/\\:\0")


def _refuse_weightless(directory: Path) -> NoReturn:
    names = sorted(path.name for path in directory.iterdir())
    expected = f"expected {SINGLE} or {INDEX}"
    for name in names:
        if name.endswith(".safetensors"):
            raise SwquantError(f"{directory} holds {shown(name)}, {expected}; download the whole model")
        if name.endswith((".gguf", ".onnx")):
            raise SwquantError(f"{directory} holds its weights as {shown(name)}, {expected}; give the original model")
    for name in names:
        if name.endswith(_PICKLES):
            raise SwquantError(f"{directory} has only pickled weights ({shown(name)}), {expected}; {_CONVERT}")
    raise SwquantError(f"{directory} holds no weights, {expected}; {_CONVERT}")


def read_headers(shards: Iterable[Path], *, narrow: bool = False) -> dict[str, Stored]:
    """Every tensor by name, and nothing of its values.

    Args:
        shards: The files.
        narrow: Take floats of 8 bits as well.

    Raises:
        SwquantError: A file is damaged, or holds what another holds too.
    """
    known = _DTYPES | _NARROW if narrow else _DTYPES
    tensors: dict[str, Stored] = {}
    for file in shards:
        with opened(file) as shard:
            found = {name: _stored(file, name, shard.get_slice(name), known) for name in shard.keys()}  # noqa: SIM118
        for name in sorted(found.keys() & tensors.keys()):
            raise SwquantError(
                f"both {tensors[name].file} and {file.name} hold {shown(name)}; save the model again, or take "
                "the files that its author published"
            )
        tensors.update(found)
    return tensors


def missing_of(shards: Mapping[Path, set[str]], tensors: Mapping[str, Stored]) -> dict[str, Path]:
    """What the index promises and no file holds, with the file that should: by itself no fault, an index may be old."""
    return {name: file for file, names in shards.items() for name in sorted(names) if name not in tensors}


def is_missing(name: str, file: Path) -> SwquantError:
    """The refusal of such a tensor where something depends on it."""
    return SwquantError(
        f"{file} lacks {shown(name)}, which {INDEX} promises: they are not of one model; take both as the model's "
        "author published them"
    )


def _stored(file: Path, name: str, header: Any, known: Mapping[str, torch.dtype]) -> Stored:
    dtype_name, shape = str(header.get_dtype()), tuple(header.get_shape())
    dtype = known.get(dtype_name)
    if dtype is None:
        raise SwquantError(
            f"{shown(name)} in {file} is {dtype_name}, expected F32, F16 or BF16; convert the model to bfloat16 first"
        )
    if 0 in shape:
        raise SwquantError(
            f"{shown(name)} in {file} is empty, of shape {list(shape)}; save the model again with its weights gathered"
        )
    return Stored(file, name, dtype, shape, math.prod(shape) * dtype.itemsize)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of at most 100 MB."""
    with read_errors(path), path.open("rb") as file:
        content = file.read(_JSON_LIMIT + 1)
    try:
        value = json.loads(content) if len(content) <= _JSON_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise SwquantError(f"{path} is not valid JSON ({_plain(str(error))}); download it again") from error
    if not isinstance(value, dict):
        raise SwquantError(f"{path} does not hold a JSON object; take the file that the model's author published")
    return value


@contextmanager
def opened(file: Path) -> Generator[Any]:
    """The safetensors file; what the library finds wrong with it becomes one sentence."""
    try:
        with read_errors(file), _mapped(file) as shard:
            yield shard
    except SafetensorError as error:
        if _is_pointer(file):
            raise SwquantError(
                f"{file} is a pointer of Git LFS and not the file itself; 'git lfs pull' in its directory brings it"
            ) from error
        raise SwquantError(
            f"{file} is damaged or not a safetensors file ({_plain(str(error))}); download it again"
        ) from error


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_POINTER)) == _POINTER


def _mapped(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (MemoryError, RuntimeError) as error:
        raise SwquantError(
            f"{file} has {file.stat().st_size} bytes and cannot be mapped into memory ({_plain(str(error))}); "
            "raise the limit on the address space (ulimit -v)"
        ) from error


@contextmanager
def read_errors(path: Path) -> Generator[None]:
    """What the system says of a file becomes one sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise SwquantError(
            f"{place} cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error


def shown(text: str) -> str:
    """Text from a file, quoted, without control characters and of bounded length."""
    return repr(_short(text))


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in _short(text))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
