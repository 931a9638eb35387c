"""A checkpoint seen under the names and shapes that the model has in memory; and the way back to those on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from swquant.checkpoint.names import Mixed, Names, Piece
from swquant.checkpoint.shards import Stored, shown
from swquant.checkpoint.source import Source
from swquant.errors import SwquantError


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """``inner`` as the model in memory calls it; tensors are read one by one, experts too.

    Attributes:
        inner: The checkpoint under its names on disk.
        names: Which is which.
        config: Its configuration, as an output has it.
    """

    inner: Source
    names: Names = field(repr=False)
    config: Mapping[str, Any]
    _last: dict[int, dict[str, Tensor]] = field(
        default_factory=dict[int, "dict[str, Tensor]"], repr=False, compare=False
    )

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.inner.directory

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes have."""
        return self.inner.dtype

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors."""
        return self.inner.tensor_bytes

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """The model's tensors by their names in memory, in that shape; a slice counts its own bytes."""
        return self._tensors

    @cached_property
    def _tensors(self) -> dict[str, Stored]:
        out = {name: _seen(self.inner.tensors[piece.key], piece) for name, piece in self.names.pieces.items()}
        for mixed in self.names.mixed:
            first = self.inner.tensors[mixed.keys[0]]
            for name in (*(mixed.targets if not mixed.stacked else ()), *mixed.stacked):
                out[name] = _shaped(first, mixed.shape_of(name))
        return out

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        return name in self.names.pieces or self.names.mixture(name) is not None

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in its stored dtype.

        Raises:
            SwquantError: There is none, its file cannot be read, or a value is NaN or infinite.
        """
        piece = self.names.pieces.get(name)
        if piece is not None:
            return piece.read(self.inner)
        mixed = self.names.mixture(name)
        if mixed is None:
            raise SwquantError(f"{self.directory} has no tensor {shown(name)}; check that it is a whole checkpoint")
        found = self._made(mixed)
        if name in mixed.stacked:
            target, piece = mixed.stacked[name]
            value = found[target] if piece.index is None else found[target][piece.index]
            return value.T.contiguous() if piece.transposed else value.clone()
        return found[name].clone()

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``."""
        piece = self.names.pieces.get(name)
        if piece is not None and piece.whole:
            return self.inner.part(piece.key, start, stop)
        return self.read(name)[start:stop]

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]`` of a matrix."""
        piece = self.names.pieces.get(name)
        if piece is not None and piece.whole:
            return self.inner.rows(piece.key, indices)
        return self.read(name)[indices]

    def require_finite(self, quantized: Iterable[str] = ()) -> None:
        """Look at every value once; see :meth:`Source.require_finite`."""
        self.inner.require_finite(self.names.keys_of(quantized))

    def sidecars(self) -> tuple[Path, ...]:
        """The files that belong with the weights."""
        return self.inner.sidecars()

    def fingerprint(self) -> str:
        """SHA-256 of what is read."""
        return self.inner.fingerprint()

    def _made(self, mixed: Mixed) -> dict[str, Tensor]:
        """All that a rule makes; kept until another rule's is asked for, because a block reads them one by one."""
        if id(mixed) not in self._last:
            self._last.clear()
            self._last[id(mixed)] = mixed.read(self.inner)
        return self._last[id(mixed)]


def _seen(stored: Stored, piece: Piece) -> Stored:
    return stored if piece.whole else _shaped(stored, piece.shape_of(stored.shape))


def _shaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    count = 1
    for size in shape:
        count *= size
    return replace(stored, shape=shape, nbytes=count * stored.dtype.itemsize)


Value = TypeVar("Value")


