# pyright: basic, reportMissingImports=false
"""Columns rounded one after the other, compiled by numba; imported by :mod:`swquant.phases.columns` alone.

Each value sees the operations of plain torch in their order, each rounded by itself: without ``fastmath`` nothing is
contracted to a fused multiply-add. So the results are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

ROWS = 256
"""Rows of a weight at a time: 128 columns of them in float32 take 128 KiB, what a core's second cache holds."""


def _compiled(function: Any) -> Any:
    """What is compiled is kept on the disk, where numba finds a place for it: compiling takes seconds in each run."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def rounded(
    work: Any,
    errors: Any,
    upper: Any,
    scale: Any,
    zero: Any,
    shift: Any,
    group: Any,
    ends: Any,
    start: int,
    stop: int,
) -> None:
    """:func:`swquant.phases.columns.round_columns` on the rows ``start:stop``.

    Args:
        work: ``[columns, out]``.
        errors: ``[columns to be rounded, out]``.
        upper: ``[columns, columns]``.
        scale: ``[groups, out]``; so is ``zero``, and ``shift``, which is empty where there is none.
        zero: See ``scale``.
        shift: See ``scale``.
        group: The group of each column that is to be rounded.
        ends: Least and greatest code.
        start: First row.
        stop: After the last one.
    """
    least, most = ends[0], ends[1]
    for first in range(start, stop, ROWS):
        last = min(first + ROWS, stop)
        count = last - first
        for column in range(group.shape[0]):
            own, diagonal = group[column], upper[column, column]
            now, error = work[column, first:last], errors[column, first:last]
            steps, zeros = scale[own, first:last], zero[own, first:last]
            if shift.shape[0] == 0:
                for row in range(count):
                    code = np.rint(now[row] / steps[row]) + zeros[row]
                    code = min(max(code, least), most)
                    error[row] = (now[row] - (code - zeros[row]) * steps[row]) / diagonal
            else:
                shifts = shift[own, first:last]
                for row in range(count):
                    code = np.rint((now[row] + shifts[row]) / steps[row]) + zeros[row]
                    code = min(max(code, least), most)
                    error[row] = (now[row] - ((code - zeros[row]) * steps[row] - shifts[row])) / diagonal
            for later in range(column + 1, work.shape[0]):
                factor, ahead = upper[column, later], work[later, first:last]
                for row in range(count):
                    ahead[row] -= error[row] * factor
