"""A run that stands in front of its end-to-end stage."""

from __future__ import annotations

from pathlib import Path

from swquant import Recipe
from swquant.engine.block import Job, quantize_block
from swquant.engine.capture import capture
from swquant.engine.journal import Journal, open_journal
from swquant.engine.observer import Silent
from swquant.engine.trained_model import TrainedModel
from swquant.phases.scale_training import ScaleTraining
from swquant.plan import make_plan
from swquant.run import _start


def behind_the_last_block(
    recipe: Recipe, source: Path, root: Path, work: ScaleTraining | None = None
) -> tuple[TrainedModel, Job, Journal]:
    """The model to be trained by ``work``, or by what the recipe says."""
    root.mkdir()
    plan = make_plan(recipe, source)
    journal, job = open_journal(root, plan.key()), plan.job()
    _start(plan, journal, root, Silent(), 1)
    arguments = capture(plan.skeleton, plan.checkpoint, journal.tokens()["tokens"][:1])
    for index in range(len(plan.skeleton.blocks)):
        quantize_block(job, journal, arguments[index], Silent())
    work = work or plan.pipeline.finish
    assert work is not None
    return TrainedModel(job, journal, arguments, work), job, journal
