"""What a model makes of windows of text, token by token; one window's logits are in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swquant.evaluation.divergence import Divergence, divergence
from swquant.evaluation.perplexity import window_nll

POSITIONS_AT_ONCE = 256
"""Positions whose log-probabilities are in memory at a time, beside the window's logits."""

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class TokenScores:
    """All ``float32 [windows, context - 1]``; those against a reference are ``None`` where there is none.

    Attributes:
        nll: Negative log-likelihood of each token but a window's first, in nats.
        reference_nll: The reference's.
        kl: ``KL(reference || model)`` in nats.
        reverse_kl: ``KL(model || reference)`` in nats.
        top1: 1 where both rank the same token first, else 0.
        top5: Share of the reference's five likeliest tokens that are among the model's five.
    """

    nll: Scores
    reference_nll: Scores | None = None
    kl: Scores | None = None
    reverse_kl: Scores | None = None
    top1: Scores | None = None
    top5: Scores | None = None


@dataclass(frozen=True)
class Bucket:
    """Means over the tokens at some positions of the windows; a window's first token, never predicted, is at 0.

    Attributes:
        first: The first of these positions.
        last: The last.
        nll: Mean negative log-likelihood.
        reference_nll: The reference's.
        kl: Mean ``KL(reference || model)``.
    """

    first: int
    last: int
    nll: float
    reference_nll: float | None
    kl: float | None


@torch.no_grad()
def score_windows(model: Any, reference: Any | None, rows: Tensor, device: torch.device) -> TokenScores:
    """Run both models over the windows.

    Args:
        model: A causal language model of transformers.
        reference: The one to compare with, or ``None``.
        rows: ``int64 [windows, context]``.
        device: Where both are.
    """
    names = ["nll"] if reference is None else ["nll", "reference_nll", *Divergence._fields]
    found = {name: np.empty((rows.shape[0], rows.shape[1] - 1), np.float32) for name in names}
    for index, row in enumerate(rows.split(1)):
        window = row.to(device)
        logits = model(input_ids=window, use_cache=False).logits
        found["nll"][index] = _nll(logits, window)
        if reference is None:
            continue
        expected = reference(input_ids=window, use_cache=False).logits
        found["reference_nll"][index] = _nll(expected, window)
        for first in range(0, rows.shape[1] - 1, POSITIONS_AT_ONCE):
            part = slice(first, min(first + POSITIONS_AT_ONCE, rows.shape[1] - 1))
            compared = divergence(logits[0, part], expected[0, part])
            for name, values in zip(Divergence._fields, compared, strict=True):
                found[name][index, part] = values.float().cpu().numpy()
    return TokenScores(**found)


def _nll(logits: Tensor, window: Tensor) -> Scores:
    """``float32 [context - 1]``, a part of the positions at a time."""
    length = window.shape[1]
    starts = range(0, length - 1, POSITIONS_AT_ONCE)
    parts = (slice(first, min(first + POSITIONS_AT_ONCE, length - 1) + 1) for first in starts)
    return torch.cat([window_nll(logits[:, part], window[:, part])[0] for part in parts]).cpu().numpy()


def by_position(scores: TokenScores) -> tuple[Bucket, ...]:
    """Means over positions 1, 2-3, 4-7, ..., each twice as many as the one before."""
    buckets: list[Bucket] = []
    first, end = 1, scores.nll.shape[1] + 1
    while first < end:
        part = slice(first - 1, min(2 * first, end) - 1)
        kinds = (scores.nll, scores.reference_nll, scores.kl)
        nll, reference, kl = (None if kind is None else mean(kind[:, part]) for kind in kinds)
        assert nll is not None
        buckets.append(Bucket(first, part.stop, nll, reference, kl))
        first *= 2
    return tuple(buckets)


def mean(values: Scores) -> float:
    """In float64."""
    return float(values.mean(dtype=np.float64))
