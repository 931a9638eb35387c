"""A quantized checkpoint seen as the plain model that it stands for; tensors are widened when they are read."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored, shown
from swquant.checkpoint.sources.base import Found, Widening
from swquant.checkpoint.values import MOST, finite, require_range, runs, wanted_rows
from swquant.errors import SwquantError

AT_ONCE = 1 << 24
"""Values that are widened together; their float32 copies are what memory holds besides the result."""
_SETTINGS = ("quantization_config", "quantization")


@dataclass(frozen=True)
class Widened:
    """The plain model, tensor by tensor as asked for; made by :func:`widen`. It reads like a :class:`Checkpoint`.

    Attributes:
        inner: The files.
        config: Their configuration without its ``quantization_config``.
        tensors: What the plain model has, by full name in sorted order; ``file`` and ``key`` are those of its codes.
        note: What was widened, in one sentence.
    """

    inner: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    note: str
    widenings: Mapping[str, Widening] = field(repr=False)

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.inner.directory

    @property
    def missing(self) -> Mapping[str, Path]:
        """See :attr:`Checkpoint.missing`."""
        return self.inner.missing

    @property
    def tensor_bytes(self) -> int:
        """Size of the files' tensors: what was there before, not what it is widened to."""
        return self.inner.tensor_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes of the plain model have."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            if stored.dtype.is_floating_point:
                sizes[stored.dtype] += stored.nbytes
        return sizes.most_common(1)[0][0]

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU.

        Raises:
            SwquantError: As :meth:`Checkpoint.read`.
        """
        stored = self._stored(name)
        if name not in self.widenings:
            return self.inner.read(stored.key)
        return self.part(name, 0, stored.shape[0])

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``, reading no more than that and its scales.

        Raises:
            SwquantError: As :meth:`Checkpoint.part`.
            ValueError: Likewise.
        """
        stored = self._stored(name)
        if name not in self.widenings:
            return self.inner.part(stored.key, start, stop)
        require_range(stored.shape, 0, start, stop)
        return self._checked(name, start, stop, math.inf)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]`` of a matrix, reading no other rows; each row is read once.

        Raises:
            SwquantError: As :meth:`Checkpoint.rows`.
            ValueError: Likewise.
        """
        stored = self._stored(name)
        if name not in self.widenings:
            return self.inner.rows(stored.key, indices)
        wanted, places = wanted_rows(name, stored, indices)
        parts = [self.part(name, start, stop) for start, stop in runs(wanted.tolist())]
        return torch.cat(parts or [self.part(name, 0, 0)])[places]

    def require_finite(self, quantized: Iterable[str] = ()) -> None:
        """Look at every value once as it is when widened; memory holds no more than a few rows or an expert of them.

        Raises:
            SwquantError: As :meth:`Checkpoint.require_finite`.
        """
        limited = frozenset(quantized)
        for name, stored in self.tensors.items():
            most = MOST if name in limited else math.inf
            if name not in self.widenings:
                replace(self.inner, tensors={name: stored}).require_finite(limited)
                continue
            step = self._step(stored)
            for start in range(0, stored.shape[0], step):
                self._checked(name, start, min(start + step, stored.shape[0]), most)

    def prefixed(self, prefix: str, expected: str, kept: str) -> Widened:
        """As :meth:`Checkpoint.prefixed`."""
        return self._named(replace(self.inner, tensors=self.tensors).prefixed(prefix, expected, kept).tensors)

    def renamed(self, old: str, new: str) -> Widened:
        """As :meth:`Checkpoint.renamed`."""
        return self._named(replace(self.inner, tensors=self.tensors).renamed(old, new).tensors)

    def _named(self, named: Mapping[str, Stored]) -> Widened:
        """This source with its tensors under other names."""
        if named.keys() == self.tensors.keys():
            return self
        old = {(stored.file, stored.key): name for name, stored in self.tensors.items()}
        found = {name: old[stored.file, stored.key] for name, stored in named.items()}
        made = {name: self.widenings[was] for name, was in found.items() if was in self.widenings}
        return replace(self, tensors=named, widenings=made)

    def sidecars(self) -> tuple[Path, ...]:
        """The files that belong beside the weights.

        Raises:
            SwquantError: As :meth:`Checkpoint.sidecars`.
        """
        return self.inner.sidecars()

    def fingerprint(self) -> str:
        """SHA-256 over the files' fingerprint, and that they were widened."""
        return hashlib.sha256(f"{self.inner.fingerprint()} widened".encode()).hexdigest()

    def _checked(self, name: str, start: int, stop: int, most: float) -> Tensor:
        stored, widening = self.tensors[name], self.widenings[name]
        out = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
        step = self._step(stored)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = finite(widening.rows(self.inner, first, last), stored, most)
        return out

    def _step(self, stored: Stored) -> int:
        return max(1, AT_ONCE // math.prod(stored.shape[1:]))

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise SwquantError(f"{self.directory} has no tensor {shown(name)}; check that it is a whole checkpoint")
        return self.tensors[name]


def widen(files: Checkpoint, found: Found) -> Widened:
    """See ``files`` as the plain model; no weight is read.

    Args:
        files: A quantized checkpoint, opened as it is stored.
        found: What its method makes of it.
    """
    plain = {name: stored for name, stored in files.tensors.items() if name not in found.used}
    tensors = plain | {name: stored for name, (stored, _) in found.widened.items()}
    made = {name: widening for name, (_, widening) in found.widened.items()}
    return Widened(files, _without_settings(files.config), dict(sorted(tensors.items())), found.note, made)


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _SETTINGS}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text.items() if key not in _SETTINGS}
    return kept
