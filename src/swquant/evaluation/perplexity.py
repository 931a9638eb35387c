"""Negative log-likelihood of text under a model's logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def window_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """``-log p(token)`` of each token but a window's first, given those before it.

    Args:
        logits: ``[windows, tokens, vocabulary]``.
        tokens: ``int64 [windows, tokens]``.

    Returns:
        ``float32 [windows, tokens - 1]``, on the device of the logits, in nats.
    """
    labels = tokens[:, 1:].to(logits.device)
    flat = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape)
