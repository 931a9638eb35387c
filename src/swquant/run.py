"""The whole story: from a checkpoint and a recipe to a quantized checkpoint and its report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant import __version__, registry
from swquant.calibration import draw_from_model, eval_windows, load_tokenizer, read_text, sample_windows, tokenize
from swquant.checkpoint.quantized import Outline, Part, QuantizedModel
from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.rotation import Source, rotate, stored
from swquant.checkpoint.writer import publish, require_disk, require_unused
from swquant.device import resolve_device
from swquant.engine.block import Job, quantize_block
from swquant.engine.capture import capture, to_device
from swquant.engine.end_to_end import train_scales
from swquant.engine.head import measure
from swquant.engine.journal import MANIFEST, STREAMS, Journal, lock_directory, open_journal
from swquant.engine.observer import Observer, Silent
from swquant.engine.skeleton import Skeleton, build_skeleton, check_widths, with_full_names
from swquant.engine.streams import create_stream, stream_bytes
from swquant.errors import SwquantError
from swquant.families import family_for
from swquant.formats.base import Format, check_dtype
from swquant.losses import WeightedSum, parse_loss
from swquant.methods import Pipeline, Setting, build_pipeline, parse_methods
from swquant.quant.qtensor import SCALE_BITS, QTensor
from swquant.quant.spec import QuantSpec
from swquant.recipe import PRESETS, Recipe
from swquant.report import Output, Quality, Report

LONGEST = 2048
STREAMS_AT_ONCE = 5
"""Two generations of the reference and the quantized stream, and the augmented loss's target."""

EVALUATION_SHARE = 5
"""At most one in so many windows of a calibration text is held out for evaluation."""

REPORT, RECIPE = "report.json", "swquant.yaml"


def quantize(recipe: Recipe, source: str | Path, out: str | Path, *, observer: Observer | None = None) -> Report:
    """Quantize the model ``source`` by ``recipe`` and write the result to ``out``.

    Everything that can be checked without reading weights is checked first. The run keeps a working directory beside
    ``out``; killed at any moment and called again with the same arguments, it goes on behind the last finished block
    and writes the same bits. ``out`` appears whole, when all is done, or not at all.

    Args:
        recipe: What to do.
        source: A model directory, or a hub name.
        out: A directory that does not exist yet or is empty. If it holds the finished result of the same call, that is
            returned.
        observer: Hears of the progress.

    Returns:
        The report that also stands in ``out/report.json``.

    Raises:
        SwquantError: For anything a user can mend, in one sentence.
    """
    out, watching = Path(out), observer or Silent()
    plan = make_plan(recipe, source)
    watching.stage(f"Reading {plan.checkpoint.directory.name}: {plan.recipe.summary}")
    key = plan.key()
    work = out.with_name(f"{out.name}.swquant-work")
    finished = _finished(out, key)
    if finished is not None:
        if (work / MANIFEST).exists():
            with lock_directory(work):
                open_journal(work, key).clear()
        return finished
    require_unused(out)
    with lock_directory(work):
        journal = open_journal(work, key)
        if journal.shape is None:
            _start(plan, journal, out, watching)
        job = plan.job()
        watching.begin(len(plan.skeleton.blocks), journal.done)
        arguments = capture(plan.skeleton, plan.checkpoint, journal.tokens()["tokens"][:1])
        for index in range(journal.done, len(plan.skeleton.blocks)):
            quantize_block(job, journal, to_device(arguments[index], plan.device), watching)
        finish = plan.pipeline.finish
        if finish is not None and journal.final is None:
            train_scales(job, finish, journal, to_device(arguments, plan.device), watching)
        quality = _quality(plan, journal, watching)
        watching.stage(f"Writing {out}")
        report = _write(plan, journal, quality, key, str(source))
        publish(work / "output", out)
        journal.clear()
    return report


