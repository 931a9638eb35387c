"""Activations of a block that a later pass over the same samples takes instead of computing them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swquant.quant.deferred import solid


@dataclass
class Room:
    """Bytes that may still be taken."""

    left: int = 0


@dataclass
class Activations:
    """Values by a linear's name and a batch's range of samples, while there is room.

    A batch of another range is computed, and so is one for which there was no room: what comes out is the same to the
    bit, whatever is kept.

    Attributes:
        room: For these and others.
        params: The block's parameters with which they came out.
    """

    room: Room
    params: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    _values: dict[tuple[str, int, int], Tensor] = field(default_factory=dict[tuple[str, int, int], Tensor])

    @property
    def linears(self) -> set[str]:
        """Of which something is kept."""
        return {linear for linear, _, _ in self._values}

    def start(self, params: Mapping[str, Tensor]) -> None:
        """Forget all; what is kept from now on is of a block with ``params``."""
        self.room.left += sum(map(_bytes, self._values.values()))
        self._values.clear()
        self.params = params

    def put(self, linear: str, batch: slice, value: Tensor) -> None:
        """Keep a copy, since the model's code may go on in the tensor itself."""
        if _bytes(value) <= self.room.left:
            self.room.left -= _bytes(value)
            self._values[linear, batch.start, batch.stop] = value.detach().clone()

    def get(self, linear: str, batch: slice) -> Tensor | None:
        """What is kept; not to be written into."""
        return self._values.get((linear, batch.start, batch.stop))

    def pop(self, linears: Sequence[str], batch: slice) -> dict[str, Tensor] | None:
        """Those of some linears, which are let go; ``None`` if one is not there."""
        keys = {linear: (linear, batch.start, batch.stop) for linear in linears}
        if any(key not in self._values for key in keys.values()):
            return None
        found = {linear: self._values.pop(key) for linear, key in keys.items()}
        self.room.left += sum(map(_bytes, found.values()))
        return found


class Replay:
    """Within ``with``, linears of a block do not multiply where it is known what they put out.

    Attributes:
        batch: The samples that go through the block; to be set before they do.
    """

    def __init__(self, outputs: Activations, block: nn.Module, linears: Sequence[str]) -> None:
        self.batch = slice(0, 0)
        self._outputs = outputs
        self._modules = {linear: block.get_submodule(linear) for linear in linears}
        self._hooks = ExitStack()

    def __enter__(self) -> Replay:
        for linear, module in self._modules.items():
            module.forward = self._forward(linear, module.forward)
            self._hooks.callback(module.__dict__.pop, "forward")
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _forward(self, linear: str, multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            known = self._outputs.get(linear, self.batch)
            if known is not None:
                return known.clone()
            out = multiply(x)
            self._outputs.put(linear, self.batch, out)
            return out

        return forward


def same_values(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    """Whether parameters of a block are as they were."""
    return all(_same(before[name], after[name]) for name in names)


def _same(before: Tensor, after: Tensor) -> bool:
    return before is after or (before.dtype == after.dtype and torch.equal(solid(before), solid(after)))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
