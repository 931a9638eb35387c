"""The whole story: from a checkpoint and a recipe to a quantized checkpoint and its report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.calibration import calibration_tokens, eval_windows, sample_windows
from swquant.checkpoint.opening import SourceOptions, note_of
from swquant.checkpoint.writer import publish
from swquant.choosing import ALLOCATION, TIME, choose
from swquant.corpus import tokens_of
from swquant.device import resolve_device
from swquant.distributed.ranks import Alone, Ranks
from swquant.drawing import draw_from_model
from swquant.engine.block import Job, load_block, quantize_block
from swquant.engine.bound import BoundBlock
from swquant.engine.deadline import Deadline, Timer, with_epochs
from swquant.engine.end_to_end import train_scales
from swquant.engine.head import measure
from swquant.engine.hidden_states import create_hidden
from swquant.engine.memory import keep_little
from swquant.engine.observer import Observer, Silent
from swquant.engine.precision import PRECISIONS, tensor_float32
from swquant.engine.run_state import (
    HIDDEN_STATES,
    MANIFEST,
    RunState,
    begun_with,
    lock_directory,
    noted,
    open_run_state,
)
from swquant.errors import DamagedRunError, SwquantError, reason_of
from swquant.estimate.budget import Budget, drawing_problems, micro_batch_here, shape_of
from swquant.estimate.disk import disk_of
from swquant.formats import PLAIN
from swquant.model.calls import Calls, Front, capture
from swquant.output import load_report, write_output
from swquant.phases.micro_batch import named, ran_out
from swquant.phases.train import Train
from swquant.places import REPORT, destination, require_disk, require_unused
from swquant.plan import Plan, make_plan, on_top
from swquant.quant.deferred import in_float
from swquant.quant.spec import QuantSpec
from swquant.recipe import SETTLED, Recipe
from swquant.report import Quality, Report
from swquant.sampling import Room
from swquant.tokenizer import Reading

OUTPUT = "output"
"""What of a report's key tells how the output is written; a run state's key has no such part."""


def quantize(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    *,
    observer: Observer | None = None,
    budget: Budget | None = None,
    grids: Mapping[str, QuantSpec | None] | None = None,
    source_options: SourceOptions | None = None,
) -> Report:
    """Quantize the model ``source`` by ``recipe`` and write the result to ``out``.

    Everything that can be checked without reading weights is checked first. The run keeps a working directory beside
    ``out``; killed at any moment and called again with the same arguments, it goes on after the last finished block
    and writes the same bits. Another format or runtime than before goes on from there as well. ``out`` appears whole,
    when all is done, or not at all.

    Args:
        recipe: What to do.
        source: A model directory, or a hub name.
        out: A directory that does not exist yet or is empty. If it holds the finished result of the same call, that is
            returned.
        observer: Hears of the progress.
        budget: Memory that the run may take. A batch then goes through a block in micro-batches that fit, which changes
            the result by rounding alone; where one sample does not fit, the run is refused before it starts. From then
            on glibc gives freed memory back at once in this process, see :func:`swquant.engine.memory.keep_little`.
        grids: As the recipe's ``grids``, on top of these, e.g. ``{"*.v_proj": QuantSpec(4, 64, True)}``. The report
            and ``swquant.yaml`` have them in the recipe.
        source_options: Which of the source's files, and whether it may be quantized already.

    Returns:
        The report that also stands in ``out/report.json``.

    Raises:
        SwquantError: For anything a user can mend, in one sentence.
    """
    report = quantize_together(recipe, source, out, Alone(), observer or Silent(), budget, source_options, grids)
    assert report is not None
    return report


def quantize_together(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    ranks: Ranks,
    observer: Observer,
    budget: Budget | None = None,
    source_options: SourceOptions | None = None,
    grids: Mapping[str, QuantSpec | None] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Report | None:
    """:func:`quantize` by several processes that share the directories of ``source`` and ``out``.

    Args:
        recipe: As there; so are ``source`` and ``out``.
        source: Its first reader is rank 0, which downloads what has to be.
        out: Written by rank 0; the others write activations of their samples into the working directory beside it.
        ranks: The processes.
        observer: Hears of the progress on rank 0.
        budget: Memory that each process may take.
        source_options: As there.
        grids: As there.
        now: A clock, by which a recipe's time is kept.

    Returns:
        On rank 0 the report; the others are done before it is written.
    """
    out, watching = Path(out), observer if ranks.rank == 0 else Silent()
    budget = budget or Budget()
    if budget.given:
        keep_little()
    room, timer, asked = budget.room, Timer(now=now), recipe
    if ranks.size > 1 and recipe.time is not None:
        raise SwquantError(f"a time is kept by one process, and there are {ranks.size}: leave --time out")
    recipe = replace(recipe, grids=on_top(recipe.grids, grids or {}))
    chosen = ranks.lead(partial(_choices, recipe, source, source_options, room, out, watching, timer))
    recipe, notes = Recipe.from_mapping(chosen["recipe"]), chosen["notes"]
    recipe = recipe.settled(ranks.lead(partial(_settled, recipe, out)))
    plans: list[Plan] = []

    def first() -> str:
        plans.append(make_plan(recipe, source, source_options, room=room))
        return plans[0].recipe.calibration

    recipe = recipe.settled({"calibration": ranks.lead(first)})
    plan = plans[0] if plans else make_plan(recipe, source, source_options, room=room)
    _announce(plan, watching)
    key, work = ranks.lead(plan.key) | ({} if asked.time is None else {TIME: asked.time}), _work_of(out)
    whole_key = {**key, OUTPUT: plan.output_key()}
    with ExitStack() as held:
        before: list[Report] = []

        def is_finished() -> bool:
            before.extend(_before(out, work, key, whole_key))
            return bool(before)

        if ranks.lead(is_finished):
            for report in before:
                watching.done(report)
            return before[0] if before else None
        held.enter_context(tensor_float32(plan.device, PRECISIONS[plan.recipe.precision]))
        micro_batch = ranks.lead(partial(_make_ready, plan, notes, budget, ranks.size, key, out, held, watching, timer))
        spare = partial(budget.spare, plan.device, ranks.size)
        job = replace(plan.job(), ranks=ranks, micro_batch=micro_batch, trims=budget.given, spare=spare)
        run_state = _train(plan, job, work, key, watching, timer)
        ranks.leave()
        if ranks.rank > 0:
            return None
        with named("in measuring the quantized model"):
            quality = _quality(plan, run_state, watching)
        watching.stage(f"Writing {out}")
        with named("in writing the output"), _nothing_is_lost(work):
            report = write_output(plan, run_state, quality, whole_key, _named(source, source_options))
        publish(work / "output", out)
        run_state.clear()
    watching.done(report)
    return report


def _choices(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None,
    room: Room,
    out: Path,
    watching: Observer,
    timer: Timer,
) -> Mapping[str, Any]:
    """The recipe with what this run began with, or new choices, in the place of a size and a time."""

    def before() -> None:
        if not (out / REPORT).is_file():
            require_unused(out)

    finished, known = _report_in(out), noted(_work_of(out))
    if finished is not None:
        found = {ALLOCATION: finished.allocation, TIME: finished.time}
        known = {name: asdict(value) for name, value in found.items() if value is not None}
    chosen = choose(recipe, source, options, room, watching.stage, timer, known, before)
    return {"recipe": chosen.recipe.to_mapping(), "notes": dict(chosen.notes)}


def _settled(recipe: Recipe, out: Path) -> Mapping[str, Any]:
    """What a recipe's ``auto`` meant when this run began, so that it goes on as it began on any machine.

    Raises:
        SwquantError: It computes on a device that is not here.
    """
    finished, work = _report_in(out), _work_of(out)
    begun = begun_with(work) if finished is None else finished.key
    chosen = begun.get("recipe", {})
    device = recipe.settled(chosen).device
    try:
        resolve_device(device)
    except SwquantError as error:
        if device == recipe.device or finished is not None:
            return {}
        raise SwquantError(
            f"the unfinished run in {work} computes on {device}, and {error}; finish it there, delete the "
            "directory to drop it, or choose another --out"
        ) from error
    return {key: chosen[key] for key in SETTLED if key in chosen}


def _announce(plan: Plan, watching: Observer) -> None:
    """What is about to be done, to what."""
    watching.stage(f"Reading {plan.checkpoint.directory.name}: {plan.recipe.summary}")
    watching.stage(plan.assumed())
    watching.stage(f"Computing on {plan.device}, matrix products of training in {plan.recipe.precision}")
    if note := note_of(plan.disk):
        watching.stage(note[0].upper() + note[1:])
    if plan.chosen is not None:
        watching.stage(plan.chosen)


def _work_of(out: Path) -> Path:
    place = destination(out)
    return place.parent / f"{place.name}.swquant-work"


def _before(out: Path, work: Path, key: Mapping[str, Any], whole_key: Mapping[str, Any]) -> list[Report]:
    """The report of the same call, where it has been done before.

    Raises:
        SwquantError: It has been, but in another format.
    """
    finished = _report_in(out)
    if finished is None or {**finished.key, OUTPUT: None} != {**key, OUTPUT: None}:
        return []
    if finished.key != whole_key:
        raise SwquantError(_written_otherwise(out, finished.key[OUTPUT], whole_key[OUTPUT]))
    if (work / MANIFEST).exists():
        with lock_directory(work):
            open_run_state(work, key).clear()
    return [finished]


def _written_otherwise(out: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """That ``out`` holds the model that is asked for, in another format or for another runtime, and what to do."""
    names = str(held["format"]).split(",")
    sentence = f"{out} holds this very model, written as {', '.join(names)}; choose another --out"
    with_codes = next((name for name in names if name != PLAIN), None)
    if with_codes is None:
        return sentence
    source = out if len(names) == 1 else out / with_codes
    flag = f"--format {wanted['format']}" if wanted["runtime"] is None else f"--for {wanted['runtime']}"
    return f"{sentence}, or write the same codes anew: swquant convert {source} --out NEW {flag}"


def _make_ready(
    plan: Plan,
    notes: Mapping[str, Any],
    budget: Budget,
    ranks: int,
    key: Mapping[str, Any],
    out: Path,
    held: ExitStack,
    watching: Observer,
    timer: Timer,
) -> int | None:
    """Lock the working directory and make it ready for the next block; returns the micro-batch of the budget."""
    work = _work_of(out)
    require_unused(out)
    held.enter_context(lock_directory(work))
    run_state = open_run_state(work, key)
    begun = run_state.shape is not None
    with nullcontext() if begun else _leaving_nothing(run_state):
        micro_batch = micro_batch_here(plan, budget, ranks, begun=begun)
        if micro_batch is not None:
            kept = "the budget of memory" if budget.given else "what memory is free"
            watching.stage(f"Samples of a batch go through a block {micro_batch} at a time, to keep to {kept}")
        if begun:
            timer.before += run_state.spent
            run_state.verify()
            shutil.rmtree(work / "output", ignore_errors=True)  # of an attempt that failed, perhaps in another format
            require_disk(out, sum(disk_of(plan, shape_of(plan), ranks).outputs.values()))
        else:
            with named("in making the samples and their way to the first block"):
                run_state.timer = timer if TIME in notes else None
                _start(plan, notes, run_state, out, watching, ranks)
    return micro_batch


@contextmanager
def _leaving_nothing(run_state: RunState) -> Generator[None]:
    """A start that fails leaves no working directory."""
    try:
        yield
    except BaseException:
        run_state.clear()
        raise


def _train(plan: Plan, job: Job, work: Path, key: Mapping[str, Any], watching: Observer, timer: Timer) -> RunState:
    """All that is left of the blocks and of the end-to-end stage; rank 0 writes the run state that is returned."""
    run_state, ranks = open_run_state(work, key), job.ranks
    _say_who_rests(job, watching)
    deadline = None
    if TIME in run_state.notes:
        run_state.timer = timer
        deadline = Deadline(run_state, timer, watching.stage)
    watching.begin(len(plan.skeleton.blocks), run_state.done, plan.tail())
    front = Front.load(plan.skeleton, plan.checkpoint, plan.device)
    calls = Calls.prepare(front, plan.checkpoint, run_state.tokens()["tokens"])
    for index in range(run_state.done, len(plan.skeleton.blocks)):
        if deadline is not None:
            job = replace(job, phases=with_epochs(job.phases, deadline.before_block(index)))
        left = quantize_block(job, run_state, calls, watching)
        job = replace(job, micro_batch=left)
        run_state = run_state if ranks.rank == 0 else open_run_state(work, key)
    finish = plan.pipeline.finish
    if finish is not None and deadline is not None and run_state.final is None:
        finish = replace(finish, epochs=deadline.before_whole())
    if finish is not None and run_state.final is None and (finish.epochs or deadline is None):
        with named("in the end-to-end training"):
            train_scales(job, finish, run_state, calls, watching, None if deadline is None else deadline.after_epoch)
    return run_state


def _say_who_rests(job: Job, watching: Observer) -> None:
    """Batches of fewer samples than there are ranks leave some of them without a share of a step."""
    small = [phase.batch_size for phase in job.phases if isinstance(phase, Train) and phase.batch_size < job.ranks.size]
    if small:
        watching.stage(
            f"Batches of {min(small)} give work to {min(small)} of {job.ranks.size} ranks in a training step: "
            f"the method's option batch_size={job.ranks.size} would give it to all, and is another recipe"
        )


def _named(source: str | Path, options: SourceOptions | None) -> str:
    """``source`` as the report calls it: a relative path must look like none of the hub's names."""
    path, given = Path(source), options or SourceOptions()
    name = f"./{path}" if path.is_dir() and not path.is_absolute() else str(source)
    if given.revision is not None and "@" not in name:
        name = f"{name}@{given.revision}"
    return name if given.subfolder is None else f"{name}/{given.subfolder}"


