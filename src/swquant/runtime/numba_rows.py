# pyright: basic, reportMissingImports=false
"""Row by row arithmetic on packed codes, compiled by numba; imported by its kernel alone.

A row's words are read in periods, the fewest words that hold whole codes (one, or three for 3 bits), and code ``j`` of
every period together, as vectors over the periods: a *plane*. Inputs come in the same order, ``[planes, periods]``. A
product with a plane needs no shift: the code stays where it is in its word, ``code * 2**s``, and the input brings the
factor ``2**-s``, which is exact. So a weight costs one ``and``, one conversion and one multiplication with addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

_FAST = {"reassoc", "contract", "nsz"}


@dataclass(frozen=True)
class Rows:
    """What is compiled for a width of codes; see :func:`compiled`.

    Attributes:
        product: ``(words, scale, zero, planes, sums, out, start, stop)`` writes ``out[start:stop]`` of a product with
            one input.
        dequantize: ``(words, scale, zero, out, start, stop)`` writes the weights ``start:stop`` into ``out``, their
            columns in the order of planes.
    """

    product: Callable[..., None]
    dequantize: Callable[..., None]


def shifts(bits: int) -> tuple[int, ...]:
    """How far above bit 0 the product finds each plane's codes."""
    if bits == 3:
        third = tuple(range(0, 30, 3))
        return (*third, 0, *third, 0, *third)
    return (*range(0, 32 - bits, bits), 0)


@cache
def compiled(bits: int, width: int) -> Rows:
    """The functions for codes of 2, 3, 4 or 8 bits in groups of ``width`` periods; 0 is one group, of any width.

    The width is compiled in because short loops of unknown length would cost as much as the product.
    """
    partial, weights = (_partial3, _weights3) if bits == 3 else (_partial(bits), _weights(bits))
    zero_points = _zero_points(bits)

    @numba.njit(nogil=True, fastmath=_FAST)
    def product(words: Any, scale: Any, zero: Any, inputs: Any, sums: Any, out: Any, start: int, stop: int) -> None:
        groups, periods = scale.shape[1], inputs.shape[1]
        size = width if width else periods
        found, zeros = np.empty(periods, np.float32), np.empty(groups, np.float32)
        for row in range(start, stop):
            zero_points(zero, row, zeros)
            partial(words[row], inputs, found)
            total = np.float32(0)
            for group in range(groups):
                part = np.float32(0)
                for period in range(group * size, (group + 1) * size):
                    part += found[period]
                total += _widened(scale[row, group]) * (part - zeros[group] * sums[group])
            out[row] = total

    @numba.njit(nogil=True, fastmath=_FAST)
    def dequantize(words: Any, scale: Any, zero: Any, out: Any, start: int, stop: int) -> None:
        groups, periods = scale.shape[1], out.shape[2]
        size = width if width else periods
        steps, offsets = np.empty(periods, np.float32), np.empty(periods, np.float32)
        zeros = np.empty(groups, np.float32)
        for row in range(start, stop):
            zero_points(zero, row, zeros)
            for group in range(groups):
                step, base = _widened(scale[row, group]), zeros[group]
                for period in range(group * size, (group + 1) * size):
                    steps[period], offsets[period] = step, base
            weights(words[row], offsets, steps, out[row - start])

    return Rows(product, dequantize)


def _widened(value: Any) -> Any:
    """A float32, or the bits of a bfloat16, as float32."""
    raise NotImplementedError


