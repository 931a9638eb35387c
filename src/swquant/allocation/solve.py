"""Which grid each unit gets: the least cost within a size, exactly, by an integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-6
"""Of the cost, by which an answer may be above the best there is."""

SECONDS = 60.0
"""After which the best answer so far is taken."""


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> list[int] | None:
    """The choice of each unit with the least sum of costs whose sizes are not above ``limit`` together.

    With ``x_uk = 1`` where unit ``u`` takes its choice ``k``::

        minimize  sum c_uk x_uk    where    sum_k x_uk = 1 for each u,    sum b_uk x_uk <= limit

    Args:
        costs: Of each unit's choices.
        sizes: In bytes, likewise.
        limit: In bytes.

    Returns:
        An index for each unit; ``None`` where even the smallest choices are too large.
    """
    if sum(map(min, sizes)) > limit:
        return None
    cost, size = (np.concatenate([np.asarray(part, dtype=np.float64) for part in table]) for table in (costs, sizes))
    counts = [len(part) for part in costs]
    owner = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(cost)), (owner, np.arange(len(cost)))), shape=(len(counts), len(cost)))
    unit = float(size.max())
    # Scaled, so that the solver's tolerance on constraints is not in bytes of a large file.
    within = LinearConstraint(size[None] / unit, -np.inf, limit / unit)
    found = milp(
        cost / (cost.max() or 1.0),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        return None
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return [int(found.x[start : start + count].argmax()) for start, count in zip(starts, counts, strict=True)]
