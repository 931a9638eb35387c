"""Round to nearest: each group's minimum and maximum span its grid; no data, no training."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.families.base import Family
from swquant.phases.base import Phase
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class RTN:
    """Round to nearest, the baseline and the starting point of the methods that train.

    On symmetric grids each group takes the sign of its scale that gives the smaller squared error.
    """

    def phases(self, spec: QuantSpec, family: Family, effort: float) -> tuple[Phase, ...]:
        """No phases."""
        return ()
