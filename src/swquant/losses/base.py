"""What a loss is: a scalar from the outputs of a block and of its quantized version."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from swquant.errors import SwquantError


@dataclass(frozen=True)
class LossContext:
    """What a loss may draw on beside its two inputs.

    Attributes:
        rng: where random directions come from; on the CPU (the same directions on every device) or on the device of
            the inputs (nothing to copy). A call advances it.
        kept: what losses keep from one call to the next in a training, by loss; each target that a block is compared
            with has its own. Values are replaced and never changed in place, so that a shallow copy is the state of
            that moment.
    """

    rng: torch.Generator
    kept: dict[Any, Any] = field(default_factory=dict[Any, Any])


class Loss(Protocol):
    """A frozen dataclass whose fields are the loss's parameters; its file's name is its name in expressions."""

    @property
    def separable(self) -> bool:
        """Whether the mean of its values over equal shards of the samples is its value over all of them."""
        ...

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the loss of ``pred`` against ``target``.

        Args:
            pred: output of the quantized block, [samples, tokens, dim], floating point of any width.
            target: output of the original block, of the same shape.
            ctx: the generator for losses that draw random numbers.

        Returns:
            A scalar computed in float32, autocast or not (in float64 where an input is float64).

        Raises:
            SwquantError: the shapes differ, or do not suit the loss's parameters.
        """
        ...


def full_precision(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both inputs in float32, or in float64 where one of them is; refuse inputs of different shapes."""
    if pred.shape != target.shape:
        raise SwquantError(
            f"a loss compares tensors of one shape, got {list(pred.shape)} and {list(target.shape)}: "
            "pass the outputs of both blocks for the same samples"
        )
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.to(dtype), target.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves float32 operations on ``device`` alone."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
