"""What a time buys: the settings that a run can have, in the order in which they pay, each with the time it takes here.

A block is measured once, with every stage that there is (:mod:`swquant.estimate.timing`); all settings are counted up
from that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from swquant.calibration import calibration_tokens
from swquant.checkpoint.opening import SourceOptions
from swquant.corpus import tokens_of
from swquant.device import free_memory
from swquant.drawing import seconds_of
from swquant.engine.block import split_validation
from swquant.errors import SwquantError
from swquant.estimate.budget import drawing_problems, shape_of
from swquant.estimate.timing import Measured, files_of, measure, spent_on
from swquant.phases.train import Train
from swquant.plan import Plan, make_plan
from swquant.recipe import AUTO, SELF, Recipe, usual_loss
from swquant.sampling import Room
from swquant.timed import PATH, Costs, Step, Timed
from swquant.units import span

START, METHOD = "gptq", ("block_ap(epochs={})", "end_to_end(epochs={})")
"""What every setting begins with, and what more time adds."""

GRID_TOKENS, GRID_PASSES = 256, 110
"""Choosing grids for a size: tokens of a sample, and about how often one goes through each block: sixteen forward and
backward (:mod:`swquant.allocation.sensitivity`), some twenty rounded matrices on four samples through half of them."""

MOST_SAMPLES = 512
"""Of the preset ``best``."""

DRAWN_FOR = 64
"""Samples by which it is decided whether drawing them from the model takes too long."""

DRAWING_SHARE = 0.25
"""Of the time that drawing may take where the calibration is left open."""

MARGIN = 1.03
"""On everything that is counted up: what is written, checked and looked at between its parts."""


def asked_of(recipe: Recipe) -> str:
    """A hash of what is asked for: of a recipe without what depends on the machine, or changes nothing."""
    open_ = {"format": None, "runtime": None, "device": "auto", "precision": "auto"}
    return replace(recipe, **open_).digest()


def with_time(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the settings of a :class:`swquant.timed.Timed` in the place of a time."""
    return Recipe.from_mapping({**replace(recipe, time=None).to_mapping(), **settings})


@dataclass(frozen=True)
class Curve:
    """The settings of a model on a machine.

    Attributes:
        recipe: What is asked for.
        plan: A run of it with every stage.
        found: What its blocks take.
        windows: Most samples that the text gives; ``None`` where they are drawn.
        grids: Seconds that choosing grids for a size would take.
        opening: Seconds that making a plan took, which a run does once more.
    """

    recipe: Recipe
    plan: Plan
    found: Sequence[Measured]
    windows: int | None
    grids: float
    opening: float

    def steps(self) -> list[Step]:
        """All settings in the order in which they pay, with the samples and tokens that recipe and text allow."""
        most, tokens = min(MOST_SAMPLES, self.windows or MOST_SAMPLES), self.tokens
        held = self.recipe.samples
        steps = (
            replace(
                step,
                samples=min(step.samples, most) if held is None else held,
                tokens=tokens if self.recipe.seq_len is not None else min(step.tokens or tokens, tokens),
            )
            for step in PATH
        )
        return list(dict.fromkeys(steps))

    @property
    def tokens(self) -> int:
        """Of the samples that were measured."""
        assert self.plan.recipe.seq_len is not None
        return self.plan.recipe.seq_len

    def seconds(self, step: Step) -> float:
        """What a run takes, from the beginning."""
        costs = self.costs(step)
        return self.grids + costs.before + costs.left(step.training)

    def costs(self, step: Step) -> Costs:
        """What a run takes, part by part."""
        samples, longer = step.samples, (step.tokens or self.tokens) / self.tokens
        evaluated = self.plan.recipe.evaluation_samples
        _, validation = map(len, split_validation(samples))
        blocks: dict[int, tuple[float, float]] = {}
        forwards: dict[int, float] = {}
        for first, kind in zip(self.plan.layout.kinds(), self.found, strict=True):
            forward = longer * kind.forward
            fixed = kind.fixed + 2 * (samples + evaluated + validation) * forward
            epoch = 0.0
            for phase, (_, cost) in zip(self.plan.pipeline.phases, kind.phases, strict=True):
                if isinstance(phase, Train):
                    once = spent_on(replace(phase, epochs=1), cost, samples, forward, longer)
                    epoch += once - 2 * validation * forward
                else:
                    fixed += spent_on(phase, cost, samples, forward, longer)
            blocks[first], forwards[first] = (MARGIN * fixed, MARGIN * epoch), forward
        each = self.plan.layout.firsts()
        forward = sum(forwards[first] for first in each) / len(each)
        once, none = (self._stage(samples, epochs) for epochs in (1, 0))
        begun = none + evaluated * len(each)
        drawn = self._drawing * (samples + self._held) * longer
        parts = (self.opening + drawn, begun * forward, (once - none) * forward, files_of(self.plan))
        before, begun, epoch, after = (MARGIN * part for part in parts)
        return Costs(before, tuple(blocks[first] for first in each), begun, epoch, after)

    def _stage(self, samples: int, epochs: int) -> float:
        """The end-to-end stage in forward passes of a sample through a block."""
        finish = self.plan.pipeline.finish
        assert finish is not None
        pipeline = replace(self.plan.pipeline, finish=replace(finish, epochs=epochs))
        return replace(self.plan, recipe=replace(self.plan.recipe, samples=samples), pipeline=pipeline).tail()

    @property
    def _held(self) -> int:
        """Samples that are measured on and drawn too."""
        return 0 if self.plan.evaluation is not None else self.plan.recipe.evaluation_samples

    @cached_property
    def _drawing(self) -> float:
        """Seconds that drawing a sample takes, several at once."""
        if self.plan.drawing is None:
            return 0.0
        shape = shape_of(self.plan)[:2]
        return seconds_of(self.plan.drawing, self.plan.skeleton, self.plan.layout, shape) / shape[0]

    @property
    def quickest(self) -> float:
        """Seconds of the least that there is."""
        return self.seconds(self.steps()[0])

    def best(self, limit: float) -> Step | None:
        """What pays most within ``limit`` seconds, with as many samples as there is time for; ``None`` if nothing."""
        fitting = [step for step in self.steps() if self.seconds(step) <= limit]
        return self._filled(fitting[-1], limit) if fitting else None

    def _filled(self, step: Step, limit: float) -> Step:
        """``step`` with the time that it leaves spent on tokens and samples."""
        if self.recipe.seq_len is None and self.seconds(longer := replace(step, tokens=self.tokens)) <= limit:
            step = longer
        most = min(MOST_SAMPLES, self.windows or MOST_SAMPLES)
        if self.recipe.samples is not None or most <= step.samples:
            return step
        low, high = step.samples, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(replace(step, samples=middle)) <= limit:
                low = middle
            else:
                high = middle - 1
        return replace(step, samples=low)

    def settings(self, step: Step) -> dict[str, Any]:
        """Keys of a recipe, as files have them."""
        training, recipe = step.training, self.plan.recipe
        parts = zip(METHOD, (training.blocks, training.whole), strict=True)
        method = [START, *(part.format(epochs) for part, epochs in parts if epochs)]
        loss = self.recipe.loss or usual_loss(recipe.bits) if training.blocks else None
        return {
            "method": " + ".join(method),
            "loss": loss,
            "samples": step.samples,
            "seq_len": step.tokens,
            "calibration": recipe.calibration,
        }

    def left_out(self, step: Step) -> str:
        """What more time would buy, in words."""
        last, training = PATH[-1].training, step.training
        most = step.samples if self.recipe.samples is not None else min(MOST_SAMPLES, self.windows or MOST_SAMPLES)
        more = (
            (last.blocks - training.blocks, "epochs on blocks"),
            (last.whole - training.whole, "epochs end to end"),
            (most - step.samples, "samples"),
        )
        return ", ".join(f"{count} {what}" for count, what in more if count > 0)


