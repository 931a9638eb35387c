"""GGUF files on their way in: the header, checked against the file's size before anything is read, and tensors.

A file may come from a stranger. Whatever a header counts is compared with the bytes that are left, values that nobody
needs are skipped, and nothing is allocated by a number that stands in the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.formats.gguf_blocks import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PLAIN_TYPES: Mapping[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types without blocks, by number."""

_SCALARS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_LONGEST_TEXT = 1 << 16
_LARGEST_ALIGNMENT = 1 << 16

Scalar = int | float | bool | str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        type_id: Number of its type.
        shape: Rows and columns, or one size.
        offset: Its first byte in the file.
        nbytes: Its size there.
    """

    type_id: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A file whose header has been checked.

    Attributes:
        path: The file.
        fields: Its metadata, without lists and without long texts.
        tensors: Its tensors by name, in the file's order.
    """

    path: Path
    fields: Mapping[str, Scalar]
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """A tensor in its dtype, or ``uint8 [rows, bytes]`` if it is in blocks.

        Raises:
            SwquantError: It cannot be read, or holds NaN or infinite values.
        """
        stored = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                file.seek(stored.offset)
                content = bytearray(file.read(stored.nbytes))
        except OSError as error:
            raise SwquantError(f"{self.path} cannot be read ({error.strerror or error})") from error
        if len(content) != stored.nbytes:
            raise _damaged(self.path, f"{name!r:.80} ends early")
        packed = torch.frombuffer(content, dtype=torch.uint8)
        if stored.type_id not in PLAIN_TYPES:
            return packed.view(stored.shape[0], -1)
        tensor = packed.view(PLAIN_TYPES[stored.type_id]).view(stored.shape)
        if not bool(tensor.isfinite().all()):
            raise SwquantError(f"{name!r:.80} in {self.path} holds NaN or infinite values; write it again")
        return tensor


def open_gguf(path: Path) -> Header:
    """Read a file's header.

    Raises:
        SwquantError: It is damaged, or holds a tensor of a type that swquant does not read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < len(MAGIC):
                raise _damaged(path, "it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _parse(path, content)
    except OSError as error:
        raise SwquantError(f"{path} cannot be read ({error.strerror or error})") from error


class _Cursor:
    """A place in the file's bytes that moves on as values are taken."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.place = path, content, 0

    def left(self) -> int:
        return len(self.content) - self.place

    def skip(self, count: int) -> None:
        if count > self.left():
            raise _damaged(self.path, "its header ends early")
        self.place += count

    def number(self, form: str) -> int | float | bool:
        start = self.place
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.content, start)[0]

    def count(self, form: str, least: int) -> int:
        """A number of things of at least ``least`` bytes each, so no more than the rest of the file has room for."""
        value = int(self.number(form))
        if value * least > self.left():
            raise _damaged(self.path, f"its header counts {value} of something where {self.left()} bytes are left")
        return value

    def text(self) -> str | None:
        """A text; ``None`` if it is longer than any that is needed."""
        length = self.count("<Q", 1)
        start = self.place
        self.skip(length)
        if length > _LONGEST_TEXT:
            return None
        try:
            return self.content[start : self.place].decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, "a text in its header is not UTF-8") from error

    def name(self) -> str:
        text = self.text()
        if not text:
            raise _damaged(self.path, "a name in its header is empty or too long")
        return text

    def value(self) -> Scalar | None:
        """A value of metadata; ``None`` for a list or a long text, which are passed over."""
        kind = int(self.number("<I"))
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _damaged(self.path, f"its header has a value of kind {kind}")
        inner = int(self.number("<I"))
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            self.skip(self.count("<Q", size) * size)
        elif inner == _STRING:
            for _ in range(self.count("<Q", 8)):
                self.skip(self.count("<Q", 1))
        else:
            raise _damaged(self.path, f"its header has a list of kind {inner}")
        return None


def _parse(path: Path, content: mmap.mmap) -> Header:
    cursor = _Cursor(path, content)
    if content[:4] != MAGIC:
        raise _damaged(path, "it does not begin with GGUF")
    cursor.skip(4)
    version = int(cursor.number("<I"))
    if version not in VERSIONS:
        raise SwquantError(f"{path} is GGUF of version {version}, expected {' or '.join(map(str, VERSIONS))}")
    tensor_count, field_count = cursor.count("<Q", 32), cursor.count("<Q", 13)
    fields: dict[str, Scalar] = {}
    for _ in range(field_count):
        name, value = cursor.name(), cursor.value()
        if value is not None:
            fields[name] = value
    infos = [(cursor.name(), *_info(cursor)) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT:
        raise _damaged(path, f"its alignment is {alignment!r:.40}")
    start = -(-cursor.place // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, type_id, offset in infos:
        if name in tensors:
            raise _damaged(path, f"it holds {name!r:.80} twice")
        tensors[name] = _placed(path, name, shape, type_id, start + offset, len(content))
    return Header(path, fields, tensors)


def _info(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    """A tensor's shape, rows first, its type and its offset."""
    dims = int(cursor.number("<I"))
    if not 1 <= dims <= 2:
        raise _damaged(cursor.path, f"it holds a tensor of {dims} dimensions, expected 1 or 2")
    shape = tuple(int(cursor.number("<Q")) for _ in range(dims))[::-1]
    return shape, int(cursor.number("<I")), int(cursor.number("<Q"))


def _placed(path: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int, size: int) -> StoredTensor:
    """The tensor, if it lies in the file."""
    if type_id in PLAIN_TYPES:
        nbytes = math.prod(shape) * PLAIN_TYPES[type_id].itemsize
    elif type_id in BLOCK_TYPES and len(shape) == 2 and shape[1] % BLOCK_TYPES[type_id].weights == 0:
        nbytes = shape[0] * BLOCK_TYPES[type_id].row_bytes(shape[1])
    else:
        known = ", ".join(("F32", "F16", "BF16", *(kind.name for kind in BLOCK_TYPES.values())))
        raise SwquantError(
            f"{name!r:.80} in {path} has the type number {type_id} and the shape {list(shape)}, "
            f"which swquant does not read, expected {known}"
        )
    if nbytes == 0 or offset + nbytes > size:
        raise _damaged(path, f"{name!r:.80} of {nbytes} bytes does not lie in it")
    return StoredTensor(type_id, shape, offset, nbytes)


def _damaged(path: Path, why: str) -> SwquantError:
    return SwquantError(f"{path} is damaged or no GGUF file: {why}; write it again")
