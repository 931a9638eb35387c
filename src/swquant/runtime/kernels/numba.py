"""Our own kernel for CPUs, compiled by numba: rows of codes are multiplied as they are read."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from swquant.runtime.kernels.base import PackedWeight

if TYPE_CHECKING:
    from swquant.runtime.numba_rows import Rows

FEW_ROWS = 8
"""Inputs that are multiplied one by one; above, weights are dequantized some at a time, for all inputs."""

WEIGHTS_AT_ONCE = 1 << 20
"""Dequantized weights in memory: 4 MB, in the cache of a core or two."""

WEIGHTS_PER_THREAD = 1 << 18
"""Fewer are not worth another thread."""


class Numba:
    """Products in float32 (bfloat16 for many inputs where that is fast), in as many threads as torch has.

    One input costs about a pass over the packed codes; many cost torch's matrix product and a pass over the weights.
    """

    name: ClassVar[str] = "numba"
    rank: ClassVar[int] = 20
    most_rows: ClassVar[int | None] = None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs on CPUs, for the three dtypes of models, where numba is installed."""
        if device.type != "cpu":
            return f"it runs on a CPU, and the inputs are on {device}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"inputs are {dtype}, expected float32, bfloat16 or float16"
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed: pip install 'swquant[cpu]'"
        return None

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """Whole periods of a row by compiled code; up to 31 inputs after them, if any, by torch."""
        period = 32 if weight.bits == 3 else 32 // weight.bits
        periods = weight.in_features // period
        if not periods:
            return linear(x, weight.dequantize(x.dtype))
        few = x.shape[0] <= FEW_ROWS
        whole = periods * period
        narrow = not few and x.dtype == torch.bfloat16 and _narrow_is_fast()
        inputs = x[:, :whole].to(x.dtype if narrow else torch.float32)
        planes = inputs.unflatten(1, (periods, period)).transpose(1, 2)
        product = (_one_by_one if few else _together)(planes, weight)
        if whole < weight.in_features:
            product = product + linear(x[:, whole:].to(product.dtype), _behind(weight, whole).dequantize(product.dtype))
        return product.to(x.dtype)


@cache
def _narrow_is_fast() -> bool:
    """Whether torch's matrix products in bfloat16 can be expected to beat those in float32: x86 needs AMX for that."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def _one_by_one(planes: Tensor, weight: PackedWeight) -> Tensor:
    """``float32 [rows, out]`` for inputs ``float32 [rows, planes, periods]``."""
    from swquant.runtime.numba_rows import shifts

    rows, count, periods = planes.shape
    compiled = _compiled(weight, periods)
    words, scale, zero = _arrays(weight)
    sums = planes.unflatten(2, (weight.groups, -1)).sum((1, 3)).numpy()
    scaled = (planes * torch.exp2(-torch.tensor(shifts(weight.bits), dtype=torch.float32)).view(count, 1)).contiguous()
    out = torch.empty(rows, weight.out_features)

    def part(start: int, stop: int) -> None:
        for row in range(rows):
            compiled.product(words, scale, zero, scaled[row].numpy(), sums[row], out[row].numpy(), start, stop)

    _spread(part, weight.out_features, weight.in_features)
    return out


def _together(planes: Tensor, weight: PackedWeight) -> Tensor:
    """``[rows, out]`` for inputs ``[rows, planes, periods]``, in their dtype."""
    count, periods = planes.shape[1:]
    compiled = _compiled(weight, periods)
    words, scale, zero = _arrays(weight)
    inputs = planes.flatten(1)
    out = inputs.new_empty(inputs.shape[0], weight.out_features)
    step = max(1, WEIGHTS_AT_ONCE // weight.in_features)
    tile = torch.empty(min(step, weight.out_features), count, periods)
    for first in range(0, weight.out_features, step):
        size = min(step, weight.out_features - first)

        def part(start: int, stop: int, first: int = first) -> None:
            compiled.dequantize(words, scale, zero, tile[start:stop].numpy(), first + start, first + stop)

        _spread(part, size, weight.in_features)
        out[:, first : first + size] = linear(inputs, tile[:size].flatten(1).to(inputs.dtype))
    return out


def _behind(weight: PackedWeight, whole: int) -> PackedWeight:
    """The columns from ``whole`` on, which begin a word; only a weight with one group has any."""
    words = weight.words[:, whole * weight.bits // 32 :]
    return PackedWeight(words, weight.scale, weight.zero, weight.bits, weight.in_features - whole)


def _compiled(weight: PackedWeight, periods: int) -> Rows:
    from swquant.runtime.numba_rows import compiled

    return compiled(weight.bits, 0 if weight.groups == 1 else periods // weight.groups)


def _arrays(weight: PackedWeight) -> tuple[Any, Any, Any]:
    """Words, scales (bfloat16 as its bits) and packed zero points as arrays; no data is copied but float16's scales."""
    scale = weight.scale
    steps = scale.view(torch.uint16).numpy() if scale.dtype == torch.bfloat16 else scale.float().numpy()
    zero = torch.empty(0, 0, dtype=torch.int32) if weight.zero is None else weight.zero
    return weight.words.view(torch.uint32).numpy(), steps, zero.view(torch.uint32).numpy()


def _spread(work: Callable[[int, int], None], rows: int, width: int) -> None:
    """Call ``work(start, stop)`` on parts of ``rows``, in torch's number of threads if they are worth it."""
    threads = max(1, min(torch.get_num_threads(), rows * width // WEIGHTS_PER_THREAD))
    if threads == 1:
        work(0, rows)
        return
    edges = [rows * index // threads for index in range(threads + 1)]
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    others = [pool.submit(work, *edge) for edge in pairwise(edges[1:])]
    work(0, edges[1])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"swquant-{process}")
