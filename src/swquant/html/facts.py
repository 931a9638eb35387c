"""What a page tells, taken from a report and put into words and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from swquant.quant.spec import UNIFORM
from swquant.recipe import SELF, bits_of, shown_patterns, shown_text
from swquant.report import BlockReport, CodeUse, Output, Quality, Report
from swquant.units import size, span

PATHS = ("calibration", "evaluation")


@dataclass(frozen=True)
class Fact:
    """A number and its name, e.g. perplexity 34.17, of the original 32.04."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Layer:
    """All weights of one name in all blocks.

    Attributes:
        name: E.g. ``mlp.up_proj``.
        count: How many.
        shape: ``out x in`` of the first.
        bits_per_weight: Scales and zero points included.
        bytes: Of all.
        share: Of the bytes of all quantized weights.
        entropy: Mean of the codes' entropies, in bits per code: rounded to the nearest, and in the end.
        saturated: Mean share of codes at either end of the grid, likewise.
    """

    name: str
    count: int
    shape: str
    bits_per_weight: float
    bytes: float
    share: float
    entropy: tuple[float, float]
    saturated: tuple[float, float]


def title_of(report: Report) -> str:
    """The model's name and the bits, without the author's directories."""
    return f"{PurePath(report.source).name}, {bits_of(report.recipe)}"


def grid_of(recipe: Mapping[str, Any]) -> str:
    """The grid in a few words."""
    others = (
        f"; other grids: {shown_patterns([*map(_pattern, recipe['grids'].items())])}" if recipe.get("grids") else ""
    )
    groups = "per channel" if recipe["group_size"] == "channel" else f"groups of {recipe['group_size']}"
    if "grid" in recipe:
        return f"grid {recipe['grid']}, {groups}{others}"
    return f"{recipe['bits']} bits, {groups}, {'symmetric' if recipe['symmetric'] else 'asymmetric'}{others}"


def _pattern(entry: tuple[str, Mapping[str, Any] | None]) -> str:
    """A pattern and what it gives."""
    name, grid = entry
    if grid is None:
        return f"{name} kept"
    return (
        f"{name} {grid['grid'] if grid['grid'] != UNIFORM else grid_of({k: v for k, v in grid.items() if k != 'grid'})}"
    )


def recipe_text(report: Report) -> str:
    """The recipe as YAML, files by their names alone."""
    named = {key: PurePath(str(report.recipe[key])).name for key in PATHS if report.recipe.get(key) is not None}
    return yaml.safe_dump({**report.recipe, **named}, sort_keys=False).strip()


def measured_on(report: Report) -> str:
    """The text of the report's numbers."""
    recipe = report.recipe
    if recipe["evaluation"] is not None:
        return shown_text(str(recipe["evaluation"]))
    text = shown_text(str(recipe["calibration"]))
    return text if recipe["calibration"] == SELF else f"a part of {text} that was held out"


def main_facts(report: Report) -> list[Fact]:
    """The few numbers that a reader looks for first."""
    quality, output = report.quality, report.outputs[0]
    facts = [] if quality is None else list(_quality_facts(quality))
    smaller = f"{report.bytes_source / max(1, output.bytes):.2f} times smaller than {size(report.bytes_source)}"
    whole = report.whole_bits(output)
    return [
        *facts,
        Fact("bits per weight", f"{report.bits_per_weight:.3f}", "scales and zero points included"),
        *([] if whole is None else [Fact("bits over the whole file", f"{whole:.2f}", "embeddings and head included")]),
        Fact("size", size(output.bytes), smaller),
        Fact("time", span(report.seconds), _memory(report.block_reports)),
    ]


def layers_of(uses: Sequence[Mapping[str, CodeUse]]) -> list[Layer]:
    """The quantized weights by kind, in the order of the block, from each block's."""
    kinds = {name: [codes[name] for codes in uses if name in codes] for codes in uses for name in codes}
    total = sum(use.bits for same in kinds.values() for use in same) / 8
    return [
        Layer(
            name=name,
            count=len(same),
            shape=f"{same[0].shape[0]} x {same[0].shape[1]}",
            bits_per_weight=sum(use.bits for use in same) / sum(use.shape[0] * use.shape[1] for use in same),
            bytes=sum(use.bits for use in same) / 8,
            share=sum(use.bits for use in same) / 8 / total,
            entropy=(_mean(use.entropy_before for use in same), _mean(use.entropy_after for use in same)),
            saturated=(_mean(use.saturated_before for use in same), _mean(use.saturated_after for use in same)),
        )
        for name, same in kinds.items()
    ]


def rest_of(report: Report, layers: Sequence[Layer]) -> float | None:
    """Bytes of what is not quantized, in the first output; ``None`` if that keeps no codes, and so other sizes."""
    output = report.outputs[0]
    return output.bytes - sum(layer.bytes for layer in layers) if output.verification["weights"] else None


def opened(output: Output) -> str:
    """What was compared when the output was opened again, and what was not."""
    found = output.verification
    said = [f"{found['weights']} weights equal to the bit"] if found["weights"] else []
    if found["reader"]:
        said.append(f"the same by {found['reader']}")
    if found["runtime"]:
        same = 100 * found["top1"]
        said.append(f"predictions of {found['runtime']} {found['kl']:.2g} nats away, top-1 agreement {same:.1f} %")
    return ", ".join(said) or "not by other code: its package is not installed"


def notes_of(report: Report) -> list[str]:
    """What to know about the reading of text and the outputs, each sentence once."""
    return list(dict.fromkeys((*report.reading, *(note for output in report.outputs for note in output.notes))))


def _quality_facts(quality: Quality) -> Iterator[Fact]:
    yield Fact("perplexity", f"{quality.perplexity:.3f}", f"original {quality.perplexity_reference:.3f}")
    yield Fact("KL to the original", f"{quality.kl:.4f}", "nats per token")
    yield Fact("top-1 agreement", f"{100 * quality.top1:.1f} %", "of the tokens")


def _memory(blocks: Sequence[BlockReport]) -> str:
    host = max((block.peak_bytes or 0 for block in blocks), default=0)
    device = max((block.device_peak_bytes or 0 for block in blocks), default=0)
    if not host:
        return ""
    return f"at most {size(host)} of memory" + (f", {size(device)} on the device" if device else "")


def _mean(values: Iterator[float] | Sequence[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