@dataclass(frozen=True)
class Plan:
    """A run whose every part is known to fit the others; no weight has been read."""

    recipe: Recipe
    checkpoint: Source
    skeleton: Skeleton
    spec: QuantSpec
    pipeline: Pipeline
    loss: WeightedSum | None
    formats: tuple[Format, ...]
    outline: Outline
    device: torch.device
    text: str | None
    evaluation: str | None
    notes: tuple[tuple[str, ...], ...]
    bytes_source: int

    def key(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        texts = {"calibration_text": self.text, "evaluation_text": self.evaluation}
        return {
            "recipe": self.recipe.to_mapping(),
            "source": self.checkpoint.fingerprint(),
            **{name: text and hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
            "versions": versions(),
        }

    def job(self) -> Job:
        """What stays the same from block to block."""
        samples, recipe = self.recipe.samples, self.recipe
        assert samples is not None
        phases = self.pipeline.phases
        return Job(self.checkpoint, self.skeleton, self.spec, phases, self.loss, samples, recipe.seed, self.device)


def make_plan(recipe: Recipe, source: str | Path) -> Plan:
    """Check a recipe against a model, and fill in its defaults.

    Raises:
        SwquantError: If any part is unknown, out of range, or does not fit another.
    """
    spec, device = recipe.spec, resolve_device(recipe.device)
    loss = None if recipe.loss is None else parse_loss(recipe.loss)
    formats: tuple[Format, ...] = tuple(registry.load("swquant.formats", name)() for name in recipe.formats)
    preset = PRESETS[recipe.preset]
    steps = parse_methods(recipe.method, recipe.options, recipe.epochs)
    checkpoint: Source = with_full_names(open_checkpoint(source))
    family = family_for(checkpoint.config)
    pipeline = build_pipeline(steps, Setting(spec, family, preset.effort))
    if loss is not None and not any(part.trained for part in pipeline.parts if part.work in pipeline.phases):
        raise SwquantError(f"nothing in {recipe.method!r} trains block by block, so no loss is used: leave it out")
    bytes_source = checkpoint.tensor_bytes
    if pipeline.rotate:
        checkpoint = rotate(checkpoint, family, recipe.seed)
    check_dtype(checkpoint.dtype)
    skeleton = build_skeleton(checkpoint)
    check_widths(skeleton, spec)
    outline = make_outline(checkpoint, skeleton, spec)
    notes = tuple(form.check(outline) for form in formats)
    limit = int(skeleton.model.config.max_position_embeddings)
    if recipe.seq_len is not None and recipe.seq_len > limit:
        raise SwquantError(f"the sequence length is {recipe.seq_len}, the model takes at most {limit} tokens")
    text = None if recipe.calibration == "self" else read_text(recipe.calibration)
    evaluation = None if recipe.evaluation is None else read_text(recipe.evaluation)
    resolved = replace(
        recipe,
        method=" + ".join(map(str, steps)),
        options={},
        epochs=None,
        loss=loss and str(loss),
        samples=recipe.samples or preset.samples,
        seq_len=recipe.seq_len or min(LONGEST, limit),
        device=str(device),
    )
    return Plan(
        resolved,
        checkpoint,
        skeleton,
        spec,
        pipeline,
        loss,
        formats,
        outline,
        device,
        text,
        evaluation,
        notes,
        bytes_source,
    )


def make_outline(checkpoint: Source, skeleton: Skeleton, spec: QuantSpec) -> Outline:
    """What formats need to know of the output."""
    family = skeleton.family
    modules = (f"{block.prefix}.{linear}" for block in skeleton.blocks for linear in family.linears)
    linears = {name: _matrix_shape(checkpoint, f"{name}.weight") for name in modules}
    return Outline(checkpoint.directory, checkpoint.config, spec, checkpoint.dtype, linears, (family.head,))


def _matrix_shape(checkpoint: Source, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[name].shape
    return rows, columns


def versions() -> dict[str, str]:
    """Of swquant and the libraries that compute."""
    return {"swquant": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _finished(out: Path, key: Mapping[str, Any]) -> Report | None:
    """The report in ``out`` if it is the result of a run with this key."""
    try:
        report = Report.from_json((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if report.key == key else None


def _check_disk(plan: Plan, out: Path) -> None:
    recipe = plan.recipe
    assert recipe.samples is not None
    assert recipe.seq_len is not None
    shape = (recipe.samples + recipe.evaluation_samples, recipe.seq_len, plan.skeleton.hidden_size)
    require_disk(out, STREAMS_AT_ONCE * stream_bytes(shape) + (1 + len(plan.formats)) * plan.checkpoint.tensor_bytes)


def _start(plan: Plan, journal: Journal, out: Path, watching: Observer) -> None:
    """Make the samples and both streams in front of block 0; a start that fails leaves nothing."""
    try:
        _check_disk(plan, out)
        plan.checkpoint.require_finite()
        _begin(plan, journal, watching)
    except BaseException:
        journal.clear()
        raise


def _begin(plan: Plan, journal: Journal, watching: Observer) -> None:
    calibration, evaluation = _samples(plan, watching)
    tokens = torch.cat((calibration, evaluation))
    shape = (tokens.shape[0], tokens.shape[1], plan.skeleton.hidden_size)
    reference, quantized = (create_stream(journal.stream_path(name, 0), shape) for name in STREAMS)
    capture(plan.skeleton, plan.checkpoint, tokens, reference.__setitem__, quantized.__setitem__)
    journal.begin({"tokens": tokens}, shape, {"evaluation_samples": evaluation.shape[0]})


def _samples(plan: Plan, watching: Observer) -> tuple[Tensor, Tensor]:
    """Tokens to train on and tokens to measure on, ``[samples, tokens]`` each."""
    recipe, directory = plan.recipe, plan.checkpoint.directory
    samples, length, held = recipe.samples, recipe.seq_len, recipe.evaluation_samples
    assert samples is not None
    assert length is not None
    measured = torch.empty(0, length, dtype=torch.long)
    if held and plan.evaluation is not None:
        measured = eval_windows(tokenize(load_tokenizer(directory), plan.evaluation), length, held)
        held = 0
    if plan.text is None:
        watching.stage(f"Drawing {samples + held} samples of {length} tokens from the model")
        drawn = draw_from_model(directory, samples + held, length, recipe.seed, plan.device, watching.stage)
        return drawn[:samples], torch.cat((measured, drawn[samples:]))
    tokens = tokenize(load_tokenizer(directory), plan.text)
    held = min(held, len(tokens) // length // EVALUATION_SHARE)
    if held:
        measured = eval_windows(tokens[-held * length :], length, held)
        tokens = tokens[: -held * length]
    return sample_windows(tokens, samples, length, recipe.seed), measured


def _quality(plan: Plan, journal: Journal, watching: Observer) -> Quality | None:
    count = int(journal.notes["evaluation_samples"])
    if not count:
        return None
    watching.stage("Measuring perplexity and divergence")
    reference, quantized = journal.open_streams()
    tokens = journal.tokens()["tokens"][-count:]
    return measure(plan.skeleton, plan.checkpoint, (reference[-count:], quantized[-count:]), tokens, plan.device)


def _write(plan: Plan, journal: Journal, quality: Quality | None, key: Mapping[str, Any], source: str) -> Report:
    """Write every format and the report into the working directory's ``output``."""
    staging = journal.root / "output"
    shutil.rmtree(staging, ignore_errors=True)
    extra = {RECIPE: plan.recipe.to_yaml()}
    model = QuantizedModel(plan.outline, lambda: _parts(plan, journal), plan.checkpoint.sidecars(), extra)
    outputs: list[Output] = []
    for form, notes in zip(plan.formats, plan.notes, strict=True):
        place = form.name if len(plan.formats) > 1 else "."
        written = form.write(staging / place, model)
        outputs.append(Output(form.name, place, written.tensor_bytes, notes, form.loading(plan.spec)))
    finish = None if journal.final is None else journal.final["report"]
    report = Report(
        source=source,
        recipe=plan.recipe.to_mapping(),
        recipe_hash=plan.recipe.digest(),
        versions=versions(),
        blocks=journal.reports,
        finish=finish,
        quality=quality,
        bits_per_weight=_bits_per_weight(plan),
        bytes_source=plan.bytes_source,
        outputs=outputs,
        seconds=round(sum(float(part["seconds"]) for part in (*journal.reports, *([finish] if finish else []))), 3),
        key=key,
    )
    (staging / REPORT).write_text(report.to_json(), encoding="utf-8")
    return report


def _parts(plan: Plan, journal: Journal) -> Iterator[Part]:
    """The output's tensors: what lies outside the blocks as it is, then block by block."""
    checkpoint, inside = plan.checkpoint, f"{plan.skeleton.family.blocks}."
    for name in checkpoint.tensors:
        if not name.startswith(inside):
            yield {name: stored(checkpoint, name)}
    for index, block in enumerate(plan.skeleton.blocks):
        committed = journal.block(index, plan.spec)
        values: dict[str, Tensor | QTensor] = {**committed.params, **committed.quantized}
        yield {f"{block.prefix}.{name}": value for name, value in values.items()}


def _bits_per_weight(plan: Plan) -> float:
    """Codes, scales and zero points of the quantized linears, per weight."""
    bits = weights = 0
    spec = plan.spec
    for rows, columns in plan.outline.linears.values():
        per_group = SCALE_BITS + (0 if spec.symmetric else spec.bits)
        bits += rows * (columns * spec.bits + spec.groups(columns) * per_group)
        weights += rows * columns
    return bits / weights
