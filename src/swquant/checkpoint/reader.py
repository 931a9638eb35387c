"""Checkpoints on their way in: found, checked from their headers alone, and read tensor by tensor.

Whatever lies in a model directory may come from a stranger. Weights are read from safetensors files only, nothing is
unpickled, no code of the model's is imported, and what is wrong with a file is said in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swquant.checkpoint.hub import download
from swquant.errors import SwquantError

CONFIG = "config.json"
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
_SIDECARS = (
    "tokenizer*.json",
    "tokenizer*.txt",
    "*.model",
    "*.tiktoken",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*.jinja",
    "chat_template*.json",
)
_NOTICES = ("license*", "licence*", "notice*", "use_policy*")
_WEIGHTS = ("*.safetensors", "model.gguf", "model.onnx", "model.onnx.data")
_BESIDE = ("README.md", "swquant.yaml")
"""The card, which names the licence, and the recipe."""
_NEVER_COPIED = (".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".gguf", ".onnx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_JSON_LIMIT = 100 << 20
_CHUNK = 1 << 22
_MOST = torch.finfo(torch.float16).max
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


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that :func:`open_checkpoint` has checked.

    Attributes:
        directory: Where it is.
        config: The content of ``config.json``.
        tensors: What the shards hold, by full name in sorted order, as their headers say.
        stamps: Size and time of the last change of each file when it was opened; one that differs later is refused.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict[Path, "tuple[int, int]"])

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in its stored dtype and in memory of its own.

        Raises:
            SwquantError: There is none, its file cannot be read, or a value is NaN or infinite.
        """
        stored = self._stored(name)
        self._require_unchanged(stored.file)
        with _opened(stored.file) as shard:
            tensor: Tensor = shard.get_tensor(stored.key).clone()
        return _finite(tensor, stored)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]`` of a matrix, reading no other rows; each row is read once.

        Args:
            name: A tensor of two dimensions.
            indices: Integers of one dimension, not negative, in any order.

        Raises:
            SwquantError: As :meth:`read`, or the matrix has no such row.
            ValueError: ``name`` is not a matrix, or ``indices`` has more than one dimension.
        """
        stored = self._stored(name)
        if len(stored.shape) != 2 or indices.dim() != 1:
            raise ValueError(f"rows wants a matrix and a vector, got {stored.shape} and {tuple(indices.shape)}")
        wanted, places = torch.unique(indices.cpu().long(), return_inverse=True)
        rows, width = stored.shape
        for row in wanted[(wanted < 0) | (wanted >= rows)].tolist()[:1]:
            raise SwquantError(
                f"row {row} of {_shown(name)} was asked for and {stored.file} has rows 0 to {rows - 1}; "
                "check that the tokenizer belongs to this model"
            )
        found = torch.empty(len(wanted), width, dtype=stored.dtype)
        self._require_unchanged(stored.file)
        with _opened(stored.file) as shard:
            matrix = shard.get_slice(stored.key)
            done = 0
            for start, stop in _runs(wanted.tolist()):
                found[done : done + stop - start] = matrix[start:stop]
                done += stop - start
        return _finite(found, stored)[places]

    def require_finite(self, quantized: Iterable[str] = ()) -> None:
        """Look at every value once; the files are mapped, so memory holds no more than a chunk of them.

        Args:
            quantized: Names of weights that are to be quantized, whose scales have to fit in 16 bits.

        Raises:
            SwquantError: A file cannot be read, a value is NaN or infinite, or one of a weight to be quantized is
                greater than any float16; the tensor is named.
        """
        limited = frozenset(quantized)
        for name, stored in self.tensors.items():
            with _opened(stored.file) as shard:
                _finite(shard.get_tensor(stored.key), stored, _MOST if name in limited else math.inf)

    def prefixed(self, prefix: str, expected: str, kept: str) -> Checkpoint:
        """This checkpoint under full names, if it is the save of a base model, whose names lack ``prefix``.

        transformers' ``OPTModel`` saves ``decoder.layers.0...`` as what ``OPTForCausalLM`` calls
        ``model.decoder.layers.0...``. Where any name begins with ``prefix``, or ``expected`` is not found without it,
        names stay as they are.

        Args:
            prefix: What full names begin with, e.g. ``model.``.
            expected: A full name that every such model has.
            kept: Names that begin with this are full without ``prefix``, e.g. ``lm_head.``.
        """
        if expected.removeprefix(prefix) not in self.tensors or any(name.startswith(prefix) for name in self.tensors):
            return self
        full = {name if name.startswith(kept) else prefix + name: stored for name, stored in self.tensors.items()}
        return replace(self, tensors=dict(sorted(full.items())))

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes have."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            if stored.dtype.is_floating_point:
                sizes[stored.dtype] += stored.nbytes
        return sizes.most_common(1)[0][0]

    def sidecars(self) -> tuple[Path, ...]:
        """The files that belong beside the weights of any version of this model: tokenizer, chat template, licence.

        Raises:
            SwquantError: One is a link to a file that is not the model's; a copy of it might publish something private.
        """
        found = tuple(path for path in sorted(self.directory.iterdir()) if _is_sidecar(path.name) and path.is_file())
        for path in found:
            require_own(path, self.directory)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over ``config.json`` and every shard, name and content; where the directory lies does not matter.

        Raises:
            SwquantError: A file cannot be read, or has changed since it was opened.
        """
        digest = hashlib.sha256()
        files = {stored.file for stored in self.tensors.values()}
        for path in (self.directory / CONFIG, *sorted(files)):
            with _read_errors(path), path.open("rb") as file:
                digest.update(json.dumps([path.name, os.fstat(file.fileno()).st_size]).encode())
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            self._require_unchanged(path)
        return digest.hexdigest()

    def _require_unchanged(self, file: Path) -> None:
        with _read_errors(file):
            if self.stamps.get(file, now := _stamp(file)) != now:
                raise SwquantError(
                    f"{file} has changed since it was opened; put the original back and give the same command again"
                )

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise SwquantError(f"{self.directory} has no tensor {_shown(name)}; check that it is a whole checkpoint")
        return self.tensors[name]


