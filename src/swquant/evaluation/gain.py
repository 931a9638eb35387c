"""What one way to quantize recovers of what another lost: models with, models without, and the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from swquant.errors import SwquantError
from swquant.evaluation.recovered import Contrast, Recovered, Values, recovered
from swquant.evaluation.results import Measured
from swquant.evaluation.scores import Scores


def recovered_by_metric(
    models: Sequence[Measured], baselines: Sequence[Measured], original: Measured
) -> dict[str, Recovered]:
    """Of every metric that all of them were measured by.

    Windows are the units of the text's metrics, items those of the tasks'.

    Args:
        models: Quantized with the thing in question, one per seed, measured against the original.
        baselines: Quantized without it.
        original: Measured on the tasks.

    Raises:
        SwquantError: They were not measured on the same windows and items.
    """
    contrasts = dict(_of_text(models, baselines))
    tasks = dict(_of_tasks(models, baselines, original))
    found = {name: recovered(contrast) for name, contrast in (contrasts | tasks).items()}
    if len(tasks) > 1:
        found["mean of tasks"] = recovered(list(tasks.values()))
    return found


def _of_text(models: Sequence[Measured], baselines: Sequence[Measured]) -> Iterator[tuple[str, Contrast]]:
    sides = [[measured.scores for measured in side if measured.scores is not None] for side in (models, baselines)]
    if not sides[0]:
        return
    full = sides[0][0].reference_nll
    assert full is not None
    nll = [[_by_window(scores.nll) for scores in side] for side in sides]
    yield "log-perplexity", Contrast(nll[0], nll[1], _by_window(full))
    kl = [[_by_window(scores.kl) for scores in side if scores.kl is not None] for side in sides]
    yield "KL", Contrast(kl[0], kl[1], np.zeros(len(full)))


def _of_tasks(
    models: Sequence[Measured], baselines: Sequence[Measured], original: Measured
) -> Iterator[tuple[str, Contrast]]:
    for index, run in enumerate(original.runs):
        sides = [[measured.runs[index] for measured in side] for side in (models, baselines)]
        asked = {(one.score.task, one.score.metric, one.score.items) for side in sides for one in side}
        if asked != {(run.score.task, run.score.metric, run.score.items)}:
            raise SwquantError(f"the models were not asked the same items of {run.score.task}")
        values = [[one.values for one in side] for side in sides]
        yield f"{run.score.task} {run.score.metric}", Contrast(values[0], values[1], run.values)


def _by_window(scores: Scores) -> Values:
    """Means over the tokens of each window, all windows having as many."""
    return scores.mean(1, dtype=np.float64)
