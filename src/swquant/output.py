"""A finished run on its way out: every format written from the same codes, opened again, and reported."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from swquant.advice import advise
from swquant.allocated import Allocation
from swquant.card import CARD, licence_of, model_card
from swquant.checkpoint.converted import Blend, Stack, to_disk
from swquant.checkpoint.names import Names
from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import Outline, Part, QuantizedModel
from swquant.checkpoint.source import stored
from swquant.engine.head import predictions
from swquant.engine.run_state import RunState
from swquant.formats.base import Format, held_by
from swquant.html.page import report_page
from swquant.model.calls import Front
from swquant.model.ends import quantized_end
from swquant.places import REPORT
from swquant.plan import Plan, versions
from swquant.quant.kind import row_bits
from swquant.quant.qtensor import QTensor
from swquant.report import Output, Quality, Report
from swquant.targets.base import Target
from swquant.timed import Timed
from swquant.verification import Verification, verify

PLACE = "PATH"
"""Stands for the output's directory in a serving command."""

LARGEST = 1 << 26
"""Bytes of a report beyond which it is not read."""

PAGE, RECIPE = "report.html", "swquant.yaml"


def write_output(
    plan: Plan, run_state: RunState, quality: Quality | None, key: Mapping[str, Any], source: str
) -> Report:
    """Write every format and the report into the working directory's ``output``."""
    staging = run_state.root / "output"
    shutil.rmtree(staging, ignore_errors=True)
    extra = {RECIPE: plan.recipe.to_yaml()}
    model = QuantizedModel(plan.outline, lambda: _parts(plan, run_state), plan.checkpoint.sidecars(), extra)
    sample = _sample(plan, run_state)
    outputs = [
        _write_format(plan, form, notes, staging, model, sample)
        for form, notes in zip(plan.formats, plan.notes, strict=True)
    ]
    finish = None if run_state.final is None else run_state.final["report"]
    chosen = run_state.notes.get("allocation")
    report = Report(
        source=source,
        recipe=plan.recipe.to_mapping(),
        recipe_hash=plan.recipe.digest(),
        versions=versions(),
        blocks=run_state.reports,
        finish=finish,
        quality=quality,
        bits_per_weight=_bits_per_weight(plan),
        bytes_source=plan.bytes_source,
        outputs=outputs,
        seconds=round(sum(float(part["seconds"]) for part in (*run_state.reports, *([finish] if finish else []))), 3),
        key=key,
        reading=tuple(run_state.notes["reading"]),
        grids=plan.layout.counts,
        allocation=None if chosen is None else Allocation.from_mapping(chosen),
        time=_timed(run_state),
        parameters=sum(math.prod(tensor.shape) for tensor in plan.disk.tensors.values()),
    )
    report = replace(report, advice=advise(report))
    for name, text in described(report, licence_of(plan.checkpoint.directory)).items():
        (staging / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return report


def _timed(run_state: RunState) -> Timed | None:
    """What was chosen and changed for a time, and how long all of it has taken."""
    if run_state.timer is None:
        return None
    return replace(Timed.from_mapping(run_state.notes["time"]), taken=round(run_state.timer(), 1))


def load_report(path: Path) -> Report:
    """The report in a file that anyone may have written.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than any report, or is none.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    return Report.from_json(path.read_text(encoding="utf-8"))


def described(report: Report, licence: Mapping[str, Any]) -> dict[str, str]:
    """Files that tell of a run: for programs, a page for people, and the model's card.

    Raises:
        ValueError: The report is not one that swquant wrote; so do ``KeyError`` and ``TypeError``.
    """
    return {REPORT: report.to_json(), PAGE: report_page(report), CARD: model_card(report, licence)}


def place_of(form: Format, forms: tuple[Format, ...]) -> str:
    """Where a format goes in the output: a directory of its own if it is one of several."""
    return form.name if len(forms) > 1 else "."


def _write_format(
    plan: Plan,
    form: Format,
    notes: tuple[str, ...],
    staging: Path,
    model: QuantizedModel,
    sample: tuple[Tensor, Tensor] | None,
) -> Output:
    """Write one format, and open it again."""
    place = place_of(form, plan.formats)
    model = held_by(form, model)
    written = form.write(staging / place, model)
    served = plan.target is not None and form.name in plan.target.formats
    verified = verify(form, staging / place, model, sample if served else None)
    return output_of(form, place, written.tensor_bytes, notes, plan.outline, plan.target, verified)


def output_of(
    form: Format,
    place: str,
    size: int,
    notes: tuple[str, ...],
    outline: Outline,
    target: Target | None,
    verified: Verification,
) -> Output:
    """What a report says of a written format; of the runtime where that reads it.

    Args:
        form: The format.
        place: Its directory in the output.
        size: Bytes of its tensors.
        notes: What the format had to say.
        outline: The model.
        target: The runtime that the outputs are for.
        verified: What was found equal.
    """
    serving = target if target is not None and form.name in target.formats else None
    specs = outline.specs
    spec = min(specs, key=lambda spec: (spec.symmetric, spec.bits))  # what is hardest to serve decides the command
    said = () if serving is None else dict.fromkeys(note for spec in specs for note in serving.notes(form.name, spec))
    return Output(
        format=form.name,
        directory=place,
        bytes=size,
        notes=(*notes, *said),
        loading=_trusting(form.loading(outline), outline),
        command=None if serving is None else _serving(serving.command(form.name, spec, PLACE), outline),
        verification=asdict(verified),
    )


def _trusting(code: str, outline: Outline) -> str:
    """Code that loads a model, with trust in the model's own code where that goes along."""
    if not trusts_code(outline.config):
        return code
    return re.sub(r"(from_pretrained|swquant\.load)\(path", r"\1(path, trust_remote_code=True", code)


def _serving(command: str | None, outline: Outline) -> str | None:
    """Likewise the command that serves a model; all runtimes that read such models call the flag alike."""
    return command if command is None or not trusts_code(outline.config) else f"{command} --trust-remote-code"


def _sample(plan: Plan, run_state: RunState) -> tuple[Tensor, Tensor] | None:
    """Tokens and the quantized model's logits for them; ``None`` where a runtime's whole model might not fit.

    Runtimes are not given a model's own code to run.
    """
    if plan.target is None or trusts_code(plan.disk.config) or not _fits_in_memory(plan):
        return None
    _, quantized = run_state.open_hidden_states()
    front = Front.load(plan.skeleton, plan.checkpoint, plan.device)
    return run_state.tokens()["tokens"][-1:], predictions(front, plan.checkpoint, quantized[-1:])


def _fits_in_memory(plan: Plan) -> bool:
    """Whether half of the free memory holds the model in float32, as a runtime may load it."""
    values = sum(math.prod(tensor.shape) for tensor in plan.checkpoint.tensors.values())
    return 2 * 4 * values < psutil.virtual_memory().available


def _parts(plan: Plan, run_state: RunState) -> Iterator[Part]:
    """The output's tensors under their names on disk: what lies outside the blocks as it is, then block by block."""
    names, skeleton = plan.skeleton.names, plan.skeleton
    inside = names.keys_of(f"{block.prefix}.{name}" for block in skeleton.blocks for name in block.names())
    changed: set[str] = set()
    if plan.pipeline.rotate:
        outside = [f"{skeleton.embedding}.weight", f"{skeleton.head}.weight", *skeleton.outside]
        changed = names.keys_of(outside)
        for name in (name for name in outside if name not in skeleton.ends):
            yield _on_disk(names, {name: stored(plan.checkpoint, name)})
    for name, spec in skeleton.ends.items():
        yield _on_disk(names, {name: quantized_end(plan.checkpoint, name, spec)})
    changed |= names.keys_of(skeleton.ends)
    for name in plan.disk.tensors:
        if name not in inside and name not in changed and name not in names.dropped:
            yield {name: plan.disk.read(name)}
    for index, block in enumerate(skeleton.blocks):
        committed = run_state.block(index, plan.layout.grids(index))
        values: dict[str, Tensor | QTensor] = {**committed.params, **committed.quantized}
        yield _on_disk(names, {f"{block.prefix}.{name}": value for name, value in values.items()})


def _on_disk(names: Names, part: Mapping[str, Tensor | QTensor]) -> Part:
    """``part`` under its names on disk; what is put together from plain tensors alone is put together here."""
    out: dict[str, Tensor | QTensor | Stack | Blend] = {}
    for key, value in to_disk(names, part):
        if isinstance(value, Stack) and all(isinstance(one, Tensor) for one in value.values):
            out[key] = value.assemble(value.values)
        elif isinstance(value, Blend) and all(isinstance(one, Tensor) for one in value.values.values()):
            out |= value.assemble(value.values)
        else:
            out[key] = value
    return out


def _bits_per_weight(plan: Plan) -> float:
    """Codes, scales and zero points of the quantized linears, per weight."""
    bits = weights = 0
    for site in plan.layout.sites:
        rows, columns = site.shape
        assert site.spec is not None
        bits += rows * row_bits(site.spec, columns)
        weights += rows * columns
    return bits / weights
