"""Checkpoints on their way in: found, checked from their headers alone, and read tensor by tensor.

Whatever lies in a model directory may come from a stranger. Weights are read from safetensors files only, nothing is
unpickled, no code of the model's is imported unless the user trusts it, and what is wrong with a file is said in one
sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.hub import download, hub_digest, require_subfolder, split_revision
from swquant.checkpoint.own_code import CODE, CONFIG, names_code, of_the_model, trusts_code, without_code
from swquant.checkpoint.shards import (
    Stored,
    find_shards,
    is_missing,
    missing_of,
    opened,
    read_errors,
    read_headers,
    read_json,
    shown,
)
from swquant.checkpoint.sidecars import NOTICES, SIDECARS, TEMPLATES, is_sidecar, require_own
from swquant.checkpoint.values import MOST, finite, require_range, runs, wanted_rows
from swquant.errors import SwquantError

_WEIGHTS = ("*.safetensors", "model.gguf", "model.onnx", "model.onnx.data")
_BESIDE = ("README.md", "swquant.yaml")
"""The card, which names the licence, and the recipe."""
_CHUNK = 1 << 22
_GGUF = (
    "quantizing begins with the original's safetensors (--for llama.cpp writes GGUF); "
    "of a GGUF that swquant wrote, give the directory"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that :func:`open_checkpoint` has checked.

    Attributes:
        directory: Where it is.
        config: The content of ``config.json``.
        tensors: What the shards hold, by full name in sorted order, as their headers say.
        stamps: Size and time of the last change of each file when it was opened; one that differs later is refused.
        missing: Tensors that the index promises and no file holds, with the file that should.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict[Path, "tuple[int, int]"])
    missing: Mapping[str, Path] = field(default_factory=dict[str, Path])

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
        with opened(stored.file) as shard:
            tensor: Tensor = shard.get_tensor(stored.key).clone()
        return finite(tensor, stored)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``, reading no more than that, e.g. some experts of many.

        Raises:
            SwquantError: As :meth:`read`.
            ValueError: ``name`` is a scalar, or it has no such range.
        """
        return self._cut(name, 0, start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[:, start:stop]``, reading no more than that.

        Raises:
            SwquantError: As :meth:`read`.
            ValueError: ``name`` has one dimension or none, or it has no such range.
        """
        return self._cut(name, 1, start, stop)

    def _cut(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        stored = self._stored(name)
        require_range(stored.shape, dim, start, stop)
        self._require_unchanged(stored.file)
        with opened(stored.file) as shard:
            whole = shard.get_slice(stored.key)
            tensor: Tensor = (whole[start:stop] if dim == 0 else whole[:, start:stop]).clone()
        return finite(tensor, stored)

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
        wanted, places = wanted_rows(name, stored, indices)
        found = torch.empty(len(wanted), stored.shape[1], dtype=stored.dtype)
        self._require_unchanged(stored.file)
        with opened(stored.file) as shard:
            matrix = shard.get_slice(stored.key)
            done = 0
            for start, stop in runs(wanted.tolist()):
                found[done : done + stop - start] = matrix[start:stop]
                done += stop - start
        return finite(found, stored)[places]

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
            with opened(stored.file) as shard:
                finite(shard.get_tensor(stored.key), stored, MOST if name in limited else math.inf)

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

    def renamed(self, old: str, new: str) -> Checkpoint:
        """This checkpoint with the tensor ``old`` under the name ``new``."""
        named = {new if name == old else name: stored for name, stored in self.tensors.items()}
        return replace(self, tensors=dict(sorted(named.items())))

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
        """The files that belong beside the weights of any version of this model: tokenizer, chat templates, licence.

        The model's own code is among them if it is trusted.

        Raises:
            SwquantError: One is a link to a file that is not the model's; a copy of it might publish something private.
        """
        files = [path for path in sorted(self.directory.iterdir()) if path.is_file()]
        found = tuple(path for path in files if is_sidecar(path.name) or path in self._code())
        found += tuple(sorted((self.directory / TEMPLATES).glob("*.jinja")))
        for path in found:
            require_own(path, self.directory)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over ``config.json``, trusted code and every shard, name and content, wherever the directory lies.

        A large file in a hub cache has the SHA-256 of its content for a name, which is taken for it: it is not read.

        Raises:
            SwquantError: A file cannot be read, or has changed since it was opened.
        """
        digest = hashlib.sha256()
        files = {stored.file for stored in self.tensors.values()}
        for path in (self.directory / CONFIG, *self._code(), *sorted(files)):
            with read_errors(path):
                content = hub_digest(path) or _digest(path)
                digest.update(json.dumps([path.name, path.stat().st_size, content]).encode())
            self._require_unchanged(path)
        return digest.hexdigest()

    def _code(self) -> list[Path]:
        """The files of the model's own code, if it is trusted."""
        return sorted(self.directory.glob("*.py")) if trusts_code(self.config) else []

    def _require_unchanged(self, file: Path) -> None:
        with read_errors(file):
            if self.stamps.get(file, now := _stamp(file)) != now:
                raise SwquantError(
                    f"{file} has changed since it was opened; put the original back and give the same command again"
                )

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise SwquantError(f"{self.directory} has no tensor {shown(name)}; check that it is a whole checkpoint")
        return self.tensors[name]


def open_checkpoint(source: str | Path, *, quantized: bool = False, trusted: bool = False) -> Checkpoint:
    """Find a model and check everything that its configuration and headers tell; no weight is read.

    What a run begins with may be quantized in some ways: :func:`swquant.checkpoint.opening.open_source` opens that.

    Args:
        source: A model directory, or the name of a model on the hub, which is downloaded if need be.
        quantized: Take one that is quantized as well; tensors are then as they are stored.
        trusted: See :func:`read_config`.

    Raises:
        SwquantError: There is no such model, or it is not a whole safetensors checkpoint, unquantized if need be.
    """
    directory = find_model(source)
    with read_errors(directory):
        config = read_config(directory, trusted=trusted)
        if not quantized:
            _refuse_quantized(directory, config)
        shards = find_shards(directory)
        stamps = {file: _stamp(file) for file in (directory / CONFIG, *shards)}
        tensors = read_headers(shards, narrow=quantized)
    if not any(stored.dtype.is_floating_point for stored in tensors.values()):
        raise SwquantError(f"{directory} holds no floating-point tensor, expected a model's weights")
    missing = missing_of(shards, tensors)
    if quantized:
        _require_modules_whole(missing, tensors)
    return Checkpoint(directory, config, dict(sorted(tensors.items())), stamps, missing)


def _require_modules_whole(missing: Mapping[str, Path], tensors: Iterable[str]) -> None:
    """Refuse a module of which some tensors are there and others not: codes without their scales, for instance."""
    there = {name.rpartition(".")[0] for name in tensors}
    for name, file in missing.items():
        if name.rpartition(".")[0] in there:
            raise is_missing(name, file)


def _digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def find_model(
    source: str | Path, revision: str | None = None, subfolder: str | None = None, *, trusted: bool = False
) -> Path:
    """The model's directory; a hub name's is downloaded if need be.

    Args:
        source: A directory, ``owner/name`` on the hub, or ``owner/name@revision``.
        revision: A branch, tag or commit on the hub.
        subfolder: Where in the directory or the repository the model lies.
        trusted: Download the model's own code, too.

    Raises:
        SwquantError: There is no such model.
    """
    path = _expanded(Path(source))
    if subfolder is not None:
        require_subfolder(subfolder)
    with read_errors(path):
        if path.is_dir():
            return _inside(path, revision, subfolder)
        if path.exists():
            hint = _GGUF if path.suffix == ".gguf" else "give its directory"
            raise SwquantError(f"{path} is a file, expected a model directory or a hub name; {hint}")
    if isinstance(source, Path) or _looks_like_path(source.partition("@")[0]):
        raise SwquantError(
            f"no such directory: {str(source)!r}; give a model directory or a hub name like 'owner/name'"
        )
    name, revision = split_revision(source, revision)
    wanted = (*_WEIGHTS, "*.json", *_BESIDE, *SIDECARS, *NOTICES, *map(str.upper, NOTICES))
    return download(name, (*wanted, *(["*.py"] if trusted else [])), (f"{TEMPLATES}/*.jinja",), revision, subfolder)


def _inside(path: Path, revision: str | None, subfolder: str | None) -> Path:
    """The folder of a directory that is asked for."""
    if revision is not None:
        raise SwquantError(f"{path} is a directory and has no revision {revision!r}; leave --revision out")
    if subfolder is None:
        return path
    if not (path / subfolder).is_dir():
        raise SwquantError(f"{path} has no folder {subfolder!r}; check --subfolder")
    return path / subfolder


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


def read_config(directory: Path, *, trusted: bool = False) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        directory: Where it is.
        trusted: The user trusts the model's own code: :data:`CODE` stays, and is there if only the tokenizer has any.

    Raises:
        SwquantError: There is none, or it is not a mapping.
    """
    path = directory / CONFIG
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob("*/config.json"))[:8]
        hint = f"give one of {', '.join(inside)}" if inside else "give the directory that save_pretrained wrote"
        if (directory / "adapter_config.json").is_file():
            hint = "it is an adapter: merge it (PeftModel.merge_and_unload()) and give what save_pretrained writes then"
        elif not inside and any(directory.glob("*.gguf")):
            hint = _GGUF
        raise SwquantError(f"{directory} has no config.json; {hint}")
    values = of_the_model(read_json(path))
    if not trusted:
        return without_code(values)
    return {CODE: {}, **values} if names_code(directory) else values


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The method that a ``config.json`` names, and its settings; ``None`` if the model is not quantized."""
    for part in (config, config.get("text_config")):
        found: Mapping[str, Any] = part if isinstance(part, dict) else {}
        settings, of_mlx = found.get("quantization_config"), found.get("quantization")
        if settings is not None or of_mlx is not None:
            values: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
            unnamed = "an unnamed method" if of_mlx is None else "mlx"  # which repeats its settings under both keys
            return str(values.get("quant_method") or unnamed), values
    return None


def already_quantized(directory: Path, method: str, instead: str) -> SwquantError:
    """The refusal of a model that is quantized, by its method's name."""
    return SwquantError(f"{directory} is already quantized, by {shown(method)}; {instead}")


def _refuse_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    found = quantization_of(config)
    if found is not None:
        raise already_quantized(directory, found[0], "give the original model")
