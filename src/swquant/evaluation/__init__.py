"""Measuring a model on text: perplexity, and how far it is from the model it was made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from swquant.calibration import eval_windows, load_tokenizer, read_text, tokenize
from swquant.device import resolve_device
from swquant.errors import SwquantError
from swquant.evaluation.divergence import divergence
from swquant.evaluation.models import load_model
from swquant.evaluation.perplexity import window_nll

__all__ = ["Evaluation", "evaluate"]

LONGEST = 2048


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        model: The directory.
        text: The text's source.
        context: Tokens of a window.
        windows: Number of windows.
        tokens: Predicted tokens.
        perplexity: ``exp`` of the mean negative log-likelihood over them.
        reference_perplexity: The same of the reference.
        kl: Mean of ``KL(reference || model)`` per token, in nats.
        top1: Share of tokens for which both rank the same token first.
    """

    model: str
    text: str
    context: int
    windows: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)


@torch.no_grad()
def evaluate(
    model: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    context: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    packed: bool = False,
) -> Evaluation:
    """Measure a model by the field's protocol: the text tokenised once, cut in windows that do not overlap.

    Args:
        model: A model directory, quantized or not.
        text: A text or jsonl file, or a datasets name.
        reference: The original model's directory.
        context: Tokens of a window; by default 2048, or the model's limit if that is less.
        windows: Measure on the first so many windows only.
        device: Where to compute.
        packed: Keep the model's linears packed, as :func:`swquant.load` has them.

    Raises:
        SwquantError: If a model does not load, the text is too short, or the two vocabularies differ.
    """
    place = resolve_device(device)
    directory = Path(model)
    measured = load_model(directory, place, packed=packed)
    other = None if reference is None else load_model(Path(reference), place)
    limit = int(measured.config.max_position_embeddings)
    context = context or min(LONGEST, limit)
    if not 2 <= context <= limit:
        raise SwquantError(f"the context is {context} tokens, expected 2 to {limit}, the model's limit")
    if other is not None and other.config.vocab_size != measured.config.vocab_size:
        raise SwquantError(
            f"{reference} has {other.config.vocab_size} tokens and {model} {measured.config.vocab_size}; "
            "give the model that it was made of"
        )
    rows = eval_windows(tokenize(load_tokenizer(directory), read_text(text)), context, windows)
    nll = reference_nll = kl = same = 0.0
    for row in rows.split(1):
        logits = measured(input_ids=row.to(place)).logits
        nll += float(window_nll(logits, row).double().sum())
        if other is not None:
            expected = other(input_ids=row.to(place)).logits
            reference_nll += float(window_nll(expected, row).double().sum())
            gap, agreed = divergence(logits[:, :-1], expected[:, :-1])
            kl += float(gap.double().sum())
            same += float(agreed.sum())
    tokens = rows.shape[0] * (context - 1)
    result = Evaluation(str(model), text, context, rows.shape[0], tokens, math.exp(nll / tokens))
    if other is None:
        return result
    expected_perplexity = math.exp(reference_nll / tokens)
    return replace(result, reference_perplexity=expected_perplexity, kl=kl / tokens, top1=same / tokens)
