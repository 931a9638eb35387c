"""How far one model's next-token distributions are from another's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FIRST_CHOICES = 5


class Divergence(NamedTuple):
    """Each of the logits' shape without the vocabulary.

    Attributes:
        kl: ``KL(reference || model)`` in nats.
        reverse_kl: ``KL(model || reference)`` in nats.
        top1: Whether both rank the same token first.
        top5: Share of the reference's five likeliest tokens that are among the model's five.
    """

    kl: Tensor
    reverse_kl: Tensor
    top1: Tensor
    top5: Tensor


def divergence(logits: Tensor, reference: Tensor) -> Divergence:
    """Compare the distributions at each position.

    Args:
        logits: ``[..., vocabulary]`` of the model.
        reference: The same of the reference.
    """
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    gap = expected - found
    kl, reverse = (expected.exp() * gap).sum(-1), -(found.exp() * gap).sum(-1)
    count = min(FIRST_CHOICES, logits.shape[-1])
    ours, theirs = (values.topk(count, -1).indices for values in (logits, reference))
    shared = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)
    return Divergence(kl, reverse, logits.argmax(-1) == reference.argmax(-1), shared)
