"""From both streams behind the last block to perplexity, KL and agreement, a slice of the vocabulary at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from swquant.checkpoint.rotation import Source
from swquant.engine.skeleton import Skeleton
from swquant.report import Quality

VOCABULARY_ROWS = 4096
LOGITS = 1 << 24
"""Logits of each model that are in memory at once in training."""


@dataclass
class _Side:
    """What is known of one model's next-token distributions after part of the vocabulary; all ``[tokens]``."""

    peak: Tensor
    total: Tensor
    choice: Tensor
    target: Tensor

    @staticmethod
    def begin(tokens: int) -> _Side:
        return _Side(
            torch.full((tokens,), -math.inf),
            torch.zeros(tokens),
            torch.zeros(tokens, dtype=torch.long),
            torch.zeros(tokens),
        )

    @property
    def log_total(self) -> Tensor:
        return self.peak.double() + self.total.double().log()


@torch.no_grad()
def measure(
    skeleton: Skeleton,
    checkpoint: Source,
    streams: tuple[Tensor, Tensor],
    tokens: Tensor,
    device: torch.device,
) -> Quality:
    """Compare the quantized model's predictions with the original's and with the text.

    With logits ``r`` of the original and ``q`` of the quantized model, in one pass over the vocabulary,
    ``KL = sum_v softmax(r)_v (r_v - q_v) - logsumexp(r) + logsumexp(q)``.

    Args:
        skeleton: The model's code.
        checkpoint: The original's weights; the tail is that of both models, and the head as it is stored that of the
            quantized one.
        streams: The reference and the quantized stream behind the last block, ``[samples, tokens, dim]``.
        tokens: ``int64 [samples, tokens]``, the text.
        device: Where to compute.
    """
    samples, length = tokens.shape
    labels = tokens[:, 1:].flatten()
    count = samples * (length - 1)
    reference, quantized = _Side.begin(count), _Side.begin(count)
    cross = torch.zeros(count)
    tail = _Tail.load(skeleton, checkpoint, device)
    for first, slices in _head_rows(skeleton, checkpoint):
        heads = [part.to(device).T for part in slices]
        for start in range(samples):
            part = slice(start * (length - 1), (start + 1) * (length - 1))
            logits = [
                tail(stream[start : start + 1, :-1].to(device)).flatten(0, 1) @ head
                for stream, head in zip(streams, heads, strict=True)
            ]
            kept = _update(reference, part, logits[0], labels[part], first)
            cross[part] = cross[part] * kept + _weighted_gap(logits, reference.peak[part])
            _update(quantized, part, logits[1], labels[part], first)
    kl = cross.double() / reference.total.double() - reference.log_total + quantized.log_total
    return Quality(
        tokens=count,
        perplexity_reference=_perplexity(reference),
        perplexity=_perplexity(quantized),
        kl=float(kl.mean()),
        top1=float((reference.choice == quantized.choice).double().mean()),
    )


@torch.no_grad()
def predictions(skeleton: Skeleton, checkpoint: Source, hidden: Tensor, device: torch.device) -> Tensor:
    """The quantized model's logits ``float32 [samples, tokens, vocabulary]`` on the CPU.

    Args:
        skeleton: The model's code.
        checkpoint: The original's weights.
        hidden: The quantized stream behind the last block, ``[samples, tokens, dim]``.
        device: Where to compute.
    """
    normed = _Tail.load(skeleton, checkpoint, device)(hidden.to(device))
    return torch.cat([(normed @ kept.to(device).T).cpu() for _, (_, kept) in _head_rows(skeleton, checkpoint)], -1)


