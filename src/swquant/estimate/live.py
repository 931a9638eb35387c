"""Bytes of tensors that are alive, in a run of code on tensors without values."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from swquant.engine.alive import Alive

_ATEN = torch.ops.aten


class Live(Alive):
    """Counts tensors without values.

    Values that code asks for are made up: numbers are 1, comparisons false, tensors equal.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what is new in its result."""
        if func is _ATEN._local_scalar_dense.default:
            return _made_up(args[0].dtype)
        if func is _ATEN.equal.default:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


def _made_up(dtype: torch.dtype) -> bool | int | float:
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def without_values() -> Generator[Live]:
    """Tensors made within have shapes and no values, and are counted."""
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        yield live
