"""How a weight uses its codes."""

from __future__ import annotations

import torch
from torch import Tensor


def code_entropy(codes: Tensor, bits: int) -> float:
    """``-sum p log2 p`` over the shares ``p`` of the ``2**bits`` codes ``uint8``, in bits per code."""
    shares = _counts(codes, bits) / codes.numel()
    return float(-(shares * torch.log2(shares.clamp(min=torch.finfo(torch.float64).tiny))).sum())


def share_at_ends(codes: Tensor, bits: int) -> float:
    """Share of the codes ``uint8`` that are the least or the greatest of ``2**bits``."""
    return float(_counts(codes, bits)[[0, -1]].sum() / codes.numel())


def _counts(codes: Tensor, bits: int) -> Tensor:
    """How often each code is used, in float64; no copy of the codes is made."""
    return torch.bincount(codes.flatten(), minlength=1 << bits).cpu().double()
