"""Hadamard matrices by the constructions of Sylvester and Paley."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix with entries ``+-1 / sqrt(n)``, ``float64 [n, n]``.

    There is one here for ``n = 2**k * m`` with ``m`` being 1 or an order of Paley's (J. Math. Phys. 12, 1933), which
    are ``q + 1`` for prime powers ``q = 3 (mod 4)`` and ``2 (q + 1)`` for prime powers ``q = 1 (mod 4)``: 12, 20, 24,
    28, 36, 44, 52, 60, ... The factor 2 is Sylvester's ``[[H, H], [H, -H]]``.

    Raises:
        ValueError: No such construction gives ``n``; :func:`has_hadamard` tells.
    """
    order = _base(n)
    if order is None:
        raise ValueError(f"no construction here gives a Hadamard matrix of order {n}")
    out = torch.ones(1, 1, dtype=torch.float64) if order == 1 else _paley(order)
    while out.shape[0] < n:
        out = torch.kron(_SYLVESTER, out)
    return out / math.sqrt(n)


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` has a matrix of order ``n``."""
    return _base(n) is not None


_SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
_DIAGONAL = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)


def _base(n: int) -> int | None:
    """The least ``m`` with ``n = 2**k * m`` that is 1 or an order of Paley's."""
    if n < 1:
        return None
    order = n // (n & -n)
    while order <= n:
        if order == 1 or _field(order) is not None:
            return order
        order *= 2
    return None


def _field(order: int) -> tuple[int, int] | None:
    """``(p, k)`` of the field ``GF(p**k)`` that Paley's constructions make a matrix of this order from."""
    if order % 4:
        return None
    first, second = order - 1, order // 2 - 1
    return _prime_power(first) or (_prime_power(second) if second % 4 == 1 else None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p**k`` and ``p`` an odd prime."""
    if q < 3 or q % 2 == 0:
        return None
    prime = next((p for p in range(3, math.isqrt(q) + 1, 2) if q % p == 0), q)
    exponent = round(math.log(q, prime))
    return (prime, exponent) if prime**exponent == q else None


def _paley(order: int) -> Tensor:
    """Paley's matrix of entries ``+-1`` from the conference matrix ``C = [[0, 1], [+-1, Q]]``, ``C C' = q I``.

    ``C`` is skew for ``q = 3 (mod 4)``, which gives ``I + C``, and symmetric for ``q = 1 (mod 4)``, which gives
    ``C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]``.
    """
    field = _field(order)
    assert field is not None
    jacobsthal = _jacobsthal(*field)
    q = jacobsthal.shape[0]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if q % 4 == 3 else 1
    conference[1:, 1:] = jacobsthal
    one = torch.eye(q + 1, dtype=torch.float64)
    return one + conference if q % 4 == 3 else torch.kron(conference, _SYLVESTER) + torch.kron(one, _DIAGONAL)


def _jacobsthal(p: int, k: int) -> Tensor:
    """``Q[a, b] = chi(a - b)`` over ``GF(q)``, ``q = p**k``: 1 for squares, -1 for the others, 0 for zero; ``[q, q]``.

    A field is the polynomials over ``GF(p)`` modulo ``x**k - tail(x)``. Of all such rings exactly the fields have
    ``(q - 1) / 2`` squares besides zero: ``ab = 0`` makes ``(a + b) / 2`` and ``(a - b) / 2`` have one square, although
    they are not each other's negatives.
    """
    elements = torch.cartesian_prod(*[torch.arange(p)] * k).view(-1, k)
    places = p ** torch.arange(k - 1, -1, -1)
    character = next(
        found
        for tail in elements
        if int((found := _character(_squares(elements, tail, p) @ places)).clamp(min=0).sum()) == len(elements) // 2
    )
    difference = sum(
        ((digit.unsqueeze(1) - digit) % p * place for digit, place in zip(elements.T, places, strict=True)),
        start=torch.zeros(1, dtype=torch.long),
    )
    return character[difference].double()


def _character(squares: Tensor) -> Tensor:
    character = torch.full_like(squares, -1)
    character[squares] = 1
    character[0] = 0
    return character


def _squares(elements: Tensor, tail: Tensor, p: int) -> Tensor:
    """The square of each polynomial modulo ``x**k - tail(x)``; coefficients ``[q, k]``, that of ``x**0`` first."""
    count, k = elements.shape
    product = torch.zeros(count, 2 * k - 1, dtype=torch.long)
    for degree in range(k):
        product[:, degree : degree + k] += elements[:, degree : degree + 1] * elements
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree] += product[:, degree : degree + 1] % p * tail
    return product[:, :k] % p
