"""The transform is a random orthonormal basis, and its way back undoes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swquant.quant.hadamard_transform import draw_transform

WIDTHS = [1, 2, 3, 7, 8, 12, 20, 24, 28, 36, 50, 64, 96, 128, 130, 192, 256]
NO_HADAMARD = (3, 7, 50, 130)
"""Those of which neither they nor a half of them has a matrix."""


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_an_orthonormal_basis(width: int) -> None:
    eye = torch.eye(width, dtype=torch.float64)
    transform = draw_transform(width, rng(3), eye)
    basis = transform.forward(eye)
    torch.testing.assert_close(basis.t() @ basis, eye)
    cloud, other = points(1, 5, width), points(2, 5, width)
    torch.testing.assert_close(transform.forward(cloud), cloud @ basis)
    torch.testing.assert_close(transform.back(other), other @ basis.t())
    torch.testing.assert_close(transform.back(transform.forward(cloud)), cloud)
    assert torch.equal(draw_transform(width, rng(3), eye).forward(eye), basis)


@pytest.mark.parametrize("width", [width for width in WIDTHS if width not in NO_HADAMARD])
def test_every_direction_sees_all_channels_alike(width: int) -> None:
    eye = torch.eye(width, dtype=torch.float64)
    basis = draw_transform(width, rng(3), eye).forward(eye)
    torch.testing.assert_close(basis.abs(), torch.full_like(basis, width**-0.5))


@pytest.mark.parametrize("width", [width for width in WIDTHS if width > 2])
def test_another_draw_is_another_basis(width: int) -> None:
    eye = torch.eye(width, dtype=torch.float64)
    one, other = (draw_transform(width, rng(seed), eye).forward(eye) for seed in (3, 4))
    assert not torch.equal(one, other)
