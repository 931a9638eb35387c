"""Run by test_columns.py in its own process, with TRITON_INTERPRET=1: the kernel on the CPU, one line a mistake."""

from __future__ import annotations

import itertools

import torch

from swquant.phases import columns, triton_columns
from swquant.quant.grid import Grid
from swquant.quant.spec import QuantSpec


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    for bits, (count, rows, rounded), shifted in itertools.product(
        (2, 8), ((128, 37, 64), (20, 16, 20), (1, 3, 1)), (False, True)
    ):
        spec = QuantSpec(bits, 32, symmetric=False)
        work = torch.randn(count, rows, generator=rng) * spec.max_code
        upper = torch.randn(count, count, generator=rng).mul(0.3).triu()
        upper.diagonal().abs_().add_(0.5)
        scale = (torch.rand(rows, 3, 1, generator=rng) - 0.5).bfloat16().float()
        zero = torch.randint(spec.max_code + 1, scale.shape, generator=rng).float()
        grid = Grid(scale, zero, torch.randn(scale.shape, generator=rng) if shifted else None)
        group = torch.randint(3, (rounded,), generator=rng).tolist()
        work[::4] = (torch.randint(-9, 9, (rows,), generator=rng) + 0.5) * scale[:, 0, 0]
        both = [(work.clone(), torch.empty(rounded, rows)) for _ in range(2)]
        columns._plainly(*both[0], upper, grid, group, spec)
        triton_columns.rounded(*both[1], upper, columns._across(grid), group, spec.max_code)
        for name, plain, found in zip(("work", "errors"), *both, strict=True):
            if not torch.equal(plain, found):
                print(f"{name} {bits=} {count=} {rows=} {rounded=} {shifted=}")


if __name__ == "__main__":
    main()
