# pyright: basic, reportMissingImports=false
"""Columns rounded one after the other, in Triton; imported by :mod:`swquant.phases.columns` alone.

A program has some rows of all columns of a block in registers and goes through the columns. Products and differences
are not fused (``enable_fp_fusion``), division and rounding are IEEE's, so the bits are those of plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swquant.quant.fused_source import _clamped, _rint

ROWS = 16
"""Rows of a weight that a program has."""


def rounded(
    work: Tensor,
    errors: Tensor,
    upper: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    group: Sequence[int],
    most: int,
) -> None:
    """:func:`swquant.phases.columns.round_columns`.

    Args:
        work: ``float32 [columns, out]``, contiguous.
        errors: ``float32 [columns to be rounded, out]``, contiguous.
        upper: ``float32 [columns, columns]``.
        parts: Scale, zero point and shift, ``[groups, out]`` each, contiguous; no rows of the latter is no shift.
        group: The group of each column that is to be rounded.
        most: The greatest code.
    """
    columns, rows = work.shape
    scale, zero, shift = parts
    index = torch.tensor(group, dtype=torch.int32).to(work.device)
    launched: Any = kernel[(triton.cdiv(rows, ROWS),)]  # pyright: ignore[reportIndexIssue]
    with torch.cuda.device_of(work):
        launched(
            *(work, errors, upper.contiguous(), scale, zero, shift, index),
            *(columns, rows, len(group), float(most)),
            SHIFTED=shift.numel() > 0,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=ROWS,
            enable_fp_fusion=False,
        )


@triton.jit
def kernel(
    work_ptr,
    errors_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    shift_ptr,
    group_ptr,
    columns,
    rows,
    count,
    most,
    SHIFTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows; a column of the tile is taken out of it by a sum whose other terms are zeros."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    mask = (column < columns)[:, None] & inside[None, :]
    place = column[:, None].to(tl.int64) * rows + row[None, :]
    work = tl.load(work_ptr + place, mask=mask, other=0)
    for at in range(0, count):
        group = tl.load(group_ptr + at).to(tl.int64) * rows + row
        scale = tl.load(scale_ptr + group, mask=inside, other=1)
        zero = tl.load(zero_ptr + group, mask=inside, other=0)
        now = tl.sum(tl.where((column == at)[:, None], work, 0.0), 0)
        if SHIFTED:
            shift = tl.load(shift_ptr + group, mask=inside, other=0)
            code = _clamped(_rint(tl.div_rn(now + shift, scale)) + zero, most)
            found = (code - zero) * scale - shift
        else:
            code = _clamped(_rint(tl.div_rn(now, scale)) + zero, most)
            found = (code - zero) * scale
        factors = tl.load(upper_ptr + at * columns + column, mask=column < columns, other=0)
        diagonal = tl.load(upper_ptr + at * columns + at)
        error = tl.div_rn(now - found, tl.zeros([ROWS], tl.float32) + diagonal)
        tl.store(errors_ptr + at * rows + row, error, mask=inside)
        work = tl.where((column > at)[:, None], work - factors[:, None] * error[None, :], work)
    tl.store(work_ptr + place, work, mask=mask)
