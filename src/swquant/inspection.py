"""What is inside a quantized model, told from its files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from swquant.checkpoint.quantized import QuantizedModel, entries
from swquant.checkpoint.reader import find_model
from swquant.formats import read_quantized
from swquant.quant.codes import code_entropy, share_at_ends
from swquant.quant.qtensor import QTensor

FORMATS_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".data")


@dataclass(frozen=True)
class Kind:
    """All weights of one name in all blocks, e.g. every ``mlp.up_proj`` or ``mlp.experts.*.up_proj``.

    Attributes:
        name: The name within a block.
        count: How many there are.
        shape: ``(out, in)`` of the first.
        entropy: Mean over weights of ``-sum p log2 p`` of the shares ``p`` of the codes, in bits per code.
        ends: Share of codes that are the least or the greatest.
        scale: Least and greatest magnitude of a group's scale.
    """

    name: str
    count: int
    shape: tuple[int, int]
    entropy: float
    ends: float
    scale: tuple[float, float]


@dataclass(frozen=True)
class Inspection:
    """What a directory holds.

    Attributes:
        directory: Which.
        format: In which format.
        grid: Bits and group, in short.
        symmetric: Whether its zero point is fixed.
        model_type: The architecture.
        parameters: Quantized weights, and all values beside them.
        file_bytes: Of the files that hold weights.
        kinds: The quantized weights.
    """

    directory: str
    format: str
    grid: str
    symmetric: bool
    model_type: str
    parameters: tuple[int, int]
    file_bytes: int
    kinds: tuple[Kind, ...]

    @property
    def entropy(self) -> float:
        """Bits per code over all quantized weights: what a lossless coder could at best store them in."""
        sizes = [kind.count * kind.shape[0] * kind.shape[1] for kind in self.kinds]
        return sum(size * kind.entropy for size, kind in zip(sizes, self.kinds, strict=True)) / sum(sizes)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self) | {"entropy": self.entropy}, indent=1)


@dataclass
class _Tally:
    shapes: list[tuple[int, int]] = field(default_factory=list["tuple[int, int]"])
    entropies: list[float] = field(default_factory=list[float])
    ends: list[float] = field(default_factory=list[float])
    scales: list[float] = field(default_factory=list[float])


def inspect(source: str | Path) -> Inspection:
    """Read every code of a quantized model, a weight at a time.

    Raises:
        SwquantError: There is none, or it is damaged.
    """
    directory = find_model(source)
    form, model = read_quantized(directory)
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    quantized = plain = 0
    for name, value in _values(model):
        if isinstance(value, Tensor):
            plain += value.numel()
            continue
        quantized += value.codes.numel()
        _count(tallies[_within_block(name)], value)
    outline = model.outline
    return Inspection(
        directory=str(directory),
        format=form.name,
        grid=", ".join(spec.label for spec in outline.specs),
        symmetric=all(spec.symmetric for spec in outline.specs),
        model_type=str(outline.config.get("model_type")),
        parameters=(quantized, plain),
        file_bytes=sum(file.stat().st_size for file in directory.iterdir() if file.suffix in FORMATS_SUFFIXES),
        kinds=tuple(_kind(name, tally) for name, tally in tallies.items()),
    )


def _values(model: QuantizedModel) -> Iterator[tuple[str, Tensor | QTensor]]:
    for part in model.parts():
        yield from entries(part)


def _within_block(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` is an ``mlp.up_proj``; one name stands for all experts of a layer."""
    parts = name.removesuffix(".weight").split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return re.sub(r"(?<=\bexperts\.)\d+", "*", ".".join(parts[number + 1 :]))


def _count(tally: _Tally, value: QTensor) -> None:
    codes, bits = value.codes, value.spec.bits
    rows, columns = codes.shape
    tally.shapes.append((rows, columns))
    tally.entropies.append(code_entropy(codes, bits))
    tally.ends.append(share_at_ends(codes, bits))
    steps = value.steps.abs()
    tally.scales += [float(steps.min()), float(steps.max())]


def _kind(name: str, tally: _Tally) -> Kind:
    count = len(tally.shapes)
    return Kind(
        name,
        count,
        tally.shapes[0],
        sum(tally.entropies) / count,
        sum(tally.ends) / count,
        (min(tally.scales), max(tally.scales)),
    )
