"""What a run may begin with: a plain checkpoint, or a quantized one that is widened as it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swquant.checkpoint.reader import (
    Checkpoint,
    already_quantized,
    find_model,
    open_checkpoint,
    quantization_of,
    read_config,
)
from swquant.checkpoint.shards import read_errors
from swquant.checkpoint.source import Source
from swquant.checkpoint.sources import fp8, gptq, mxfp4, packed
from swquant.checkpoint.sources.base import Found
from swquant.checkpoint.widened import Widened, widen

Find = Callable[[Checkpoint, Mapping[str, Any]], Found]

ALWAYS: Mapping[str, Find] = {"fp8": fp8.find, "mxfp4": mxfp4.find}
"""Methods in which models are trained or first published: nothing better exists."""
ASKED: Mapping[str, Find] = {packed.METHOD: packed.find, gptq.METHOD: gptq.find}
"""Methods that have lost something of an original, which is to be preferred."""


@dataclass(frozen=True)
class SourceOptions:
    """Which files a source is, and what may be done to them.

    Attributes:
        revision: A branch, tag or commit on the hub.
        subfolder: Where in its directory or repository the model lies.
        dequantize: Take one that has been quantized by a method of :data:`ASKED`.
        trust_remote_code: Run the Python code that comes with the model, and hand it on.
    """

    revision: str | None = None
    subfolder: str | None = None
    dequantize: bool = False
    trust_remote_code: bool = False


def open_source(source: str | Path, options: SourceOptions | None = None) -> Checkpoint | Widened:
    """Find a model that a run can begin with and check what its configuration and headers tell; no weight is read.

    Args:
        source: A model directory, or ``owner/name`` or ``owner/name@revision`` on the hub.
        options: Which files, and what may be done to them.

    Raises:
        SwquantError: There is no such model, it is not a whole safetensors checkpoint, or it is quantized in a way
            that is not read, or not without being asked for.
    """
    given = options or SourceOptions()
    trusted = given.trust_remote_code
    directory = find_model(source, given.revision, given.subfolder, trusted=trusted)
    with read_errors(directory):
        found = quantization_of(read_config(directory))
    if found is None:
        return open_checkpoint(directory, trusted=trusted)
    method, settings = found
    if method in ASKED and not given.dequantize:
        instead = "give the original model, or --dequantize-source to begin with what is left of it"
        raise already_quantized(directory, method, instead)
    find = {**ALWAYS, **ASKED}.get(method)
    if find is None:
        raise already_quantized(directory, method, "give the original model")
    files = open_checkpoint(directory, quantized=True, trusted=trusted)
    return widen(files, find(files, settings))


def note_of(source: Source) -> str | None:
    """What was widened, if anything was."""
    return source.note if isinstance(source, Widened) else None
