"""What a run leaves for people and programs: report.json and a summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


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
    notes: Sequence[str]
    loading: str
    command: str | None
    verification: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        source: What was quantized.
        recipe: The recipe with every default filled in.
        recipe_hash: Its hash.
        versions: Of swquant and the libraries that compute.
        blocks: For each block the phases' reports, the drift behind it and the seconds it took.
        quality: Measured by running both streams on through the model's head; ``None`` if no windows were asked for.
        bits_per_weight: Of the quantized weights, scales and zero points included.
        bytes_source: Of the source's tensors.
        seconds: Of the blocks and the training behind the last, over all the runs that it took.
        outputs: What was written, in the order of the recipe's formats.
        key: What the result depends on; a finished output with the same key is not made again.
        finish: The report of the training behind the last block, and its seconds; ``None`` where there was none.
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
    outputs: Sequence[Output]
    key: Mapping[str, Any] = field(default_factory=dict[str, Any])
    finish: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Report:
        """Undo :meth:`to_json`; raises ``ValueError``, ``KeyError`` or ``TypeError`` on anything else."""
        values = json.loads(text)
        if values["quality"] is not None:
            values["quality"] = Quality(**values["quality"])
        values["outputs"] = [Output(**output) for output in values["outputs"]]
        return Report(**values)

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
