"""A run that stands before its end-to-end stage."""

from __future__ import annotations

from pathlib import Path

from swquant import Recipe
from swquant.engine.block import Job, quantize_block
from swquant.engine.journal import Journal, open_journal
from swquant.engine.observer import Silent
from swquant.engine.trained_model import TrainedModel
from swquant.model.calls import Calls, Front
from swquant.phases.scale_training import ScaleTraining
from swquant.plan import make_plan
from swquant.run import _start


def calls_of(job: Job, journal: Journal) -> Calls:
    """What the run calls each block with."""
    front = Front.load(job.skeleton, job.checkpoint, job.device)
    return Calls.prepare(front, job.checkpoint, journal.tokens()["tokens"])


def behind_the_last_block(
    recipe: Recipe, source: Path, root: Path, work: ScaleTraining | None = None
) -> tuple[TrainedModel, Job, Journal]:
    """The model to be trained by ``work``, or by what the recipe says."""
    root.mkdir()
    plan = make_plan(recipe, source)
    journal, job = open_journal(root, plan.key()), plan.job()
    _start(plan, journal, root, Silent(), 1)
    calls = calls_of(job, journal)
    for _ in plan.skeleton.blocks:
        quantize_block(job, journal, calls, Silent())
    work = work or plan.pipeline.finish
    assert work is not None
    return TrainedModel(job, journal, calls, work), job, journal
