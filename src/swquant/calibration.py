"""Samples to train on and to measure on: windows of a text's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.seeds import generator

LEAST_SHARE = 4
"""A text must hold at least one in so many of the tokens that the samples take; windows overlap below the whole."""


EVALUATION_SHARE = 5
"""At most one in so many windows of a calibration text is held out for evaluation."""


def calibration_tokens(tokens: Tensor, seq_len: int, held: int) -> tuple[Tensor, Tensor]:
    """A text's tokens to train on, and those of whole windows of ``seq_len`` to measure on.

    Args:
        tokens: All of them.
        seq_len: Tokens of a window.
        held: Windows to hold out, if the text is long enough.
    """
    kept = len(tokens) - seq_len * min(held, len(tokens) // seq_len // EVALUATION_SHARE)
    return tokens[:kept], tokens[kept:]


def begun(windows: Tensor, begin: int | None) -> Tensor:
    """Windows of a text, ``int64 [windows, tokens]``, each of which begins with the token ``begin``, if that is given.

    It takes the place of the last token, so that the windows stay as long as they are; one that begins with it already
    stays as it is.
    """
    if begin is None:
        return windows
    first = torch.full_like(windows[:, :1], begin)
    return torch.where(windows[:, :1] == begin, windows, torch.cat((first, windows[:, :-1]), 1))


def sample_windows(tokens: Tensor, samples: int, seq_len: int, seed: int, begin: int | None = None) -> Tensor:
    """Random windows of a text, ``int64 [samples, seq_len]``; they overlap only where the text is too short not to.

    Args:
        tokens: Of the text.
        samples: How many.
        seq_len: Tokens of each.
        seed: Of the draws.
        begin: See :func:`begun`.

    Raises:
        SwquantError: If the text has fewer than a quarter of the tokens that the samples take, or than one window.
    """
    needed = max(seq_len, -(-samples * seq_len // LEAST_SHARE))
    if len(tokens) < needed:
        raise SwquantError(
            f"the calibration text is too short: {samples} samples of {seq_len} tokens need at least {needed} tokens, "
            f"{len(tokens)} are left for them; give more text, or fewer or shorter samples"
        )
    rng = generator(seed, "windows")
    windows = len(tokens) // seq_len
    if windows >= samples:
        starts = torch.randperm(windows, generator=rng)[:samples] * seq_len
    else:
        starts = torch.randint(len(tokens) - seq_len + 1, (samples,), generator=rng)
    return begun(torch.stack([tokens[start : start + seq_len] for start in starts.tolist()]), begin)


def eval_windows(tokens: Tensor, seq_len: int, limit: int | None, begin: int | None = None) -> Tensor:
    """Consecutive windows from the start, ``int64 [windows, seq_len]``; what does not fill a window is dropped.

    Args:
        tokens: Of the text.
        seq_len: Tokens of a window.
        limit: Only the first so many windows.
        begin: See :func:`begun`.

    Raises:
        SwquantError: If the text does not fill one.
    """
    count = len(tokens) // seq_len
    if not count:
        raise SwquantError(
            f"the evaluation text is too short: a window needs {seq_len} tokens, it has {len(tokens)}; "
            "give more text or a shorter context"
        )
    return begun(tokens[: count * seq_len].view(count, seq_len)[:limit], begin)