def open_checkpoint(source: str | Path, *, quantized: bool = False) -> Checkpoint:
    """Find a model and check everything that its configuration and headers tell; no weight is read.

    Args:
        source: A model directory, or the name of a model on the hub, which is downloaded if need be.
        quantized: Take one that is quantized as well.

    Raises:
        SwquantError: There is no such model, or it is not a whole safetensors checkpoint, unquantized if need be.
    """
    directory = find_model(source)
    with _read_errors(directory):
        config = read_config(directory)
        if not quantized:
            _refuse_quantized(directory, config)
        shards = _shards(directory)
        stamps = {file: _stamp(file) for file in (directory / CONFIG, *shards)}
        tensors = _read_headers(shards)
    if not any(stored.dtype.is_floating_point for stored in tensors.values()):
        raise SwquantError(f"{directory} holds no floating-point tensor, expected a model's weights; download it again")
    return Checkpoint(directory, config, dict(sorted(tensors.items())), stamps)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def find_model(source: str | Path) -> Path:
    """The model's directory; a hub name's is downloaded if need be.

    Raises:
        SwquantError: There is no such model.
    """
    path = _expanded(Path(source))
    with _read_errors(path):
        if path.is_dir():
            return path
        if path.exists():
            raise SwquantError(f"{path} is a file, expected a model directory or a hub name; give its directory")
    if isinstance(source, Path) or _looks_like_path(source):
        raise SwquantError(
            f"no such directory: {str(source)!r}; give a model directory or a hub name like 'owner/name'"
        )
    return download(source, (*_WEIGHTS, "*.json", *_BESIDE, *_SIDECARS, *_NOTICES, *map(str.upper, _NOTICES)))


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~name of nobody
        return path


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or source.endswith(("/", os.sep))
        or max(source.count("/"), source.count(os.sep)) > 1
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        SwquantError: There is none, or it is not a mapping.
    """
    path = directory / CONFIG
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob("*/config.json"))[:8]
        hint = f"give one of {', '.join(inside)}" if inside else "give the directory that save_pretrained wrote"
        raise SwquantError(f"{directory} has no config.json; {hint}")
    return _read_json(path)


def _refuse_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        found = part if isinstance(part, dict) else {}
        quantization = found.get("quantization_config", found.get("quantization"))
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise SwquantError(
                f"{directory} is already quantized, by {_shown(str(method or 'an unnamed method'))}; "
                "give the original model"
            )


def _shards(directory: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the tensors that the index promises from it."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        _refuse_weightless(directory)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SwquantError(f"{index} has no weight_map; download it again")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise SwquantError(
                f"{index} puts {_shown(name)} into {_shown(str(file))}, expected the name of a safetensors file "
                "beside it; download the model from its author"
            )
        shards.setdefault(directory / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise SwquantError(f"{index} names {_shown(shard.name)}, which is missing; download the model again")
    return shards


def _is_plain(file: str) -> bool:
    """Whether it names a file in the same directory, on any system."""
    return file.endswith(".safetensors") and not any(mark in file for mark in "/\\:\0")


def _refuse_weightless(directory: Path) -> NoReturn:
    names = sorted(path.name for path in directory.iterdir())
    expected = f"expected {SINGLE} or {INDEX}"
    for name in names:
        if name.endswith(".safetensors"):
            raise SwquantError(f"{directory} holds {_shown(name)}, {expected}; download the whole model")
        if name.endswith((".gguf", ".onnx")):
            raise SwquantError(f"{directory} holds its weights as {_shown(name)}, {expected}; give the original model")
    for name in names:
        if name.endswith(_PICKLES):
            raise SwquantError(f"{directory} has only pickled weights ({_shown(name)}), {expected}; {_CONVERT}")
    raise SwquantError(f"{directory} holds no weights, {expected}; {_CONVERT}")


def _read_headers(shards: Mapping[Path, set[str]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, promised in shards.items():
        with _opened(file) as shard:
            found = {name: _stored(file, name, shard.get_slice(name)) for name in shard.keys()}  # noqa: SIM118
        for name in sorted(promised - found.keys()):
            raise SwquantError(f"{file} lacks {_shown(name)}, which {INDEX} promises; download the model again")
        for name in sorted(found.keys() & tensors.keys()):
            raise SwquantError(
                f"both {tensors[name].file} and {file.name} hold {_shown(name)}; download the model again"
            )
        tensors.update(found)
    return tensors


def _stored(file: Path, name: str, header: Any) -> Stored:
    dtype_name, shape = str(header.get_dtype()), tuple(header.get_shape())
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise SwquantError(
            f"{_shown(name)} in {file} is {dtype_name}, expected F32, F16 or BF16; convert the model to bfloat16 first"
        )
    if 0 in shape:
        raise SwquantError(
            f"{_shown(name)} in {file} is empty, of shape {list(shape)}; save the model again with its weights gathered"
        )
    return Stored(file, name, dtype, shape, math.prod(shape) * dtype.itemsize)


def _finite(tensor: Tensor, stored: Stored, most: float = math.inf) -> Tensor:
    """``tensor`` itself; chunks keep the check's memory small, and extremes, which NaN passes into, its time."""
    if tensor.is_floating_point() and tensor.numel():
        for chunk in tensor.view(-1).split(_CHUNK):
            ends = torch.stack(torch.aminmax(chunk))
            if not bool(ends.isfinite().all()):
                raise SwquantError(
                    f"{_shown(stored.key)} in {stored.file} holds NaN or infinite values; "
                    "download the file again or ask its author"
                )
            for value in ends[ends.abs() > most].tolist()[:1]:
                raise SwquantError(
                    f"{_shown(stored.key)} in {stored.file} holds {value:g}, and weights beyond {most:.0f} have no "
                    "scale in 16 bits; ask the model's author"
                )
    return tensor


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows as ranges ``start, stop``."""
    start = stop = -1
    for row in rows:
        if row != stop:
            if stop > start:
                yield start, stop
            start = row
        stop = row + 1
    if stop > start:
        yield start, stop


def _is_sidecar(name: str) -> bool:
    lower = name.lower()
    if lower.endswith(_NEVER_COPIED):
        return False
    return any(fnmatchcase(lower, pattern) for pattern in (*_SIDECARS, *_NOTICES))


def require_own(path: Path, directory: Path) -> None:
    """Refuse a link that leaves the model, which in a hub cache includes the folder of blobs beside its snapshots.

    Raises:
        SwquantError: Naming the link: a copy of what it leads to might publish something private.
    """
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append((home.parents[1] / "blobs").resolve())
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        raise SwquantError(f"{path} is a link to {target}, outside the model; replace it by the file itself")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of at most 100 MB."""
    with _read_errors(path), path.open("rb") as file:
        content = file.read(_JSON_LIMIT + 1)
    try:
        value = json.loads(content) if len(content) <= _JSON_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise SwquantError(f"{path} is not valid JSON ({_plain(str(error))}); download it again") from error
    if not isinstance(value, dict):
        raise SwquantError(f"{path} does not hold a JSON object; download it again")
    return value


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    """The safetensors file; what the library finds wrong with it becomes one sentence."""
    try:
        with _read_errors(file), _mapped(file) as shard:
            yield shard
    except SafetensorError as error:
        raise SwquantError(
            f"{file} is damaged or not a safetensors file ({_plain(str(error))}); download it again"
        ) from error


def _mapped(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (MemoryError, RuntimeError) as error:
        raise SwquantError(
            f"{file} has {file.stat().st_size} bytes and cannot be mapped into memory ({_plain(str(error))}); "
            "raise the limit on the address space (ulimit -v)"
        ) from error


@contextmanager
def _read_errors(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise SwquantError(
            f"{place} cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error


def _shown(text: str) -> str:
    """Text from a file, quoted, without control characters and of bounded length."""
    return repr(_short(text))


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in _short(text))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