def _report_in(out: Path) -> Report | None:
    """The report in ``out``, if there is one."""
    try:
        return load_report(out / REPORT)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _nothing_is_lost(work: Path) -> Generator[None]:
    """Where an output is refused, what has been trained is written in another format by all but the same command."""
    try:
        yield
    except DamagedRunError:
        raise
    except SwquantError as error:
        raise SwquantError(
            f"{error}. The trained blocks stay in {work}: the same command with another --format, or without --for, "
            "writes them and trains nothing again"
        ) from error


def _start(
    plan: Plan,
    notes: Mapping[str, Any],
    run_state: RunState,
    out: Path,
    watching: Observer,
    ranks: int,
) -> None:
    """Make the samples and both models' hidden states before block 0, if the disk and the weights allow for a run."""
    for problem in drawing_problems(plan):
        raise SwquantError(problem)
    require_disk(out, disk_of(plan, shape_of(plan), ranks).asked)
    plan.checkpoint.sidecars()
    plan.checkpoint.require_finite(site.weight for site in plan.layout.sites)
    reading = None if plan.text is None and plan.evaluation is None else plan.reading()
    calibration, evaluation = _samples(plan, reading, watching)
    tokens = torch.cat((calibration, evaluation))
    read = () if reading is None else reading.notes_on(tokens)
    for note in read:
        watching.stage(note[0].upper() + note[1:])
    shape = (tokens.shape[0], tokens.shape[1], plan.hidden_size)
    front = Front.load(plan.skeleton, plan.checkpoint, plan.device)
    cached = [create_hidden(run_state.hidden_path(name, 0), shape) for name in HIDDEN_STATES]
    for cache, stored in zip(cached, (False, True), strict=True):
        for index, hidden in enumerate(capture(front, plan.checkpoint, tokens, stored=stored)):
            cache[index] = hidden
    try_block(plan, Calls.prepare(front, plan.checkpoint, tokens), cached[0][:1])
    told = {
        "evaluation_samples": evaluation.shape[0],
        "reading": list(read),
        **notes,
    }
    run_state.begin({"tokens": tokens}, shape, told)


