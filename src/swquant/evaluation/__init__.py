"""Measuring a model: perplexity, how far it is from the model it was made of, tasks, and what was recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swquant.checkpoint.opening import SourceOptions
from swquant.checkpoint.reader import find_model
from swquant.device import resolve_device
from swquant.errors import SwquantError
from swquant.evaluation.gain import recovered_by_metric
from swquant.evaluation.harness import TaskScore, run_tasks
from swquant.evaluation.models import load_model
from swquant.evaluation.recovered import Contrast, Recovered
from swquant.evaluation.results import Evaluation, Gain, Measured
from swquant.evaluation.scores import TokenScores, score_windows
from swquant.evaluation.texts import measured_windows
from swquant.tokenizer import Reading, load_tokenizer, open_reading

__all__ = [
    "Contrast",
    "Evaluation",
    "Gain",
    "Measured",
    "Recovered",
    "TaskScore",
    "What",
    "evaluate",
    "measure",
    "measure_gain",
]

LONGEST = 2048


@dataclass(frozen=True)
class What:
    """What to measure, and how.

    Attributes:
        text: A name of a protocol (``wikitext2``, ``c4``, ``c4-new``, ``ptb``, ``ptb-new``), a text or jsonl file, or a
            datasets name; ``None`` measures no text.
        tasks: Names of lm-eval's tasks and paths of task files.
        context: Tokens of a window; by default 2048, or the model's limit if that is less.
        windows: Measure on the first so many windows only.
        items: Ask only the first so many items of each task.
        device: Where to compute.
        packed: Keep the models' linears packed, as :func:`swquant.load` has them; never the original's.
        trust_remote_code: Run the Python code that comes with the models.
    """

    text: str | None = None
    tasks: Sequence[str] = ()
    context: int | None = None
    windows: int | None = None
    items: int | None = None
    device: str = "auto"
    packed: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.text is None and not self.tasks:
            raise SwquantError("there is nothing to measure on: give a text (--text), tasks (--tasks), or both")
        for name, value in (("windows", self.windows), ("items", self.items)):
            if value is not None and value < 1:
                raise SwquantError(f"{name} is {value}, expected 1 or more")


def evaluate(
    model: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    context: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    packed: bool = False,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure a model by the field's protocol: the text tokenised once, cut in windows that do not overlap.

    Args:
        model: A model directory, quantized or not.
        text: As :attr:`What.text`.
        reference: The original model's directory.
        context: Tokens of a window; by default 2048, or the model's limit if that is less.
        windows: Measure on the first so many windows only.
        device: Where to compute.
        packed: Keep the model's linears packed, as :func:`swquant.load` has them.
        trust_remote_code: Run the Python code that comes with the models.

    Raises:
        SwquantError: If a model does not load, the text is too short, or the two vocabularies differ.
    """
    what = What(text, (), context, windows, None, device, packed, trust_remote_code)
    found = measure(model, what, reference=reference).text
    assert found is not None
    return found


def measure(
    model: str | Path,
    what: What,
    *,
    reference: str | Path | None = None,
    source_options: SourceOptions | None = None,
) -> Measured:
    """Measure one model; against its original if that is given and there is a text.

    Args:
        model: A model directory, quantized or not.
        what: On what to measure.
        reference: The original's directory or hub name.
        source_options: Which of the original's files, and how to read them.

    Raises:
        SwquantError: As :func:`evaluate`; or a task does not run.
    """
    original = None if reference is None or what.text is None else _load(reference, what, source_options)[1]
    return _measure(Path(model), what, original, packed=what.packed)


def measure_gain(
    models: Sequence[str | Path],
    baselines: Sequence[str | Path],
    reference: str | Path,
    what: What,
    source_options: SourceOptions | None = None,
) -> Gain:
    """Measure what was recovered; the original and one more model are in memory at a time.

    Args:
        models: Quantized with the thing in question: one, or one for each of several seeds.
        baselines: Quantized without it: one, or one for each seed, in the same order.
        reference: The original.
        what: On what to measure.
        source_options: As of :func:`measure`.

    Raises:
        SwquantError: As :func:`measure`.
    """
    place, original = _load(reference, what, source_options)
    tokenizer = load_tokenizer(place, trusted=what.trust_remote_code) if what.tasks else None
    runs = run_tasks(original, tokenizer, what.tasks, items=what.items) if what.tasks else ()
    full = Measured(str(reference), None, tuple(run.score for run in runs), runs=runs)
    sides = [
        tuple(_measure(Path(model), what, original, packed=what.packed) for model in side)
        for side in (models, baselines)
    ]
    return Gain(sides[0], sides[1], full, recovered_by_metric(sides[0], sides[1], full))


def _load(reference: str | Path, what: What, options: SourceOptions | None) -> tuple[Path, Any]:
    """Where the original is, and the original."""
    given = options or SourceOptions()
    trusted = what.trust_remote_code
    place = find_model(reference, given.revision, given.subfolder, trusted=trusted)
    return place, load_model(place, resolve_device(what.device), dequantize=given.dequantize, trusted=trusted)


def _measure(directory: Path, what: What, original: Any | None, *, packed: bool) -> Measured:
    place = resolve_device(what.device)
    model = load_model(directory, place, packed=packed, trusted=what.trust_remote_code)
    reading = open_reading(directory, trusted=what.trust_remote_code)
    scores, notes = (
        (None, reading.notes) if what.text is None else _scores(directory, model, reading, original, what, place)
    )
    runs = run_tasks(model, reading.tokenizer, what.tasks, items=what.items) if what.tasks else ()
    text = None if scores is None else Evaluation.of(str(directory), str(what.text), scores)
    return Measured(str(directory), text, tuple(run.score for run in runs), notes, scores, runs)


def _scores(
    directory: Path, model: Any, reading: Reading, original: Any | None, what: What, place: torch.device
) -> tuple[TokenScores, tuple[str, ...]]:
    """Of the windows' tokens, and what to know of how the text was read."""
    limit = int(model.config.max_position_embeddings)
    context = what.context or min(LONGEST, limit)
    if not 2 <= context <= limit:
        raise SwquantError(f"the context is {context} tokens, expected 2 to {limit}, the model's limit")
    if original is not None and original.config.vocab_size != model.config.vocab_size:
        raise SwquantError(
            f"the original has {original.config.vocab_size} tokens and {directory} {model.config.vocab_size}; "
            "give the model that it was made of"
        )
    assert what.text is not None
    rows = measured_windows(what.text, reading.tokenizer, context, what.windows, reading.begin)
    return score_windows(model, original, rows, place), reading.notes_on(rows)
