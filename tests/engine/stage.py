"""A run that stands before its end-to-end stage."""

from __future__ import annotations

from pathlib import Path

from swquant import Recipe
from swquant.engine.block import Job, quantize_block
from swquant.engine.observer import Silent
from swquant.engine.run_state import RunState, open_run_state
from swquant.engine.trained_model import TrainedModel
from swquant.model.calls import Calls, Front
from swquant.phases.scale_training import ScaleTraining
from swquant.plan import make_plan
from swquant.run import _start


def calls_of(job: Job, run_state: RunState) -> Calls:
    """What the run calls each block with."""
    front = Front.load(job.skeleton, job.checkpoint, job.device)
    return Calls.prepare(front, job.checkpoint, run_state.tokens()["tokens"])


def behind_the_last_block(
    recipe: Recipe, source: Path, root: Path, work: ScaleTraining | None = None
) -> tuple[TrainedModel, Job, RunState]:
    """The model to be trained by ``work``, or by what the recipe says."""
    root.mkdir()
    plan = make_plan(recipe, source)
    run_state, job = open_run_state(root, plan.key()), plan.job()
    _start(plan, {}, run_state, root, Silent(), 1)
    calls = calls_of(job, run_state)
    for _ in plan.skeleton.blocks:
        quantize_block(job, run_state, calls, Silent())
    work = work or plan.pipeline.finish
    assert work is not None
    return TrainedModel(job, run_state, calls, work), job, run_state
