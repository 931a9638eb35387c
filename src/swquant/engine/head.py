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
