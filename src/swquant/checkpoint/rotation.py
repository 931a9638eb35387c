"""A checkpoint seen through a rotation: the weights of an equivalent model whose outliers are spread over all channels.

With an orthogonal ``R`` an RMS norm without its weight commutes: ``norm(h R) = norm(h) R``. So with every norm's weight
``g`` folded into the linears after it, the residual stream ``h`` can become ``h R`` without a change of the model's
function (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456): where ``W [out, in]`` reads the stream it becomes
``W diag(g) R``, where it writes the stream ``R' W``, and biases follow the outputs. Likewise the values of each head
become ``v H``: rows of the value projection ``H' W_v``, columns of the output projection ``W_o H``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.shards import Stored
from swquant.checkpoint.source import Source
from swquant.checkpoint.values import require_range
from swquant.errors import SwquantError
from swquant.families import Family
from swquant.families.base import NormLinears, ValueOutput
from swquant.quant.hadamard_transform import Transform, random_rotation
from swquant.seeds import generator

CHUNK_ROWS = 4096
"""Rows of the embedding and the head that are in memory in float64 at once."""


@dataclass(frozen=True)
class _Change:
    """One tensor's new value ``left' W diag(fold) right``; a bias counts as ``[out, 1]``.

    Attributes:
        source: The tensor ``W`` of the original.
        fold: The norm whose weight it takes in.
        left: Orthogonal, of order ``k``, applied to each ``k`` consecutive rows.
        right: Likewise to each ``k`` consecutive columns.
    """

    source: str
    fold: str | None = None
    left: Transform | None = None
    right: Transform | None = None


@dataclass(frozen=True)
class RotatedCheckpoint:
    """The rotated model, tensor by tensor as asked for; made by :func:`rotate`. It is a :class:`Source`.

    What the rotation changes is computed in float64 and returned in float32, norm weights that were folded are 1, all
    else is as stored. The output keeps the dtypes in ``tensors``, to which :func:`stored` rounds.

    Attributes:
        inner: The original.
        config: Its configuration, with untied embeddings.
        tensors: Its tensors, with the head's own if the embeddings were tied.
        seed: The seed of both rotations.
        stream: ``R``, of order ``dim``.
        heads: ``H``, of order ``head_dim``.
    """

    inner: Source
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    seed: int
    stream: Transform = field(repr=False, compare=False)
    heads: Transform = field(repr=False, compare=False)
    changes: Mapping[str, _Change] = field(repr=False, compare=False)
    folded: frozenset[str] = field(repr=False)

    @property
    def directory(self) -> Path:
        """Where the original is."""
        return self.inner.directory

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes of the original have."""
        return self.inner.dtype

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors as they would be stored."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU.

        Raises:
            SwquantError: As :meth:`Source.read`.
        """
        if name in self.folded:
            return torch.ones(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        change = self.changes.get(name)
        if change is None:
            return self.inner.read(name)
        if change.left is not None:
            return self._apply(change, self.inner.read(change.source)).float()
        count, width = self.tensors[name].shape
        out = torch.empty(count, width)
        for rows in torch.arange(count).split(CHUNK_ROWS):
            out[rows] = self.rows(name, rows)
        return out

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]`` of a matrix; no other rows are read unless the rotation mixes rows.

        Raises:
            SwquantError: As :meth:`Source.rows`.
            ValueError: Likewise.
        """
        change = self.changes.get(name)
        if change is None:
            return self.inner.rows(name, indices)
        if change.left is not None:
            return self.read(name)[indices]
        return self._apply(change, self.inner.rows(change.source, indices)).float()

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``; what the rotation does not change is read no further than that.

        Raises:
            SwquantError: As :meth:`Checkpoint.part`.
            ValueError: Likewise.
        """
        if name in self.folded or name in self.changes:
            require_range(self.tensors[name].shape, 0, start, stop)
            return self.read(name)[start:stop]
        return self.inner.part(name, start, stop)

    def require_finite(self, quantized: Iterable[str] = ()) -> None:
        """Look at every value of the original once.

        Raises:
            SwquantError: As :meth:`Source.require_finite`.
        """
        self.inner.require_finite(quantized)

    def sidecars(self) -> tuple[Path, ...]:
        """The original's files that belong beside the weights.

        Raises:
            SwquantError: As :meth:`Source.sidecars`.
        """
        return self.inner.sidecars()

    def fingerprint(self) -> str:
        """SHA-256 over the original's fingerprint and the seed."""
        return hashlib.sha256(f"{self.inner.fingerprint()} rotated by {self.seed}".encode()).hexdigest()

    def _apply(self, change: _Change, original: Tensor) -> Tensor:
        """Rows of the original, or a bias, changed; float64 of the same shape."""
        out = original.double().view(len(original), -1)
        if change.fold is not None:
            out = out * self.inner.read(change.fold).double()
        if change.right is not None:
            out = _transformed(out, change.right)
        if change.left is not None:
            out = _transformed(out.T, change.left).T
        return out.reshape(original.shape).contiguous()


