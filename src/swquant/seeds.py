"""Random generators derived from a seed and a place in the run, so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *place: str | int, device: torch.device | None = None) -> torch.Generator:
    """A generator for one place in a run, e.g. ``generator(seed, "block", 3, "slices", 120)``.

    Generators of different places are independent; the same seed and place give the same numbers in any process.
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    out = torch.Generator(device=device or torch.device("cpu"))
    out.manual_seed(int.from_bytes(digest, "little") >> 1)
    return out
