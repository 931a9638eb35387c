"""Whether values are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether all of them are, in one pass."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())
