"""A random rotation that is applied by a fast Hadamard transform, without its matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from swquant.device import moved
from swquant.quant.hadamard import hadamard, has_hadamard

_LARGEST_STEP = 64


@dataclass(frozen=True)
class Transform:
    """The orthogonal matrix ``Q = diag(signs) (... (x) F2 (x) F1)``.

    It is applied factor by factor, as products with matrices up to 64 x 64: points * width * log(width) operations
    where the width is a power of two (Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform", SIAM J. Comput.
    39, 2009).

    Attributes:
        signs: [width].
        factors: Orthogonal matrices, the product of whose orders is the width.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    def forward(self, points: Tensor) -> Tensor:
        """Return ``points @ Q`` for ``points [points, width]``."""
        count, width = points.shape
        out = points * self.signs
        for factor in self.factors:
            # The last digit of the channel's number is transformed, and becomes the first.
            out = (out.view(count, -1, factor.shape[0]) @ factor).transpose(1, 2).reshape(count, width)
        return out

    def back(self, points: Tensor) -> Tensor:
        """Return ``points @ Q.T``, which undoes `forward`."""
        count, width = points.shape
        out = points
        for factor in reversed(self.factors):
            out = (out.reshape(count, factor.shape[0], -1).transpose(1, 2) @ factor.t()).reshape(count, width)
        return out * self.signs


def draw_transform(width: int, generator: torch.Generator, like: Tensor) -> Transform:
    """Draw a `Transform` with random signs; every entry of it is ``+-1 / sqrt(width)`` where there is such a matrix.

    The factors are Sylvester's matrices and, for what of the width is no power of two, Paley's (12, 20, 28, ...; see
    `swquant.quant.hadamard`). Where there is none, a random orthogonal matrix of the width's odd part takes its place.

    Args:
        width: Order of the matrix.
        generator: Where the signs come from, and the orthogonal matrix.
        like: gives the precision and the device of the result.
    """
    drawn = torch.randint(2, (width,), generator=generator, device=generator.device)
    signs = moved(drawn, like.device).to(like.dtype) * 2 - 1
    base, exact = _base(width)
    factors = [hadamard(order) for order in _steps(width // base)]
    if exact and base > 1:
        factors.append(_matrix(base))
    elif base > 1:
        normals = torch.randn(base, base, generator=generator, device=generator.device)
        factors.append(torch.linalg.qr(normals.cpu().double()).Q)
    return Transform(signs, tuple(factor.to(like) for factor in factors))


def random_rotation(width: int, generator: torch.Generator) -> Transform:
    """``diag(s) @ hadamard(width)`` with random signs ``s`` (QuaRot, arXiv 2404.00456), in float64 on the CPU.

    Where no Hadamard matrix of this order is known here, a random orthogonal matrix, uniform over all of them: the QR
    decomposition of a Gaussian matrix, the diagonal of ``R`` made positive.

    Args:
        width: Order of the matrix.
        generator: Of the CPU.
    """
    base, exact = _base(width)
    if not exact:
        basis, triangle = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return Transform(torch.ones(width, dtype=torch.float64), (basis * triangle.diagonal().sign(),))
    signs = torch.randint(2, (width,), generator=generator).double() * 2 - 1
    orders = [order for order in (base, *_steps(width // base)) if order > 1]
    return Transform(signs, tuple(map(_matrix, orders)))


def _base(width: int) -> tuple[int, bool]:
    """The least order that is left of ``width`` by halving and has a Hadamard matrix; the odd part if none has."""
    order = width // (width & -width)
    candidates = [order << doubling for doubling in range((width & -width).bit_length())]
    found = next((candidate for candidate in candidates if has_hadamard(candidate)), None)
    return (order, False) if found is None else (found, True)


@cache
def _matrix(order: int) -> Tensor:
    return hadamard(order)


def _steps(power: int) -> list[int]:
    """Orders whose product is ``power``, a power of two."""
    steps: list[int] = []
    while power > 1:
        steps.append(min(power, _LARGEST_STEP))
        power //= steps[-1]
    return steps
