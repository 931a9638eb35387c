"""The allocation is the best there is within the size."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from swquant.allocation.solve import solve


@pytest.mark.parametrize("seed", range(8))
def test_it_is_as_good_as_trying_all(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    costs = [torch.rand(4, generator=rng).sort(descending=True).values.tolist() for _ in range(5)]
    sizes = [torch.randint(1, 1_000_000_000, (4,), generator=rng).sort().values.tolist() for _ in range(5)]
    low, high = sum(row[0] for row in sizes), sum(row[-1] for row in sizes)
    limit = low + (high - low) // 3
    found = solve(costs, sizes, limit)
    assert found is not None

    def total(table: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
        return sum(row[place] for row, place in zip(table, chosen, strict=True))

    fitting = [one for one in product(range(4), repeat=5) if total(sizes, one) <= limit]
    assert total(sizes, found) <= limit
    assert total(costs, found) == pytest.approx(min(total(costs, one) for one in fitting), rel=1e-5)


def test_a_size_that_only_just_holds_the_smallest() -> None:
    costs, sizes = [[1.0, 0.0], [2.0, 0.0]], [[7, 9], [5, 6]]
    assert solve(costs, sizes, 12) == [0, 0]
    assert solve(costs, sizes, 13) == [0, 1]
    assert solve(costs, sizes, 11) is None
