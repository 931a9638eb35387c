"""Directions that belong together: orthonormal ones, and the principal ones of a cloud."""

from __future__ import annotations

import torch
from torch import Tensor

from swquant.device import moved

EXACT = 512
"""Width up to which principal directions come from a full eigen-decomposition."""

ITERATIONS = 2


def orthogonal_directions(width: int, slices: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw directions in blocks of at most ``width``, orthonormal within a block and independent between blocks.

    Each block is the factor Q of a Gaussian matrix. Every direction is uniform on the sphere up to its sign, which no
    slice depends on.

    Args:
        width: dimension of the space.
        slices: number of directions.
        generator: advanced by ``width * slices`` float32 normals, whatever the precision of ``like``.
        like: gives the precision and the device of the result.

    Returns:
        [width, slices].
    """
    drawn = torch.randn(width, slices, generator=generator, device=generator.device)
    normals = moved(drawn, like.device).to(like.dtype)
    whole = slices - slices % width
    blocks = torch.linalg.qr(normals[:, :whole].view(width, -1, width).transpose(0, 1)).Q
    return torch.cat((*blocks, torch.linalg.qr(normals[:, whole:]).Q), dim=1)


def principal(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the directions along which ``points`` have most energy: eigenvectors of ``points' points / number``.

    Up to a width of `EXACT` all of them are computed. Beyond, `ITERATIONS` rounds of subspace iteration, which start
    from points spread evenly over the cloud, find ``count`` (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm
    4.4, but for the start, which is not random).

    Args:
        points: [number, width].
        count: how many directions are wanted beyond a width of `EXACT`.

    Returns:
        Mean squares along the directions, [found], falling, and the directions as columns, [width, found].
    """
    number, width = points.shape
    if width <= EXACT:
        energies, vectors = torch.linalg.eigh(points.t() @ points / number)
        return energies.flip(0).clamp_min(0), vectors.flip(1)
    chosen = torch.linspace(0, number - 1, min(count, number, width), device=points.device).round().long()
    basis = torch.linalg.qr(points[chosen].t()).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(points.t() @ (points @ basis)).Q
    inside = points @ basis
    energies, vectors = torch.linalg.eigh(inside.t() @ inside / number)
    return energies.flip(0).clamp_min(0), basis @ vectors.flip(1)