@overload(_widened, inline="always")
def _widened_for(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _zero_points(bits: int) -> Any:
    """Writes a row's zero points, one for each group; they are packed along the output, or all the same."""
    mask, mid = np.uint32((1 << bits) - 1), np.float32(1 << (bits - 1))

    @numba.njit(nogil=True)
    def zero_points(zero: Any, row: int, out: Any) -> None:
        if zero.shape[0] == 0:
            out[:] = mid
            return
        word, shift = row * bits // 32, row * bits % 32
        low, high = zero[word], zero[word + 1 if shift + bits > 32 else word]
        down, up = np.uint32(shift), np.uint32(32 - shift if shift + bits > 32 else 31)
        for group in range(out.shape[0]):
            value = (low[group] >> down) | (high[group] << up)
            out[group] = np.float32(np.int32(value & mask))

    return zero_points


def _partial(bits: int) -> Any:
    """Sums over the planes, by period, of code times input, for codes that fill words."""
    count, mask = 32 // bits, (1 << bits) - 1

    @numba.njit(nogil=True, fastmath=_FAST)
    def partial(words: Any, inputs: Any, found: Any) -> None:
        for period in range(found.shape[0]):
            word = words[period]
            value = np.float32(np.int32(word >> np.uint32(32 - bits))) * inputs[count - 1, period]
            for plane in range(count - 1):
                code = np.int32(word & np.uint32(mask << (bits * plane)))
                value += np.float32(code) * inputs[plane, period]
            found[period] = value

    return partial


@numba.njit(nogil=True, fastmath=_FAST)
def _partial3(words: Any, inputs: Any, found: Any) -> None:
    """The same for three bits."""
    lanes = _lanes3(words, found.shape[0])
    for period in range(found.shape[0]):
        value = np.float32(np.int32(lanes[3, period])) * inputs[10, period]
        found[period] = value + np.float32(np.int32(lanes[4, period])) * inputs[21, period]
    for lane in range(3):
        _add_ten(lanes[lane], inputs[11 * lane : 11 * lane + 10], found)


@numba.njit(nogil=True, fastmath=_FAST)
def _add_ten(words: Any, inputs: Any, found: Any) -> None:
    for period in range(found.shape[0]):
        word = words[period]
        value = np.float32(0)
        for plane in range(10):
            value += np.float32(np.int32(word & np.uint32(7 << (3 * plane)))) * inputs[plane, period]
        found[period] += value


@numba.njit(nogil=True)
def _lanes3(words: Any, periods: int) -> Any:
    """Of every three words: ten codes from bit 0 of each, in three rows, and the two codes that straddle, in two."""
    lanes = np.empty((5, periods), np.uint32)
    for period in range(periods):
        first, second, third = words[3 * period], words[3 * period + 1], words[3 * period + 2]
        lanes[0, period], lanes[1, period], lanes[2, period] = first, second >> np.uint32(1), third >> np.uint32(2)
        lanes[3, period] = (first >> np.uint32(30)) | ((second & np.uint32(1)) << np.uint32(2))
        lanes[4, period] = (second >> np.uint32(31)) | ((third & np.uint32(3)) << np.uint32(1))
    return lanes


def _weights(bits: int) -> Any:
    """Weights by plane and period, for codes that fill words."""

    @numba.njit(nogil=True)
    def weights(words: Any, offsets: Any, steps: Any, out: Any) -> None:
        for plane in range(32 // bits):
            _plane(words, bits * plane, (1 << bits) - 1, offsets, steps, out[plane])

    return weights


@numba.njit(nogil=True)
def _weights3(words: Any, offsets: Any, steps: Any, out: Any) -> None:
    """The same for three bits."""
    lanes = _lanes3(words, out.shape[1])
    for lane in range(3):
        for plane in range(10):
            _plane(lanes[lane], 3 * plane, 7, offsets, steps, out[11 * lane + plane])
    _plane(lanes[3], 0, 7, offsets, steps, out[10])
    _plane(lanes[4], 0, 7, offsets, steps, out[21])


@numba.njit(nogil=True)
def _plane(words: Any, shift: int, mask: int, offsets: Any, steps: Any, out: Any) -> None:
    for period in range(out.shape[0]):
        code = (words[period] >> np.uint32(shift)) & np.uint32(mask)
        out[period] = (np.float32(np.int32(code)) - offsets[period]) * steps[period]