def _transformed(matrix: Tensor, transform: Transform) -> Tensor:
    """``transform`` applied to as many consecutive columns at a time as it has; some rows at a time, a new tensor."""
    order = len(transform.signs)
    out = torch.empty(matrix.shape, dtype=matrix.dtype)
    for start in range(0, len(matrix), CHUNK_ROWS):
        rows = matrix[start : start + CHUNK_ROWS]
        out[start : start + CHUNK_ROWS] = transform.forward(rows.reshape(-1, order)).view(rows.shape)
    return out


def rotate(inner: Source, family: Family, tied: bool, seed: int) -> RotatedCheckpoint:
    """See ``inner`` through a rotation of the residual stream and of each head's values; no weight is read.

    Args:
        inner: The original.
        family: Its family, one with ``writers``.
        tied: Its head is its embedding.
        seed: Of the random signs.

    Raises:
        SwquantError: ``config.json`` does not fit the tensors.
    """
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    tensors = dict(inner.tensors)
    stream = random_rotation(_columns(inner, embedding), generator(seed, "rotation", "stream"))
    heads = random_rotation(_head_size(inner, family), generator(seed, "rotation", "heads"))
    if tied:
        tensors[head] = inner.tensors[embedding]
    folded = {f"{name}.weight" for name in family.tail}
    changes = {
        embedding: _Change(embedding, right=stream),
        head: _Change(embedding if tied else head, f"{family.tail[-1]}.weight", right=stream),
    }
    inside = f"{family.blocks}."
    for prefix in {
        inside + name.removeprefix(inside).partition(".")[0] for name in inner.tensors if name.startswith(inside)
    }:
        changes |= _block_changes(prefix, family, stream, heads)
        folded |= {f"{prefix}.{pair.norm}.weight" for pair in family.equivalences if isinstance(pair, NormLinears)}
    config = {**inner.config, "tie_word_embeddings": False}
    tensors = dict(sorted(tensors.items()))
    return RotatedCheckpoint(inner, config, tensors, seed, stream, heads, changes, frozenset(folded))


def _block_changes(prefix: str, family: Family, stream: Transform, heads: Transform) -> dict[str, _Change]:
    """Changes of a block's linears, and of such biases as they may have, by full name."""
    weights: dict[str, _Change] = {}
    for pair in family.equivalences:
        if isinstance(pair, NormLinears):
            norm = f"{prefix}.{pair.norm}.weight"
            weights |= {linear: _Change(f"{prefix}.{linear}.weight", norm, right=stream) for linear in pair.linears}
    weights |= {linear: _Change(f"{prefix}.{linear}.weight", left=stream) for linear in family.writers}
    for pair in family.equivalences:
        if isinstance(pair, ValueOutput):
            weights[pair.value] = replace(weights[pair.value], left=heads)
            weights[pair.output] = replace(weights[pair.output], right=heads)
    biases = {
        f"{prefix}.{linear}.bias": _Change(f"{prefix}.{linear}.bias", left=change.left)
        for linear, change in weights.items()
        if change.left is not None
    }
    return biases | {change.source: change for change in weights.values()}


def _head_size(inner: Source, family: Family) -> int:
    """Channels of one attention head."""
    output = next(pair.output for pair in family.equivalences if isinstance(pair, ValueOutput))
    name = f"{family.blocks}.0.{output}.weight"
    columns = _columns(inner, name)
    count = inner.config.get("num_attention_heads")
    if not isinstance(count, int) or count < 1 or columns % count:
        raise SwquantError(
            f"{inner.directory / 'config.json'} sets num_attention_heads to {count!r}, "
            f"which does not divide the {columns} columns of {name}"
        )
    return columns // count


def _columns(inner: Source, name: str) -> int:
    if name not in inner.tensors:
        raise SwquantError(f"{inner.directory} has no tensor {name!r}; check that it is a whole checkpoint")
    shape = inner.tensors[name].shape
    if len(shape) != 2:
        raise SwquantError(f"{name} in {inner.directory} has the shape {list(shape)}, expected a matrix")
    return shape[1]
