"""Round to nearest: each group's minimum and maximum span its grid; no data, no training."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.methods.base import Part, Setting


@dataclass(frozen=True)
class RTN:
    """Round to nearest, the baseline and the starting point of the methods that train.

    On symmetric grids each group takes the sign of its scale that gives the smaller squared error.
    """

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """No parts."""
        return ()
