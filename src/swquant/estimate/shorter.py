"""What makes a run shorter, each with the time that it would take by the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from swquant.checkpoint.opening import SourceOptions
from swquant.errors import SwquantError
from swquant.estimate.budget import shape_of
from swquant.estimate.timing import Measured, count_up
from swquant.phases.train import Train
from swquant.plan import Plan, make_plan
from swquant.recipe import BUNDLED, PRESETS, SELF, Recipe

LONG = 4 * 3600
"""Seconds from which on a run is called long."""

FEWER = 4
"""Samples, epochs or tokens are cut to one in so many."""
LEAST = {"samples": PRESETS["fast"].samples, "seq_len": 512}


def faster(
    recipe: Recipe, plan: Plan, found: Sequence[Measured], source: str | Path, options: SourceOptions | None
) -> dict[str, float]:
    """Seconds of the run by the flags that shorten it.

    Args:
        recipe: Of the run, as it was asked for.
        plan: The run.
        found: What its blocks take.
        source: The model.
        options: Which of its files.
    """
    # Which text it is makes no difference to the time, so none is read again.
    text = BUNDLED if plan.drawing is None else SELF
    texts = {"calibration": text, "evaluation": recipe.evaluation and BUNDLED}
    names = [name for name, _ in found[0].phases]
    times: dict[str, float] = {}
    for flags, other in _others(recipe, plan):
        try:
            planned = make_plan(replace(other, **texts), source, options)
        except SwquantError:  # such as a loss that takes no samples as short as these
            continue
        if [type(phase).__name__ for phase in planned.pipeline.phases] != names:
            continue
        tokens, before = planned.recipe.seq_len or 1, plan.recipe.seq_len or 1
        times[flags] = count_up(planned, shape_of(planned), found, tokens / before).total
    return times


def _others(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, Recipe]]:
    """Flags, and the recipe with them."""
    quick = _fast(recipe)
    if quick is not None:
        yield "--preset fast", quick
    for name, least in LEAST.items():
        few = max(least, getattr(plan.recipe, name) // FEWER)
        if few < getattr(plan.recipe, name):
            yield f"--{name.replace('_', '-')} {few}", replace(recipe, **{name: few})
    epochs = max((phase.epochs for phase in plan.pipeline.phases if isinstance(phase, Train)), default=0)
    if epochs >= FEWER and not recipe.options:
        yield f"--epochs {epochs // FEWER}", replace(recipe, epochs=epochs // FEWER)


def _fast(recipe: Recipe) -> Recipe | None:
    """The recipe that ``--preset fast`` would pick instead, or make of this one."""
    if recipe.preset == "fast":
        return None
    method = recipe.method
    try:
        asked = {name: vars(recipe)[name] for name in ("bits", "group_size", "symmetric", "grid")}
        usual, quick = (Recipe.recommended({**asked, "preset": name})[1] for name in (recipe.preset, "fast"))
        method = quick.method if usual.method == method else method
    except SwquantError:  # there is no recipe for these bits
        pass
    return replace(recipe, preset="fast", method=method)
