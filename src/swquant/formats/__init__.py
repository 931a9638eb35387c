"""Output formats: a file here that defines a class of its own name is a format of that name."""

from __future__ import annotations

from pathlib import Path

from swquant import registry
from swquant.checkpoint.quantized import QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.errors import SwquantError
from swquant.formats.base import Format

PLAIN = "dequantized"
"""The one format that keeps no codes."""


def read_quantized(directory: Path, *, trusted: bool = False) -> tuple[Format, QuantizedModel]:
    """A quantized model of any format, and the format it is in; tensors are read when they are asked for.

    Args:
        directory: Where it is.
        trusted: See :func:`swquant.checkpoint.reader.read_config`.

    Raises:
        SwquantError: There is none in a format that keeps codes.
    """
    found = find_quantized(directory, trusted=trusted)
    if found is None:
        raise SwquantError(
            f"{directory} holds no quantized model that swquant reads, expected one of {', '.join(_readable())}; give "
            f"the directory that swquant quantize wrote ({PLAIN} keeps no codes: transformers loads its output)"
        )
    return found


def find_quantized(directory: Path, *, trusted: bool = False) -> tuple[Format, QuantizedModel] | None:
    """Like :func:`read_quantized`; ``None`` if there is none in a format that keeps codes."""
    config = read_config(directory, trusted=trusted)
    for name in _readable():
        form: Format = registry.load(__name__, name)()
        model = form.read(directory, config)
        if model is not None:
            return form, model
    return None


def _readable() -> list[str]:
    return [name for name in registry.names(__name__) if name != PLAIN]
