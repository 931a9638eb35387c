"""What a run leaves for people and programs: report.json and a summary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, TypeAdapter

from swquant.allocated import Allocation
from swquant.phases.base import PhaseReport
from swquant.timed import Timed

_FLAT_LIST = re.compile(r"\[\n([^\[\]{}\"]*?)\n *\]")
"""A list of numbers in indented JSON; no line ends within a JSON text, so none is touched."""

_Size = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True)
class Quality:
    """The quantized model beside the original on text that trained nothing.

    Attributes:
        tokens: Predicted tokens measured.
        perplexity_reference: Of the original, ``exp`` of the mean negative log-likelihood.
        perplexity: Of the quantized model.
        kl: Mean over tokens of ``KL(original || quantized)``, in nats.
        top1: Share of tokens for which both rank the same token first.
    """

    tokens: int
    perplexity_reference: float
    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Output:
    """One of the formats that a run wrote.

    Attributes:
        format: Its name.
        directory: Where it lies, relative to the run's ``out``.
        bytes: Of its tensors.
        notes: What to know about it.
        loading: Python code that loads it.
        command: The shell command that serves it by the runtime that the recipe names, with ``PATH`` for its directory.
        verification: What was found equal when it was opened again, see :class:`swquant.verification.Verification`.
    """

    format: str
    directory: str
    bytes: int
    notes: tuple[str, ...]
    loading: str
    command: str | None
    verification: Mapping[str, Any]


@dataclass(frozen=True)
class Shift:
    """How far the outputs ``q`` of a quantized block are from the original's ``r``, over tokens and channels.

    Attributes:
        mse: Mean of ``(q - r)**2``.
        relative_error: ``sum (q - r)**2 / sum r**2``.
        cosine: Mean over tokens of the cosine between ``q`` and ``r``.
        sliced_wasserstein: Mean over directions of the 1-Wasserstein distance between the projections of both, in the
            units of the outputs.
        mean_shift: ``|mean q - mean r| / |std r|``, norms over channels of moments over tokens.
        variance_shift: ``|var q - var r| / |var r|``, likewise.
    """

    mse: float
    relative_error: float
    cosine: float
    sliced_wasserstein: float
    mean_shift: float
    variance_shift: float


@dataclass(frozen=True)
class Slice:
    """Outputs projected on one direction, counted in bins of equal width.

    Attributes:
        direction: Its number; a number is the same direction in every block and run of one width.
        low: Where the first bin begins.
        high: Where the last bin ends; what lies outside of both is not counted.
        original: Tokens in each bin, of the original's outputs.
        before: Those of the block with its weights rounded to the nearest.
        after: Those of the quantized block.
        distance_before: 1-Wasserstein distance of ``before`` from the original, of all tokens.
        distance_after: Likewise of ``after``.
    """

    direction: int
    low: float
    high: float
    original: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    distance_before: float
    distance_after: float


@dataclass(frozen=True)
class CodeUse:
    """What the codes of a weight hold.

    Attributes:
        shape: ``(out, in)``.
        bits: Of the whole weight, scales and zero points included.
        entropy_before: ``-sum p log2 p`` of the shares of the codes, rounded to the nearest, in bits per code.
        entropy_after: Likewise of the codes after the block's own training.
        saturated_before: Share of codes that are the least or the greatest, rounded to the nearest.
        saturated_after: Likewise of the codes after the block's own training.
    """

    shape: tuple[_Size, _Size]
    bits: _Size
    entropy_before: float
    entropy_after: float
    saturated_before: float
    saturated_after: float


@dataclass(frozen=True)
class Measured:
    """One block on tokens that did not train it, fed with what the quantized blocks before it put out.

    Attributes:
        tokens: How many.
        rms: Root of the mean square of the original's outputs, the unit of some of :class:`Shift`.
        before: The block with its weights rounded to the nearest.
        after: The quantized block.
        slices: Projections on fixed directions and, last, on that with the greatest distance ``after``; none where an
            output is not finite.
        codes: By the name of a linear in the block.
    """

    tokens: int
    rms: float
    before: Shift
    after: Shift
    slices: tuple[Slice, ...]
    codes: Mapping[str, CodeUse]


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block.

    Attributes:
        phases: What was done.
        drift: ``sum (q - r)**2 / sum r**2`` between both models' hidden states after it, over all samples.
        seconds: How long it took.
        measured: Before and after; ``None`` in reports of older versions.
        peak_bytes: Most memory that the process had held until then; ``None`` in reports of older versions.
        device_peak_bytes: Likewise of tensors on the device; ``None`` on a CPU too.
        forward_seconds: What a sample took to go through the original's block; ``None`` in reports of older versions.
        ended: Seconds of the run when it was finished; ``None`` in a run without a time.
    """

    phases: tuple[PhaseReport, ...]
    drift: float
    seconds: float
    measured: Measured | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    forward_seconds: float | None = None
    ended: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values as JSON gives them back."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class FinalCodes:
    """What the codes of a weight hold after the training of the whole model.

    Attributes:
        entropy: ``-sum p log2 p`` of the shares of the codes, in bits per code.
        saturated: Share of codes that are the least or the greatest.
    """

    entropy: float
    saturated: float


