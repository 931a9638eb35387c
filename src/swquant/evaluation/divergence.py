"""How far one model's next-token distributions are from another's."""

from __future__ import annotations

from torch import Tensor


def divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(reference || model)`` in nats at each position, and whether both rank the same token first.

    Args:
        logits: ``[..., vocabulary]`` of the model.
        reference: The same of the reference.

    Returns:
        ``float32 [...]`` and ``bool [...]``.
    """
    expected = reference.float().log_softmax(-1)
    kl = (expected.exp() * (expected - logits.float().log_softmax(-1))).sum(-1)
    return kl, logits.argmax(-1) == reference.argmax(-1)
