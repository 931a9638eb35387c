"""From one container to another: the same integer codes, never quantized again."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from swquant import registry
from swquant.card import licence_of
from swquant.checkpoint.quantized import Outline, QuantizedModel, shapes_of, without
from swquant.checkpoint.reader import find_model
from swquant.checkpoint.sidecars import require_own
from swquant.checkpoint.writer import publish
from swquant.errors import SwquantError
from swquant.formats import PLAIN, read_quantized
from swquant.formats.base import Format, examine, held_by
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.formats.in_transformers import rehearsed
from swquant.model.opening import two_heads, untied
from swquant.model.settings import in_full
from swquant.model.skeleton import build_skeleton
from swquant.model.whole import require_called_for
from swquant.output import RECIPE, described, load_report, output_of, place_of
from swquant.places import REPORT, destination, require_disk, require_unused
from swquant.plan import choose_formats, unquantized
from swquant.recipe import Recipe
from swquant.report import Output
from swquant.targets import load_target, require_model
from swquant.verification import verify


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    runtime: str | None = None,
    trust_remote_code: bool = False,
) -> list[Output]:
    """Write a quantized model in other formats, from the codes that it holds.

    The new output is opened again and compared like that of a run, and appears whole or not at all.

    Args:
        source: A quantized model of any format that keeps codes; one that other software wrote is taken too where the
            layout is the same.
        out: A directory that does not exist yet or is empty.
        format: Names of formats with commas between them.
        runtime: What is to serve it; picks the format if there is none.
        trust_remote_code: Run the Python code that comes with the model, and hand it on.

    Returns:
        What was written.

    Raises:
        SwquantError: ``source`` keeps no codes, or a format or the runtime cannot hold what it keeps.
    """
    if format is None and runtime is None:
        raise SwquantError("no format to convert to; give --format or --for")
    out, directory = Path(out), find_model(source, trusted=trust_remote_code)
    _, model = read_quantized(directory, trusted=trust_remote_code)
    model = as_the_model_has_it(model)
    target = None if runtime is None else load_target(runtime)
    names = choose_formats(Recipe(format=format, runtime=runtime).formats, target, model.outline.specs)
    forms: tuple[Format, ...] = tuple(registry.load("swquant.formats", name)() for name in names)
    if CompressedTensors.name in names:
        model = replace(model, outline=rehearsed(model.outline))
    notes = [examine(form, model.outline) for form in forms]
    for name in names:
        require_model(target, name, model.outline)
    require_unused(out)
    require_disk(out, sum(_most_bytes(form, model.outline, directory) for form in forms))
    run = _directory_of_the_run(directory)
    model = replace(model, extra_files=_kept(run))
    final = destination(out)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        outputs: list[Output] = []
        for form, said in zip(forms, notes, strict=True):
            place = place_of(form, forms)
            held = held_by(form, model)
            written = form.write(staging / "output" / place, held)
            verified = verify(form, staging / "output" / place, held, None)
            outputs.append(output_of(form, place, written.tensor_bytes, said, model.outline, target, verified))
        _describe(run, staging / "output", outputs, ",".join(names), runtime)
        publish(staging / "output", out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return outputs


def as_the_model_has_it(model: QuantizedModel) -> QuantizedModel:
    """The model with the names of tensors that no module reads and of linears that are not quantized.

    Files need not tell either.
    """
    outline = model.outline
    shapes = shapes_of(model)
    skeleton = build_skeleton(outline.config, shapes, outline.directory)
    require_called_for(skeleton.names, outline.linears, outline.directory)
    if (keys := two_heads(skeleton)) is not None:
        model = with_one_head(model, *keys)
    outline = model.outline
    ignored = unquantized(skeleton, shapes, {f"{module}.weight" for module in outline.linears})
    config = outline.config
    if not config.get("architectures"):
        config = {**config, "architectures": [type(skeleton.model).__name__]}
    carried = skeleton.names.carried
    plain = outline.plain and {name: shape for name, shape in outline.plain.items() if name not in carried}
    full = in_full(config, outline.directory)
    return replace(model, outline=replace(outline, config=full, ignored=ignored, plain=plain, carried=carried))


def with_one_head(model: QuantizedModel, head: str, embedding: str) -> QuantizedModel:
    """A model whose configuration says that its head is the embedding, and which has both: one decision for all.

    An equal copy is left out; with a head that differs, the configuration says so. It is what
    :func:`swquant.model.opening.open_model` decides for models that are to be quantized.
    """
    outline = model.outline
    found = {name: value for part in model.parts() for name, value in part.items() if name in (head, embedding)}
    one, other = found[head], found[embedding]
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)):
        return replace(model, outline=replace(outline, config=untied(outline.config)))
    return without(model, (head,))


def _most_bytes(form: Format, outline: Outline, directory: Path) -> int:
    """What the output takes at most: the source's files, and the linears as plain weights where codes are not kept."""
    held = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    plain = sum(rows * columns for rows, columns in outline.linears.values()) * outline.dtype.itemsize
    return held + plain if form.name == PLAIN else 2 * held


def _directory_of_the_run(directory: Path) -> Path:
    """Where the report is: above, if the model is one of several formats that one run has written."""
    above = directory.resolve().parent
    return above if not (directory / REPORT).is_file() and (above / REPORT).is_file() else directory


def _kept(directory: Path) -> dict[str, bytes]:
    recipe = directory / RECIPE
    if not recipe.is_file():
        return {}
    require_own(recipe, directory)
    return {RECIPE: recipe.read_bytes()}


def _describe(directory: Path, staging: Path, outputs: list[Output], formats: str, runtime: str | None) -> None:
    """The report and the card of the run that made the codes, about the new outputs."""
    try:
        require_own(directory / REPORT, directory)
        report = load_report(directory / REPORT)
        recipe = {**report.recipe, "format": formats, "runtime": runtime}
        texts = described(replace(report, outputs=outputs, recipe=recipe, key={}), licence_of(directory))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