@dataclass(frozen=True)
class Stack:
    """A tensor on disk that is put together from several in memory.

    Attributes:
        values: Its slices along the first dimension, or the only value where it lies there transposed.
        transposed: Each lies there transposed.
        stacked: Whether there is such a dimension.
    """

    values: tuple[Any, ...]
    transposed: bool
    stacked: bool

    def assemble(self, slices: Iterable[Tensor]) -> Tensor:
        """The tensor on disk, given its slices as tensors in memory."""
        parts = [value.T if self.transposed else value for value in slices]
        return torch.stack(parts) if self.stacked else parts[0].contiguous()


@dataclass(frozen=True)
class Blend:
    """Tensors on disk that a rule of transformers makes of several in memory.

    Attributes:
        values: By name in memory.
        mixed: The rule.
    """

    values: Mapping[str, Any]
    mixed: Mixed

    def assemble(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk by name, given the values as tensors."""
        whole = dict(tensors)
        for target in self.mixed.targets:
            slices = [name for name, (of, _) in self.mixed.stacked.items() if of == target]
            if slices:
                turned = [self.mixed.stacked[name][1].transposed for name in slices]
                parts = [whole.pop(name) for name in slices]
                whole[target] = torch.stack(
                    [part.T if turn else part for part, turn in zip(parts, turned, strict=True)]
                )
        return self.mixed.revert(whole)


def to_disk(names: Names, part: Mapping[str, Value]) -> Iterator[tuple[str, Value | Stack | Blend]]:
    """Names on disk for what has names in memory; slices of one tensor must come together.

    Args:
        names: Which is which.
        part: Tensors, quantized weights or anything else, by name in memory.

    Returns:
        Pairs of a name on disk and the value itself, or what it is to be put together from. The name of a
        :class:`Blend` is that of its first tensor.
    """
    stacks: dict[str, dict[int, tuple[Value, Piece]]] = {}
    blends: dict[int, tuple[Mixed, dict[str, Value]]] = {}
    for name, value in part.items():
        piece = names.pieces.get(name)
        if piece is None:
            mixed = names.mixture(name)
            assert mixed is not None
            blends.setdefault(id(mixed), (mixed, {}))[1][name] = value
        elif piece.whole:
            yield piece.key, value
        else:
            stacks.setdefault(piece.key, {})[piece.index or 0] = value, piece
    for key, found in stacks.items():
        slices = [found[index] for index in range(len(found))]
        one = slices[0][1]
        yield key, Stack(tuple(value for value, _ in slices), one.transposed, one.index is not None)
    for mixed, values in blends.values():
        yield mixed.keys[0], Blend(values, mixed)


def to_memory(names: Names, parts: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Names in memory for what has names on disk: the way back from :func:`to_disk`, lazily.

    Args:
        names: Which is which.
        parts: Tensors, or quantized weights, by name on disk. What a rule of transformers puts together, or what is a
            slice of a tensor, has to be a tensor.

    Returns:
        Pairs of a name in memory and the value; what the model does not have is passed over.
    """
    places: dict[str, list[tuple[str, Piece]]] = {}
    for name, piece in names.pieces.items():
        places.setdefault(piece.key, []).append((name, piece))
    rules = {key: mixed for mixed in names.mixed for key in mixed.keys}
    waiting: dict[int, dict[str, Tensor]] = {}
    for key, value in ((key, value) for part in parts for key, value in part.items()):
        for name, piece in places.get(key, ()):
            yield name, value if piece.whole else _taken(piece, _dense(value))
        mixed = rules.get(key)
        if mixed is None:
            continue
        found = waiting.setdefault(id(mixed), {})
        found[key] = _dense(value)
        if len(found) == len(mixed.keys):
            made = mixed.convert(waiting.pop(id(mixed)))
            yield from ((name, made[name]) for name in made)
            yield from ((name, _taken(piece, made[target])) for name, (target, piece) in mixed.stacked.items())


def _dense(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.dequantize()


def _taken(piece: Piece, value: Tensor) -> Tensor:
    """The piece of a tensor on disk that is in memory."""
    part = value if piece.index is None else value[piece.index]
    return part.T.contiguous() if piece.transposed else part
