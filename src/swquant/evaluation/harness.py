"""Zero-shot tasks through lm-eval, on a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swquant.errors import SwquantError, did_you_mean, reason_of
from swquant.validation import read_yaml

NAMES: Mapping[str, str] = {
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "lambada": "lambada_openai",
}
"""Usual names of tasks that lm-eval calls otherwise."""

ACCURACY = "acc"
BATCH = 8
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval found on one task.

    Attributes:
        task: Its name in lm-eval.
        harness: The version of lm-eval.
        version: The task's version; scores of different versions do not compare.
        items: How many were asked.
        metric: The one that ``value`` is: ``acc`` where the task has it.
        value: Its mean over the items.
        metrics: All of the task's.
    """

    task: str
    harness: str
    version: str
    items: int
    metric: str
    value: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TaskRun:
    """A task's score, and the metric of each item, ``float64 [items]``, in the order of the items."""

    score: TaskScore
    values: NDArray[np.float64]


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, items: int | None = None, batch: int = BATCH
) -> tuple[TaskRun, ...]:
    """Ask a model the items of tasks.

    Args:
        model: A causal language model of transformers; its linears may be packed.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval's tasks, or paths of YAML files in lm-eval's form. A file's ``data_files`` that are
            relative lie beside it. Give only files that you trust: what they name by ``!function`` is run.
        items: Ask only the first so many items of each.
        batch: Items at a time.

    Raises:
        SwquantError: lm-eval is missing, there is no such task, or it does not run.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SwquantError(f"tasks need: pip install 'swquant[eval]' ({error})") from error
    named = [NAMES.get(task, task) for task in tasks if not task.endswith(_SUFFIXES)]
    manager: Any = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            raise SwquantError(f"lm-eval has no task {name!r}{_nearest(name, manager.all_tasks)}")
    specs = [_spec(task) for task in tasks]
    try:
        wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found: Any = lm_eval.simple_evaluate(
            model=wrapped, tasks=specs, task_manager=manager, limit=items, log_samples=True, bootstrap_iters=0
        )
    except Exception as error:  # lm-eval raises whatever its tasks, their data sets and the hub do
        reason = reason_of(error, 300)
        raise SwquantError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {reason}") from error
    return tuple(_task_run(name, found) for name in found["samples"])


def _nearest(name: str, known: Sequence[str]) -> str:
    """A hint; lm-eval has too many tasks to list."""
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else "; see lm-eval ls tasks"


def _spec(task: str) -> str | dict[str, Any]:
    """What lm-eval takes for a task: a name, or what a file holds."""
    if not task.endswith(_SUFFIXES):
        return NAMES.get(task, task)
    path = Path(task)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SwquantError(f"the task file {task} cannot be read: {error}") from error
    if "!function" in text or "\ninclude:" in f"\n{text}":
        return str(path.resolve())
    config = read_yaml(text, f"the task file {task}")
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise SwquantError(f"the task file {task} has no name: expected a mapping with a key 'task'")
    settings = config.get("dataset_kwargs") or {}
    if "data_files" in settings:
        beside = _beside(path.parent, settings["data_files"])
        config = {**config, "dataset_kwargs": {**settings, "data_files": beside}}
    return config


def _beside(folder: Path, files: Any) -> Any:
    """Paths in a ``data_files`` setting, those that lie beside the task file made absolute."""
    if isinstance(files, dict):
        return {split: _beside(folder, value) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    place = folder / str(files)
    return str(place.resolve()) if place.is_file() else files


def _task_run(name: str, found: Any) -> TaskRun:
    metrics: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            metrics.setdefault(metric, float(value))
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    by_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    own = [metric for metric in (ACCURACY, *metrics) if all(_is_number(sample.get(metric)) for sample in by_filter)]
    if not own:
        raise SwquantError(f"the task {name} has no metric that is a mean over items; expected one such as acc")
    values = np.array([float(sample[own[0]]) for sample in by_filter])
    score = TaskScore(
        task=name,
        harness=str(found["lm_eval_version"]),
        version=str(found["versions"].get(name)),
        items=len(values),
        metric=own[0],
        value=float(values.mean()),
        metrics=metrics,
    )
    return TaskRun(score, values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number))
