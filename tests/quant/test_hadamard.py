"""Hadamard matrices and random rotations: orthogonal, of two values, and repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swquant.quant.hadamard import hadamard, has_hadamard
from swquant.quant.hadamard_transform import random_rotation

PALEY = (12, 20, 24, 28, 36, 40, 44, 52, 60, 68, 72, 76, 80, 84, 88, 96, 100, 104, 108, 112, 124, 152, 244, 344)
HIDDEN = (576, 896, 960, 1152, 1536, 2048, 2560, 3072, 3200, 3584, 4096, 5120, 5376, 6656, 7168, 8192)
UNKNOWN = (3, 5, 6, 14, 18, 92, 116, 172, 184)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix_of(n: int, seed: int) -> torch.Tensor:
    return random_rotation(n, rng(seed)).forward(torch.eye(n, dtype=torch.float64))


def off(matrix: torch.Tensor) -> float:
    """Largest deviation of ``M M'`` from the identity."""
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("n", [1, 2, 4, 64, 256, *PALEY, 576, 896])
def test_a_hadamard_matrix_is_orthogonal_and_has_two_values(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.float64
    assert off(matrix) < 1e-12
    assert bool(((matrix * math.sqrt(n)).abs() - 1).abs().max() < 1e-12)


@pytest.mark.parametrize("n", HIDDEN)
def test_the_widths_of_common_models_have_one(n: int) -> None:
    assert has_hadamard(n)


@pytest.mark.parametrize("n", UNKNOWN)
def test_orders_without_a_construction_are_told(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard(n)


@given(n=st.integers(1, 130), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_random_rotation_of_any_size_is_orthogonal_and_repeatable(n: int, seed: int) -> None:
    rotation = matrix_of(n, seed)
    assert off(rotation) < 1e-12
    assert torch.equal(rotation, matrix_of(n, seed))
    if has_hadamard(n):
        assert torch.allclose(rotation.abs(), torch.full_like(rotation, n**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [14, 64, 96])
def test_seeds_give_different_rotations(n: int) -> None:
    assert not torch.equal(matrix_of(n, 1), matrix_of(n, 2))


@pytest.mark.parametrize("n", [1, 2, 12, 64, 96, 576, 1024, 1536])
def test_a_random_rotation_is_signs_times_the_hadamard_matrix(n: int) -> None:
    signs = torch.randint(2, (n, 1), generator=rng(5)).double() * 2 - 1
    torch.testing.assert_close(matrix_of(n, 5), signs * hadamard(n), rtol=0, atol=1e-14)