def _update(side: _Side, part: slice, logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Take in the logits of vocabulary entries from ``first`` on; returns the factor on what was summed before."""
    logits = logits.cpu()
    top, choice = logits.max(1)
    before = side.peak[part]
    peak = torch.maximum(before, top)
    kept = (before - peak).exp()
    side.total[part] = side.total[part] * kept + (logits - peak.unsqueeze(1)).exp().sum(1)
    side.choice[part] = torch.where(top > before, choice + first, side.choice[part])
    side.peak[part] = peak
    inside = (labels >= first) & (labels < first + logits.shape[1])
    own = logits.gather(1, (labels - first).clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    side.target[part] = torch.where(inside, own, side.target[part])
    return kept


def _weighted_gap(logits: list[Tensor], peak: Tensor) -> Tensor:
    reference, quantized = (part.cpu() for part in logits)
    return ((reference - peak.unsqueeze(1)).exp() * (reference - quantized)).sum(1)


def _perplexity(side: _Side) -> float:
    return math.exp(min(700.0, float((side.log_total - side.target.double()).mean())))


def _head_rows(skeleton: Skeleton, checkpoint: Source) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Slices of the head, each with its first row's index: as it is read, and in the dtype in which it is stored."""
    name = skeleton.head_weight
    rows = checkpoint.tensors[name].shape[0]
    for first in range(0, rows, VOCABULARY_ROWS):
        read = checkpoint.rows(name, torch.arange(first, min(first + VOCABULARY_ROWS, rows)))
        yield first, (read.float(), read.to(checkpoint.tensors[name].dtype).float())


@dataclass(frozen=True)
class _Tail:
    """The modules between the last block and the head."""

    modules: tuple[torch.nn.Module, ...]
    params: tuple[dict[str, Tensor], ...]

    @staticmethod
    def load(skeleton: Skeleton, checkpoint: Source, device: torch.device) -> _Tail:
        modules = tuple(skeleton.model.get_submodule(name) for name in skeleton.family.tail)
        params = tuple(
            {key: checkpoint.read(f"{name}.{key}").float().to(device) for key, _ in module.named_parameters()}
            for name, module in zip(skeleton.family.tail, modules, strict=True)
        )
        return _Tail(modules, params)

    def __call__(self, hidden: Tensor) -> Tensor:
        for module, params in zip(self.modules, self.params, strict=True):
            hidden = functional_call(module, params, (hidden,))
        return hidden


@dataclass(frozen=True)
class Heads:
    """What follows the last block in both models, held in memory in the dtypes that the weights have on disk.

    Attributes:
        tail: The modules in front of the head, the same for both.
        original: The original's head, ``[vocabulary, dim]``.
        stored: The same as the output stores it, which differs where the checkpoint is seen through a rotation.
    """

    tail: _Tail
    original: Tensor
    stored: Tensor

    @staticmethod
    def load(skeleton: Skeleton, checkpoint: Source, device: torch.device) -> Heads:
        """Read both."""
        original = checkpoint.read(skeleton.head_weight).to(device)
        stored = original.to(checkpoint.tensors[skeleton.head_weight].dtype)
        return Heads(_Tail.load(skeleton, checkpoint, device), original, stored)

    def divergence(self, reference: Tensor, hidden: Tensor) -> Tensor:
        """Mean over all tokens of ``KL(original || quantized)``.

        Args:
            reference: The original's hidden states behind the last block, ``[samples, tokens, dim]``.
            hidden: The quantized model's.
        """
        with torch.no_grad():
            return self._gap(self.tail(reference).flatten(0, 1), self.tail(hidden).flatten(0, 1), None)

    def gradient(self, reference: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`divergence`, and its gradient with respect to ``hidden``.

        With the logits ``q = z W'`` of the quantized model, ``d KL / d q = softmax(q) - softmax(r)``, so that the
        gradient with respect to ``z`` needs no graph over the vocabulary; that of the tail is left to autograd.
        """
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.tail(leaf)
        slope = torch.empty_like(normed)
        with torch.no_grad():
            loss = self._gap(self.tail(reference).flatten(0, 1), normed.flatten(0, 1), slope.flatten(0, 1))
        return loss, torch.autograd.grad(normed, leaf, slope)[0]

    def _gap(self, reference: Tensor, normed: Tensor, slope: Tensor | None) -> Tensor:
        """Mean divergence of ``[tokens, dim]`` in front of the heads, a chunk of tokens at a time; fills ``slope``."""
        count, total = len(normed), torch.zeros((), dtype=torch.float64)
        for part in torch.arange(count).split(max(1, LOGITS // len(self.stored))):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            expected = _logits(reference[rows], self.original).log_softmax(-1)
            found = _logits(normed[rows], self.stored).log_softmax(-1)
            likely = expected.exp()
            total += expected.sub_(found).mul_(likely).sum(-1).cpu().double().sum()
            if slope is not None:
                slope[rows] = _times(found.exp_().sub_(likely).div_(count), self.stored)
        return (total / count).float()


def _logits(normed: Tensor, head: Tensor) -> Tensor:
    """``normed @ head.T`` in float32, for a head in any dtype."""
    out = normed.new_empty(len(normed), len(head))
    for first in range(0, len(head), VOCABULARY_ROWS):
        rows = slice(first, first + VOCABULARY_ROWS)
        out[:, rows] = normed @ head[rows].float().T
    return out


def _times(slope: Tensor, head: Tensor) -> Tensor:
    """``slope @ head`` in float32, for a head in any dtype."""
    out = slope.new_zeros(len(slope), head.shape[1])
    for first in range(0, len(head), VOCABULARY_ROWS):
        rows = slice(first, first + VOCABULARY_ROWS)
        out.addmm_(slope[:, rows], head[rows].float())
    return out