def curve_of(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None = None,
    room: Room = free_memory,
    make: Callable[..., Plan] = make_plan,
) -> Curve:
    """Measure a block of the model with every stage.

    Args:
        recipe: With a ``time``; its ``samples``, ``seq_len``, ``loss`` and grids hold.
        source: The model.
        options: As of the run.
        room: As of the run.
        make: Makes the plan, as :func:`swquant.plan.make_plan` does; for a size on some grid.

    Raises:
        SwquantError: As the run itself would, of whatever can be known before.
    """
    began = time.monotonic()
    method = " + ".join((START, *(part.format(1) for part in METHOD)))
    loss = recipe.loss or usual_loss(recipe.bits)
    full = replace(recipe, time=None, method=method, loss=loss)
    patience = None if recipe.time is None else DRAWING_SHARE * recipe.time
    samples = recipe.samples or (DRAWN_FOR if recipe.calibration in (AUTO, SELF) else MOST_SAMPLES)
    plan = make(replace(full, samples=samples), source, options, room=room, patience=patience)
    opening = time.monotonic() - began
    for problem in drawing_problems(plan):
        raise SwquantError(problem)
    windows = None
    if plan.text is not None:
        assert plan.recipe.seq_len is not None
        held = 0 if plan.evaluation is not None else plan.recipe.evaluation_samples
        tokens, _ = calibration_tokens(tokens_of(plan.text, plan.reading().tokenizer), plan.recipe.seq_len, held)
        windows = max(1, len(tokens) // plan.recipe.seq_len)
    found = measure(plan, shape_of(plan))
    curve = Curve(recipe, plan, found, windows, 0.0, opening)
    return curve if not recipe.is_sized else replace(curve, grids=_grids(plan, found))


def _grids(plan: Plan, found: Sequence[Measured]) -> float:
    """About what choosing grids for a size takes."""
    share = GRID_TOKENS / (plan.recipe.seq_len or 1)
    return GRID_PASSES * share * sum(kind.count * kind.forward for kind in found)


def chosen(curve: Curve, spent: float) -> Timed:
    """What is to be done within the recipe's time, of which ``spent`` seconds are over.

    Raises:
        SwquantError: Not even the quickest settings fit.
    """
    limit = curve.recipe.time
    assert limit is not None
    step = curve.best(limit - spent)
    if step is None:
        require_time(curve, spent)
        step = curve.steps()[0]  # the grids took longer than was thought, and what they cost is paid
    costs = curve.costs(step)
    expected = spent + costs.before + costs.left(step.training)
    settings = curve.settings(step)
    return Timed(
        asked_of(curve.recipe),
        limit,
        round(spent, 1),
        round(expected, 1),
        settings,
        step.samples,
        settings["seq_len"],
        step.training,
        curve.left_out(step),
        costs,
    )


def require_time(curve: Curve, spent: float) -> None:
    """Refuse a time that the quickest settings do not fit into.

    Raises:
        SwquantError: With the time that they need.
    """
    limit, needed = curve.recipe.time, spent + curve.quickest
    assert limit is not None
    if needed > limit:
        raise SwquantError(
            f"{span(limit)} are too little for this model on this machine: the quickest settings "
            f"({curve.settings(curve.steps()[0])['method']} on {curve.steps()[0].samples} samples) need about "
            f"{_up(needed)}; give --time {_up(needed)} or more"
        )


def _up(seconds: float) -> str:
    """A time that is not below this one, as --time takes it."""
    return f"{math.ceil(seconds)}s" if seconds < 90 else f"{math.ceil(seconds / 60)}m"
