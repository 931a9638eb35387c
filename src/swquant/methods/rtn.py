"""Round to nearest: each group's minimum and maximum span its grid, or one that is searched; no training."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.methods.base import Part, Setting
from swquant.phases.rtn_search import RtnSearch


@dataclass(frozen=True)
class RTN:
    """Round to nearest, the baseline and the starting point of the methods that train.

    On symmetric grids each group takes the sign of its scale that gives the smaller squared error.

    Attributes:
        search: Search each group's grid by the energy of its inputs on the calibration samples, ``(RtnSearch,)``.
    """

    search: bool = False

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """No parts, or the search."""
        found = Part("rtn", RtnSearch(), frozenset({"grid"}), discards=frozenset({"grid", "rounding"}))
        return (found,) if self.search else ()
