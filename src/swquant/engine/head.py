"""From the hidden states after the last block, of both models, to perplexity, KL and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from swquant.checkpoint.source import Tensors
from swquant.model.calls import Front, Tail
from swquant.model.ends import as_output
from swquant.report import Quality

LOGITS = 1 << 24
"""Logits of each model that are in memory at once."""


@torch.no_grad()
def measure(front: Front, checkpoint: Tensors, cached: tuple[Tensor, Tensor], tokens: Tensor) -> Quality:
    """Compare the quantized model's predictions with the original's and with the text.

    ``KL = sum_v softmax(r)_v (log softmax(r)_v - log softmax(q)_v)`` for logits ``r`` of the original and ``q`` of the
    quantized model, a mean over tokens.

    Args:
        front: The model without its blocks.
        checkpoint: The original's weights; the head as it is stored is that of the quantized model.
        cached: Hidden states of the original and of the quantized model after the last block,
            ``[samples, tokens, dim]``.
        tokens: ``int64 [samples, tokens]``, the text.
    """
    heads = Heads.load(front, checkpoint)
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for sample, text in enumerate(tokens):
        labels, states = text[1:], [cache[sample, :-1].to(front.device) for cache in cached]
        for rows in heads.chunks(len(labels)):
            original, quantized = heads.log_probabilities(states[0][rows], states[1][rows])
            wanted = labels[rows].to(front.device)
            sums += (
                torch.stack(
                    [
                        functional.nll_loss(original, wanted, reduction="sum"),
                        functional.nll_loss(quantized, wanted, reduction="sum"),
                        _divergence(original, quantized),
                        (original.argmax(-1) == quantized.argmax(-1)).sum(),
                    ]
                )
                .cpu()
                .double()
            )
            count += len(wanted)
    before, after, kl, agreed = (sums / count).tolist()
    return Quality(
        tokens=count,
        perplexity_reference=math.exp(min(700.0, before)),
        perplexity=math.exp(min(700.0, after)),
        kl=kl,
        top1=agreed,
    )


@torch.no_grad()
def predictions(front: Front, checkpoint: Tensors, hidden: Tensor) -> Tensor:
    """The quantized model's logits ``float32 [samples, tokens, vocabulary]`` on the CPU.

    Args:
        front: The model without its blocks.
        checkpoint: The original's weights.
        hidden: The quantized model's hidden states after the last block, ``[samples, tokens, dim]``.
    """
    tail = Tail.load(front, checkpoint, stored=True)
    return torch.stack([tail.logits(states.to(front.device)).cpu() for states in hidden])


def _divergence(original: Tensor, quantized: Tensor) -> Tensor:
    """``KL(original || quantized)`` of log-probabilities ``[tokens, vocabulary]``, summed over tokens."""
    return (original.exp() * (original - quantized)).sum()


@dataclass(frozen=True)
class Heads:
    """What follows the last block in both models, weights in the dtypes that they have on disk.

    Attributes:
        original: The original's.
        stored: The same as the output stores it, which differs where a rotation is merged in or the head is quantized.
    """

    original: Tail
    stored: Tail

    @staticmethod
    def load(front: Front, checkpoint: Tensors) -> Heads:
        """Read both; where they are equal, there is one in memory."""
        original = Tail.load(front, checkpoint)
        weight, name = next(iter(original.head.values())), front.skeleton.head_weight
        kept = as_output(weight, front.skeleton.ends.get(name), checkpoint.tensors[name].dtype)
        return Heads(original, original if kept is weight else Tail(front, dict.fromkeys(original.head, kept)))

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Ranges of so many tokens whose logits are in memory at once."""
        size = max(1, LOGITS // self.stored.vocabulary)
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens))

    def log_probabilities(self, reference: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of both models, ``[tokens, vocabulary]``, from their hidden states ``[tokens, dim]``."""
        with torch.no_grad():
            original = self.original.logits(reference).log_softmax(-1)
        return original, self.stored.logits(hidden).log_softmax(-1)

    @torch.no_grad()
    def divergence(self, reference: Tensor, hidden: Tensor) -> Tensor:
        """Mean over all tokens of ``KL(original || quantized)``.

        Args:
            reference: The original's hidden states after the last block, ``[samples, tokens, dim]``.
            hidden: The quantized model's.
        """
        total = torch.zeros((), dtype=torch.float64)
        states, targets = hidden.flatten(0, 1), reference.flatten(0, 1)
        for rows in self.chunks(len(states)):
            total += _divergence(*self.log_probabilities(targets[rows], states[rows])).cpu().double()
        return (total / len(states)).float()

    def gradient(self, reference: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`divergence`, and its gradient with respect to ``hidden``, through the model's own code."""
        states, targets = hidden.flatten(0, 1), reference.flatten(0, 1)
        total, slope = torch.zeros((), dtype=torch.float64), torch.empty_like(states)
        for rows in self.chunks(len(states)):
            leaf = states[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = _divergence(*self.log_probabilities(targets[rows], leaf))
            slope[rows] = torch.autograd.grad(loss, leaf)[0].div_(len(states))
            total += loss.detach().cpu().double()
        return (total / len(states)).float(), slope.view(hidden.shape)
