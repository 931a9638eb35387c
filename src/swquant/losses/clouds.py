"""Outputs as clouds of points."""

from __future__ import annotations

from torch import Tensor

from swquant.errors import SwquantError


def check_least(name: str, key: str, value: int) -> None:
    """Refuse a count below 1."""
    if value < 1:
        raise SwquantError(f"{key} of {name} must be at least 1, got {value}")


def as_points(outputs: Tensor, name: str, block: int = 1) -> Tensor:
    """Flatten to [points, width], ``block`` consecutive tokens to a point; ``name`` is the loss that asks."""
    if outputs.dim() not in (2, 3) or outputs.numel() == 0:
        raise SwquantError(
            f"{name} compares tensors [points, dim] or [sequences, tokens, dim] that are not empty, "
            f"got {list(outputs.shape)}"
        )
    tokens, dim = outputs.shape[-2:]
    if tokens % block:
        raise SwquantError(f"block {block} of {name} must divide the {tokens} tokens of a sequence: choose a divisor")
    return outputs.reshape(-1, block * dim)
