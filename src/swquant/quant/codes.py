"""How a weight uses its codes."""

from __future__ import annotations

import torch
from torch import Tensor


def code_entropy(codes: Tensor, bits: int) -> float:
    """``-sum p log2 p`` over the shares ``p`` of the ``2**bits`` codes, in bits per code."""
    shares = torch.bincount(codes.flatten().long(), minlength=1 << bits).double() / codes.numel()
    return float(-(shares * torch.log2(shares.clamp(min=torch.finfo(torch.float64).tiny))).sum())


def share_at_ends(codes: Tensor, bits: int) -> float:
    """Share of the codes that are the least or the greatest of ``2**bits``."""
    return float(((codes == 0) | (codes == (1 << bits) - 1)).double().mean())
