"""The model card: what was done to the model, on what data, what was measured, and how to load the result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from swquant.errors import SwquantError
from swquant.quant.spec import in_words
from swquant.recipe import bits_of, shown_text
from swquant.report import Output, Report
from swquant.validation import read_yaml

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_FRONT_MATTER_BYTES = 1 << 16
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LICENCE_KEYS = ("license", "license_name", "license_link")


def licence_of(directory: Path) -> dict[str, Any]:
    """What the card in ``directory`` says of the licence, by the keys of the hub; empty if it does not."""
    try:
        with (directory / CARD).open("rb") as file:
            found = _FRONT_MATTER.match(file.read(_FRONT_MATTER_BYTES).decode("utf-8", "ignore"))
        values = read_yaml(found.group(1), CARD) if found else {}
    except (OSError, SwquantError):
        return {}
    if not isinstance(values, Mapping):
        return {}
    return {key: values[key] for key in _LICENCE_KEYS if isinstance(values.get(key), str)}


def model_card(report: Report, licence: Mapping[str, Any]) -> str:
    """The card in markdown, with the hub's metadata in front; everything in it comes from the report.

    Args:
        report: Of the run.
        licence: See :func:`licence_of`.
    """
    return "\n".join((_metadata(report, licence), *_text(report, licence))) + "\n"


def _metadata(report: Report, licence: Mapping[str, Any]) -> str:
    bare = report.source.partition("@")[0]
    local = not _HUB_NAME.fullmatch(bare) or Path(report.source).exists()
    data: Any = ModelCardData(
        base_model=None if local else bare,
        base_model_relation=None if local else "quantized",
        pipeline_tag="text-generation",
        tags=["swquant", f"{report.recipe['bits']}-bit", *(output.format for output in report.outputs)],
        **licence,
    )
    return f"---\n{data.to_yaml()}\n---"


def _text(report: Report, licence: Mapping[str, Any]) -> Iterator[str]:
    recipe, name = report.recipe, Path(report.source).name
    bits = f"{report.bits_per_weight:.3f} bits per quantized weight, scales and zero points included"
    if len(report.grids) > 1:
        bits += f"; of its matrices {in_words(report.grids)}"
    yield f"\n# {name}, {bits_of(recipe)}\n"
    yield f"Made of `{name}` by swquant {report.versions['swquant']}: {bits}."
    yield "\n## What was lost\n"
    yield from _losses(report)
    yield "\n## How to load it\n"
    for output in report.outputs:
        yield from _loading(output)
    yield "\n## How it was made\n"
    yield f"Calibration: {_calibration(recipe)}. The whole recipe, hash `{report.recipe_hash}`:\n"
    named_only = {key: Path(recipe[key]).name for key in ("calibration", "evaluation") if recipe[key] is not None}
    yield f"```yaml\n{yaml.safe_dump({**recipe, **named_only}, sort_keys=False).strip()}\n```"
    yield f"\nVersions: {', '.join(f'{package} {version}' for package, version in report.versions.items())}."
    yield "\n## Licence\n"
    named = licence.get("license_name") or licence.get("license")
    terms = f"says {named}" if named else "could not be read from its card: look it up before you share this model"
    yield f"That of the original model, which {terms}. Licence files that came with it are here."


def _losses(report: Report) -> Iterator[str]:
    quality = report.quality
    if quality is None:
        yield "Nothing was measured."
    else:
        given = report.recipe["evaluation"]
        measured = shown_text(str(given)) if given else f"a part of {_calibration(report.recipe)} that was held out"
        yield f"On {quality.tokens} tokens of {measured}:\n"
        yield "| | original | this model |\n|---|---:|---:|"
        yield f"| perplexity | {quality.perplexity_reference:.3f} | {quality.perplexity:.3f} |"
        yield f"| KL to the original, nats per token | 0 | {quality.kl:.4f} |"
        yield f"| top-1 agreement | 100 % | {100 * quality.top1:.1f} % |"
    yield from _drift(report)
    for event in report.events:
        yield f"- {event}"


def _drift(report: Report) -> Iterator[str]:
    drifts = [block.drift for block in report.block_reports]
    worst = max(range(len(drifts)), key=drifts.__getitem__)
    when = ", before the end-to-end training" if report.finish else ""
    yield f"\nSquared error of the hidden states over their energy{when}: {drifts[-1]:.4f} after the last block, most "
    yield f"after block {worst}, {drifts[worst]:.4f}. `report.html` shows every block.\n"


def _loading(output: Output) -> Iterator[str]:
    yield f"As {output.format}" + (f", in `{output.directory}`" if output.directory != "." else "") + ":\n"
    yield f'```python\npath = "PATH"\n{output.loading}\n```'
    if output.command is not None:
        yield f"\n```sh\n{output.command}\n```"
    for note in output.notes:
        yield f"- {note}"


def _calibration(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['samples']} samples of {recipe['seq_len']} tokens of {shown_text(str(recipe['calibration']))}"
