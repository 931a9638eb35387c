"""Columns of a weight rounded one after the other, those of a block at a time: the inner loop of GPTQ.

In plain torch a column takes some ten calls. Compiled, by numba on a CPU and by Triton on CUDA, a block of columns is
one call that goes through memory once. All three do the same operations on each value in the same order, so they give
the same bits.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from swquant.device import is_cuda
from swquant.errors import reason_of
from swquant.quant.grid import Grid
from swquant.quant.rounding import fake_quantize
from swquant.quant.spec import QuantSpec

COMPILED = 1 << 16
"""Weights of a block of columns from which on numba is worth the two seconds that it compiles for, once a process."""

WEIGHTS_PER_THREAD = 1 << 14
"""Fewer weights of a block of columns are not worth another thread."""


def round_columns(
    work: Tensor, errors: Tensor, upper: Tensor, grid: Grid, group: Sequence[int], spec: QuantSpec
) -> None:
    """Round the first columns of a block in place; all that come after one in the block make up for its error.

    For each of them, ``j``, with ``Q`` its grid::

        e_j = (w_j - Q(w_j)) / U_jj,   w_k = w_k - U_jk e_j   for all k > j

    ``w_j`` itself stays, as it was when its turn came. No product is contracted with the difference, and each one is
    rounded, so that every way to compute it yields the same.

    Args:
        work: The block's columns ``[columns, out]``.
        errors: ``e`` is written there, ``[columns to be rounded, out]``.
        upper: The block's part of ``U``, ``[columns, columns]``.
        grid: Of some groups.
        group: For each column to be rounded its group in ``grid``.
        spec: The grid's kind.
    """
    if grid.levels is None and work.device.type == "cpu" and _numba_works() and _numba_pays(work):
        _by_numba(work, errors, upper, grid, group, spec)
    elif grid.levels is None and is_cuda(work.device) and work.dtype == torch.float32 and _triton_works(work.device):
        from swquant.phases import triton_columns

        triton_columns.rounded(work, errors, upper, _across(grid), group, spec.max_code)
    else:
        _plainly(work, errors, upper, grid, group, spec)


def _plainly(work: Tensor, errors: Tensor, upper: Tensor, grid: Grid, group: Sequence[int], spec: QuantSpec) -> None:
    for column, index in enumerate(group):
        now = work[column].unsqueeze(1)
        error = (now - fake_quantize(now, _of_group(grid, index), spec)).squeeze(1).div_(upper[column, column])
        work[column + 1 :].sub_(upper[column, column + 1 :].unsqueeze(1) * error)
        errors[column] = error


def _of_group(grid: Grid, index: int) -> Grid:
    own = slice(index, index + 1)
    shift = None if grid.shift is None else grid.shift[:, own]
    return Grid(grid.scale[:, own], grid.zero[:, own], shift, grid.levels)


def _across(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and shift, ``[groups, out]`` each; the shift is empty where there is none."""
    shift = grid.scale[:, :0] if grid.shift is None else grid.shift
    scale, zero, shift = (value.squeeze(-1).T.contiguous() for value in (grid.scale, grid.zero, shift))
    return scale, zero, shift


def _by_numba(work: Tensor, errors: Tensor, upper: Tensor, grid: Grid, group: Sequence[int], spec: QuantSpec) -> None:
    from swquant.phases import numba_columns

    rounded: Any = numba_columns.rounded

    upper, index = upper.contiguous(), torch.tensor(group)
    ends = torch.tensor([0, spec.max_code], dtype=work.dtype)
    given = [value.numpy() for value in (work, errors, upper, *_across(grid), index, ends)]
    rows = work.shape[1]
    threads = max(1, min(torch.get_num_threads(), work.numel() // WEIGHTS_PER_THREAD))
    edges = [rows * part // threads for part in range(threads + 1)]
    others = [_pool(os.getpid(), threads).submit(rounded, *given, *edge) for edge in pairwise(edges[1:])]
    rounded(*given, 0, edges[1])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"columns-{process}")


@cache
def _numba_works() -> bool:
    """Whether numba can be imported; one that does not fit the installed numpy cannot."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import swquant.phases.numba_columns  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except Exception as error:
        warnings.warn(f"numba does not work here ({reason_of(error, 200)}): GPTQ takes longer", stacklevel=2)
        return False
    return True


def _numba_pays(work: Tensor) -> bool:
    """Whether the block is large enough to compile for, or that has been done."""
    from swquant.phases import numba_columns

    rounded: Any = numba_columns.rounded

    return work.numel() >= COMPILED or bool(rounded.signatures)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether the kernel can be built and run, as in :mod:`swquant.quant.rounding`."""
    if importlib.util.find_spec("triton") is None:
        return False
    one = torch.ones(1, 1, device=device)
    try:
        from swquant.phases import triton_columns

        triton_columns.rounded(one, errors := torch.ones_like(one), one, (one, one, one[:0]), [0], 3)
        return bool((errors == 0).all())
    except Exception as error:
        warnings.warn(f"triton does not work here ({reason_of(error, 200)}): GPTQ takes longer", stacklevel=2)
        return False
