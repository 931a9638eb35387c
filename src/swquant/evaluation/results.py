"""What an evaluation found, for people and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from swquant.evaluation.harness import TaskRun, TaskScore
from swquant.evaluation.recovered import Recovered
from swquant.evaluation.scores import Bucket, TokenScores, by_position, mean


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a text; all but the first six are of a comparison with a reference, ``None`` without one.

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
        reverse_kl: Mean of ``KL(model || reference)``.
        top5: Mean share of the reference's five likeliest tokens that are among the model's five.
        positions: Means by the tokens' positions in the windows.
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
    reverse_kl: float | None = None
    top5: float | None = None
    positions: Sequence[Bucket] = ()

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def of(model: str, text: str, scores: TokenScores) -> Evaluation:
        """The means of token scores."""
        windows, predicted = scores.nll.shape
        against = (scores.kl, scores.top1, scores.reverse_kl, scores.top5)
        kl, top1, reverse, top5 = (None if values is None else mean(values) for values in against)
        return Evaluation(
            model=model,
            text=text,
            context=predicted + 1,
            windows=windows,
            tokens=scores.nll.size,
            perplexity=math.exp(mean(scores.nll)),
            reference_perplexity=None if scores.reference_nll is None else math.exp(mean(scores.reference_nll)),
            kl=kl,
            top1=top1,
            reverse_kl=reverse,
            top5=top5,
            positions=by_position(scores),
        )


@dataclass(frozen=True)
class Measured:
    """One model, measured on a text, on tasks, or on both.

    Attributes:
        model: The directory.
        text: What was measured on the text.
        tasks: Each task's score.
        notes: What to know of how the model reads text, see :class:`swquant.tokenizer.Reading`.
        scores: What ``text`` was computed from, token by token.
        runs: What ``tasks`` was computed from, item by item.
    """

    model: str
    text: Evaluation | None
    tasks: tuple[TaskScore, ...]
    notes: tuple[str, ...] = ()
    scores: TokenScores | None = field(default=None, repr=False)
    runs: tuple[TaskRun, ...] = field(default=(), repr=False)

    def to_mapping(self) -> dict[str, object]:
        """The text's evaluation as :meth:`Evaluation.to_json` has it, with the tasks beside it."""
        values: dict[str, object] = {"model": self.model} if self.text is None else asdict(self.text)
        tasks = {"tasks": [asdict(task) for task in self.tasks]} if self.tasks else {}
        return values | tasks | ({"notes": list(self.notes)} if self.notes else {})

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_mapping(), indent=1)


@dataclass(frozen=True)
class Gain:
    """What something recovers of what quantization without it lost.

    Attributes:
        models: Quantized with it, one per seed.
        baselines: Quantized without it, one per seed.
        original: What they were made of, on the tasks.
        recovered: By metric: ``log-perplexity``, ``KL``, ``TASK METRIC``, ``mean of tasks``.
    """

    models: Sequence[Measured]
    baselines: Sequence[Measured]
    original: Measured
    recovered: Mapping[str, Recovered]

    def to_json(self) -> str:
        """One JSON object."""
        values = {
            "models": [model.to_mapping() for model in self.models],
            "baselines": [model.to_mapping() for model in self.baselines],
            "original": self.original.to_mapping(),
            "recovered": {name: asdict(found) for name, found in self.recovered.items()},
        }
        return json.dumps(values, indent=1)