@dataclass(frozen=True)
class FinalBlock:
    """One block of the model that was trained as a whole, on the tokens of its :class:`Measured`.

    Attributes:
        shift: Its outputs, fed with what the trained blocks before it put out, beside the original's.
        codes: By the name of a linear in the block; empty where codes were not trained.
    """

    shift: Shift
    codes: Mapping[str, FinalCodes]


@dataclass(frozen=True)
class _RecipeFacts:
    """What is told of a report's recipe, which may have more keys; see :class:`swquant.recipe.Recipe`."""

    bits: _Size
    group_size: _Size | Literal["channel"]
    symmetric: StrictBool
    method: str
    loss: str | None
    calibration: str
    evaluation: str | None
    samples: _Size
    seq_len: _Size
    preset: str
    seed: StrictInt


_BLOCKS, _PHASE, _RECIPE = TypeAdapter(tuple[BlockReport, ...]), TypeAdapter(PhaseReport), TypeAdapter(_RecipeFacts)
_FINAL_BLOCKS = TypeAdapter(tuple[FinalBlock, ...])


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        source: What was quantized.
        recipe: The recipe with every default filled in.
        recipe_hash: Its hash.
        versions: Of swquant and the libraries that compute.
        blocks: A :class:`BlockReport` for each, as plain values.
        quality: Measured from both models' hidden states by the model's head; ``None`` if no windows were asked for.
        bits_per_weight: Of the quantized weights, scales and zero points included.
        bytes_source: Of the source's tensors.
        seconds: Of the blocks and the training after the last, over all the runs that it took.
        outputs: What was written, in the order of the recipe's formats.
        key: What the result depends on; a finished output with the same key is not made again.
        finish: The report of the training after the last block, its seconds, and a :class:`FinalBlock` for each block
            under ``blocks``; ``None`` where there was none.
        advice: What to try next, see :mod:`swquant.advice`.
        grids: How many matrices are on each grid, by its name, or ``kept`` by a pattern; empty in older reports.
        parameters: Of the original, tied ones once; 0 in older reports.
        reading: What to know of how the model reads text: what windows begin with, and where other readers differ.
        allocation: How grids were chosen for a size, ``None`` where they were given.
        time: How much was trained for a time, and what was changed on the way; ``None`` in a run without one.
    """

    source: str
    recipe: Mapping[str, Any]
    recipe_hash: str
    versions: Mapping[str, str]
    blocks: Sequence[Mapping[str, Any]]
    quality: Quality | None
    bits_per_weight: float
    bytes_source: int
    seconds: float
    outputs: list[Output]
    key: Mapping[str, Any] = field(default_factory=dict[str, Any])
    finish: Mapping[str, Any] | None = None
    advice: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()
    grids: Mapping[str, int] = field(default_factory=dict[str, int])
    parameters: int = 0
    allocation: Allocation | None = None
    time: Timed | None = None

    def whole_bits(self, output: Output) -> float | None:
        """Bits per weight over a whole output, embeddings, norms and head too; ``None`` in older reports."""
        return 8 * output.bytes / self.parameters if self.parameters else None

    def to_json(self) -> str:
        """The text of ``report.json``."""
        text = json.dumps(asdict(self), indent=1)
        return _FLAT_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text)

    @staticmethod
    def from_json(text: str) -> Report:
        """Undo :meth:`to_json`; raises ``ValueError`` on anything else."""
        try:
            report = _REPORT.validate_python(json.loads(text))
            _RECIPE.validate_python(report.recipe)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return report

    @cached_property
    def block_reports(self) -> tuple[BlockReport, ...]:
        """:attr:`blocks`, each value checked to be of its type; raises ``ValueError`` if one is not."""
        return _BLOCKS.validate_python(self.blocks)

    @cached_property
    def finish_report(self) -> PhaseReport | None:
        """:attr:`finish`, checked likewise."""
        return None if self.finish is None else _PHASE.validate_python(self.finish)

    @cached_property
    def final_blocks(self) -> tuple[FinalBlock, ...]:
        """Each block after the training of the whole model, checked likewise; empty in reports of older versions."""
        return () if self.finish is None else _FINAL_BLOCKS.validate_python(self.finish.get("blocks", ()))

    @cached_property
    def measured_blocks(self) -> tuple[tuple[int, Measured], ...]:
        """The number of each block that was measured, and what was found."""
        found = ((index, block.measured) for index, block in enumerate(self.block_reports))
        return tuple((index, measured) for index, measured in found if measured is not None)

    @cached_property
    def code_uses(self) -> tuple[Mapping[str, CodeUse], ...]:
        """For each block that was measured how its weights use their codes, as they were written."""
        final = {index: block.codes for index, block in enumerate(self.final_blocks)}
        return tuple(_as_written(measured.codes, final.get(index, {})) for index, measured in self.measured_blocks)

    @property
    def events(self) -> list[str]:
        """What went wrong in training and was recovered from, block by block."""
        found = [
            f"block {index}: {event}"
            for index, block in enumerate(self.blocks)
            for phase in block["phases"]
            for event in phase["events"]
        ]
        return found + [f"end to end: {event}" for event in (self.finish or {"events": []})["events"]]


def _as_written(codes: Mapping[str, CodeUse], final: Mapping[str, FinalCodes]) -> dict[str, CodeUse]:
    return {
        name: replace(use, entropy_after=final[name].entropy, saturated_after=final[name].saturated)
        if name in final
        else use
        for name, use in codes.items()
    }


_REPORT = TypeAdapter(Report)