def _samples(plan: Plan, reading: Reading | None, watching: Observer) -> tuple[Tensor, Tensor]:
    """Tokens to train on and tokens to measure on, ``[samples, tokens]`` each."""
    recipe = plan.recipe
    samples, length, held = recipe.samples, recipe.seq_len, recipe.evaluation_samples
    assert samples is not None
    assert length is not None
    measured = torch.empty(0, length, dtype=torch.long)
    if held and plan.evaluation is not None and reading is not None:
        measured = eval_windows(tokens_of(plan.evaluation, reading.tokenizer), length, held, reading.begin)
        held = 0
    if plan.drawing is not None:
        watching.stage(f"Drawing {samples + held} samples of {length} tokens from the model")
        drawn = draw_from_model(plan.disk, plan.drawing, samples + held, length, recipe.seed, watching.stage)
        return drawn[:samples], torch.cat((measured, drawn[samples:]))
    assert plan.text is not None
    assert reading is not None
    tokens = tokens_of(plan.text, reading.tokenizer)
    tokens, rest = calibration_tokens(tokens, length, held)
    if len(rest):
        measured = eval_windows(rest, length, None, reading.begin)
    return sample_windows(tokens, samples, length, recipe.seed, reading.begin), measured


def _quality(plan: Plan, run_state: RunState, watching: Observer) -> Quality | None:
    count = int(run_state.notes["evaluation_samples"])
    if not count:
        return None
    watching.stage("Measuring perplexity and divergence")
    reference, quantized = run_state.open_hidden_states()
    tokens = run_state.tokens()["tokens"][-count:]
    front = Front.load(plan.skeleton, plan.checkpoint, plan.device)
    return measure(front, plan.checkpoint, (reference[-count:], quantized[-count:]), tokens)


@torch.no_grad()
def try_block(plan: Plan, calls: Calls, hidden: Tensor) -> None:
    """Run the first block once, because some settings are found to be wrong by running alone.

    Args:
        plan: The run.
        calls: What blocks are called with.
        hidden: ``[1, tokens, dim]`` before the first block.

    Raises:
        SwquantError: It does not run, or it hands on more to later blocks than its output.
    """
    job = plan.job()
    bound = BoundBlock(0, plan.skeleton.block(0), calls, plan.layout, plan.device, Alone())
    config = plan.checkpoint.directory / "config.json"
    try:
        bound.forward(in_float(load_block(job, 0)), hidden.to(plan.device), torch.zeros(1, dtype=torch.long))
    except Exception as error:  # torch and transformers raise whatever the settings make them run into
        if ran_out(error):
            raise
        raise SwquantError(f"{config} does not describe a model that runs: {reason_of(error)}") from error
