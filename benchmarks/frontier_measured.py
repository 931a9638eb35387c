"""One evaluator for what every side of ``frontier.py`` makes, whatever it wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from swquant import SwquantError
from swquant.evaluation.models import load_model
from swquant.evaluation.results import Evaluation
from swquant.evaluation.scores import score_windows
from swquant.evaluation.texts import measured_windows
from swquant.quant.grid import group
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import open_reading
from texts import KINDS

CPU = torch.device("cpu")
PROMPTS, PROMPT, GENERATED = 4, 64, 64
"""Of each kind of text: prompts, their tokens, and the tokens that are generated behind each."""


class Head:
    """The original's answers to windows that it has read: its head on the states that it read them to."""

    def __init__(self, model: Any, rows: Iterable[Tensor]) -> None:
        self._head, self._states = model.get_output_embeddings(), dict[tuple[int, ...], Tensor]()
        reached: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, given: reached.append(given[0]))
        for row in rows:
            logits = model(input_ids=row, use_cache=False).logits
            self._states[tuple(row[0].tolist())] = reached.pop()
            if not torch.equal(logits, self._head(self._states[tuple(row[0].tolist())])):
                raise SwquantError("the original does more to its head's outputs than its head; it is not measured")
            reached.clear()
        hook.remove()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """As the model answers."""
        return SimpleNamespace(logits=self._head(self._states[tuple(input_ids[0].tolist())]))


class Measure:
    """What is measured on, and what the original says to it, which is found once.

    Args:
        model: The original's directory.
        texts: Of the three kinds.
        count: Windows of each kind, spread over its text.
        length: Their tokens.

    Raises:
        SwquantError: A text is too short.
    """

    @torch.no_grad()
    def __init__(self, model: Path, texts: Path, count: int, length: int) -> None:
        reading, self.model = open_reading(model), model
        self.windows = dict[str, Tensor]()
        for kind in KINDS:
            rows = measured_windows(str(texts / f"{kind}.txt"), reading.tokenizer, length, None, reading.begin)
            if len(rows) < count:
                raise SwquantError(f"{texts / kind}.txt has {len(rows)} windows of {length} tokens, expected {count}")
            self.windows[kind] = rows[torch.arange(count) * (len(rows) // count)]
        original = load_model(model, CPU)
        self.prompts = torch.cat([rows[:PROMPTS, :PROMPT] for rows in self.windows.values()])
        self.generated = generated(original, self.prompts)
        self.original = Head(original, torch.cat([*self.windows.values()]).split(1))

    def __call__(self, result: Path, spec: QuantSpec | None) -> dict[str, Any]:
        """How far a result is from the original, in nats per token.

        Args:
            result: The directory of what was made of it.
            spec: The grid that each group of its weights has to lie on; ``None`` does not check.

        Raises:
            SwquantError: It does not load, or has other weights than it should have.
        """
        model = opened(result)
        if spec is not None:
            check_weights(load_model(self.model, CPU), model, spec)
        kl, lost, top1 = dict[str, float](), dict[str, float](), dict[str, float]()
        for kind, rows in self.windows.items():
            found = Evaluation.of(str(result), kind, score_windows(model, self.original, rows, CPU))
            assert found.kl is not None
            assert found.top1 is not None
            assert found.reference_perplexity is not None
            kl[kind] = round(found.kl, 5)
            lost[kind] = round(math.log(found.perplexity / found.reference_perplexity), 5)
            top1[kind] = round(found.top1, 5)
        same = common(self.generated, generated(model, self.prompts))
        return {"kl": kl, "nats": lost, "top1": top1, "agreement": round(same, 4)}


def opened(directory: Path) -> Any:
    """A result in float32, read as a source where its layout is none that swquant writes (act-order)."""
    try:
        return load_model(directory, CPU)
    except SwquantError as first:
        try:
            return load_model(directory, CPU, dequantize=True)
        except SwquantError as second:
            raise SwquantError(f"{first}; as a source: {second}") from second


def check_weights(reference: Any, model: Any, spec: QuantSpec) -> None:
    """Check that every linear of the blocks lies on a grid of the asked width, and all else is as it was.

    Raises:
        SwquantError: One does not, or something else is not.
    """
    found = dict(model.named_parameters())
    for name, weight in reference.named_parameters():
        other = found[name].detach()
        if ".layers." in name and weight.dim() == 2:
            good = most_levels(other, spec) <= 2**spec.bits and not torch.equal(other, weight)
        else:
            good = torch.allclose(other, weight, rtol=1e-3, atol=1e-6)
        if not good:
            raise SwquantError(f"{name} lies off the {spec.bits}-bit grid, or is not as it was")


def most_levels(weight: Tensor, spec: QuantSpec) -> int:
    """The greatest number of different values in a group."""
    values = group(weight, spec).sort(dim=-1).values
    return int((values.diff(dim=-1) != 0).sum(-1).max()) + 1


@torch.no_grad()
def generated(model: Any, prompts: Tensor) -> Tensor:
    """The likeliest tokens one after the other, ``int64 [prompts, GENERATED]``, also beyond an end of text."""
    settings = GenerationConfig(max_new_tokens=GENERATED, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)[:, PROMPT:]


def common(expected: Tensor, found: Tensor) -> float:
    """The mean share of tokens before the first that differs."""
    return float((expected == found).cumprod(1).float().mean())
