"""Bytes of tensors that are alive, in a run of code on tensors without values."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten


class Live(TorchDispatchMode):
    """Counts the storage of every tensor from its making until it is let go of.

    Values that code asks for are made up: numbers are 1, comparisons false, tensors equal.

    Attributes:
        now: Bytes alive.
        peak: The most so far, since :meth:`mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def mark(self) -> None:
        """Begin to look for a peak anew."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what is new in its result."""
        if func is _ATEN._local_scalar_dense.default:
            return _made_up(args[0].dtype)
        if func is _ATEN.equal.default:
            return True
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _made_up(dtype: torch.dtype) -> bool | int | float:
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def without_values() -> Generator[Live]:
    """Tensors made within have shapes and no values, and are counted."""
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        yield live
