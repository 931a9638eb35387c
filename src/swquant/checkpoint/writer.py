"""Checkpoints on their way out: safetensors shards written part by part, published in one step."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swquant.checkpoint.own_code import CODE, without_code
from swquant.checkpoint.shards import read_json
from swquant.checkpoint.sidecars import TEMPLATES
from swquant.errors import SwquantError
from swquant.places import destination, in_use, require_unused

SHARD_BYTES = 16 << 20
"""Parts are merged into one shard up to this size; a larger part is a shard of its own."""


@dataclass(frozen=True)
class Written:
    """What a checkpoint came to.

    Attributes:
        shards: Names of the safetensors files, in order.
        tensor_bytes: Size of all tensors.
    """

    shards: tuple[str, ...]
    tensor_bytes: int


def write_checkpoint(
    directory: Path,
    parts: Iterable[Mapping[str, Tensor]],
    *,
    config: Mapping[str, object],
    sidecars: Iterable[Path] = (),
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Written:
    """Write a checkpoint in the layout of ``save_pretrained`` and flush it to the disk.

    Parts are taken one by one, so memory holds at most one part and :data:`SHARD_BYTES` of those before it. Files are
    ``model.safetensors``, or ``model-0000k-of-0000n.safetensors`` and their index, and ``config.json``; a file that is
    written here replaces a sidecar of its name. Equal arguments give equal bytes.

    Args:
        directory: An empty directory, or one to be made; usually a staging place for :func:`publish`.
        parts: Tensors by full name, e.g. a mapping per block; no name may come twice.
        config: The content of ``config.json``.
        sidecars: Files to copy, e.g. the tokenizer's; symbolic links are followed.
        extra_files: Further files by name.

    Raises:
        SwquantError: ``directory`` is in use.
        ValueError: A tensor comes twice, or none comes at all.
        OSError: The disk is full or fails.
    """
    require_unused(directory)
    directory.mkdir(parents=True, exist_ok=True)
    copy_sidecars(directory, sidecars)
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    for shard in _shards(parts, SHARD_BYTES):
        file = _unnumbered(len(sizes))
        _write_shard(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        shard.clear()
    if not sizes:
        raise ValueError("a checkpoint needs at least one tensor")
    final = {_unnumbered(index): _numbered(index, len(sizes)) for index in range(len(sizes))}
    for old, new in final.items():
        (directory / old).rename(directory / new)
    if len(sizes) > 1:
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: final[file] for name, file in sorted(weight_map.items())},
        }
        _write_file(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_beside(directory, config, extra_files or {})
    return Written(tuple(final.values()), sum(sizes))


def copy_sidecars(directory: Path, sidecars: Iterable[Path]) -> None:
    """Copy files into ``directory`` and flush them; symbolic links are followed.

    Settings that name code lose its name, unless code is among the files.
    """
    sidecars = tuple(sidecars)
    code = any(source.suffix == ".py" for source in sidecars)
    for source in sidecars:
        place = directory / TEMPLATES if source.parent.name == TEMPLATES else directory
        place.mkdir(exist_ok=True)
        if not code and source.suffix == ".json" and (settings := _naming_code(source)) is not None:
            _write_file(place / source.name, json.dumps(without_code(settings), indent=2, ensure_ascii=False) + "\n")
        else:
            shutil.copyfile(source, place / source.name)
            _sync(place / source.name)


def _naming_code(path: Path) -> dict[str, Any] | None:
    """The content of settings that name code, or nothing; a vocabulary is no such settings and may be large."""
    if path.name.startswith(("tokenizer.json", "vocab")) or f'"{CODE}"'.encode() not in path.read_bytes():
        return None
    try:
        settings = read_json(path)
    except SwquantError:  # whatever it is, nobody reads it
        return None
    return settings if CODE in settings else None


def write_beside(directory: Path, config: Mapping[str, object], extra_files: Mapping[str, str | bytes]) -> None:
    """Write ``extra_files`` by name and ``config.json``, flush them, and at last the directory."""
    for name, content in extra_files.items():
        _write_file(directory / name, content)
    _write_file(directory / "config.json", json.dumps(config, indent=2) + "\n")
    sync_directory(directory)


def publish(staging: Path, out: Path) -> None:
    """Move the finished directory ``staging`` to ``out`` in one step: ``out`` appears whole or not at all.

    Args:
        staging: A complete directory on the same file system.
        out: Must not exist, or be an empty directory; its parents are made.

    Raises:
        SwquantError: ``out`` is in use, or on another file system.
    """
    require_unused(out)
    target = destination(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise in_use(out, "it was filled in the meantime") from error
        if error.errno == errno.EXDEV:
            raise SwquantError(
                f"{staging} and {out} are on different file systems; choose an --out beside it"
            ) from error
        raise
    sync_directory(target.parent)


def _shards(parts: Iterable[Mapping[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Merge consecutive parts while they fit in ``limit`` bytes together."""
    pending: dict[str, Tensor] = {}
    pending_bytes = 0
    seen: set[str] = set()
    for part in parts:
        twice = seen.intersection(part)
        if twice:
            raise ValueError(f"the tensor {min(twice)!r} came twice")
        seen.update(part)
        part_bytes = sum(tensor.nbytes for tensor in part.values())
        if pending and pending_bytes + part_bytes > limit:
            yield pending
            pending, pending_bytes = {}, 0
        pending.update(part)
        pending_bytes += part_bytes
        del part  # so that its tensors go with the shard, not when the next part replaces it
        if pending_bytes >= limit:
            yield pending
            pending, pending_bytes = {}, 0
    if pending:
        yield pending


def _unnumbered(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _numbered(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: _whole(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    _sync(path)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with memory of its own: safetensors refuses views of a common storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_file(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk; Windows has no handle to a directory that could be flushed."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
