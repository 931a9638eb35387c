"""Files that are whole or absent whatever happens, and their checksums."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swquant.checkpoint.writer import sync_directory

CHUNK = 1 << 24
"""Bytes that one thread takes through CRC-32 at a time."""


def checksum_of(path: Path) -> int:
    """CRC-32 of the CRC-32s of a file's chunks, which threads find side by side.

    Raises:
        OSError: The file cannot be read.
    """
    starts = range(0, path.stat().st_size, CHUNK)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(partial(_chunk_checksum, path), starts))
    return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors so that ``path`` is whole or absent; returns the file's checksum.

    Raises:
        OSError: The disk is full or fails.
    """
    part = path.with_suffix(".part")
    try:
        save_file(dict(tensors), part)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    checksum = checksum_of(part)
    flush(part)
    part.replace(path)
    return checksum


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` in the place of the file ``path`` in one step, and flush it and the directory."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_directory(path.parent)


def flush(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that the disk really has: a mapping of it can be written to without a bus error.

    Raises:
        OSError: There is no room for it.
    """
    with path.open("wb") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise OSError(error.errno, error.strerror, str(path)) from error


def _chunk_checksum(path: Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(CHUNK))
