"""What formats share in reading files that may hold anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError
from swquant.quant.spec import UNIFORM, QuantSpec

_IN_A_LIST = re.compile(r"(.+?)\.\d+\.")


def spec_from(directory: Path, bits: object, group_size: object, symmetric: object, grid: str = UNIFORM) -> QuantSpec:
    """The grid that a file's settings tell.

    Args:
        directory: Where the file is, for the message.
        bits: Should be one of ours.
        group_size: Should be one of ours; ``None`` for one scale per output channel.
        symmetric: Should be a truth value.
        grid: Should be a kind of grid.

    Raises:
        SwquantError: If there is no such grid.
    """
    integers = type(bits) is int and (group_size is None or type(group_size) is int)
    if not integers or not isinstance(symmetric, bool):
        raise SwquantError(
            f"{directory} is quantized to {bits!r:.40} bits in groups of {group_size!r:.40}, symmetric: "
            f"{symmetric!r:.40}; expected two integers and true or false"
        )
    assert isinstance(bits, int)
    assert group_size is None or isinstance(group_size, int)
    try:
        return QuantSpec(bits, group_size, symmetric, grid)
    except SwquantError as error:
        raise SwquantError(f"{directory} cannot be read: {error}") from error


def grid_settings(spec: QuantSpec) -> dict[str, object]:
    """A grid as files of ours tell it: ``bits``, ``group_size`` (``null`` per channel), ``symmetric``, ``grid``."""
    kind = {} if spec.grid == UNIFORM else {"grid": spec.grid}
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric, **kind}


def grid_from(directory: Path, settings: object) -> QuantSpec:
    """Undo :func:`grid_settings`.

    Raises:
        SwquantError: It tells no grid.
    """
    given: Mapping[str, object] = settings if isinstance(settings, dict) else {}
    bits, group_size, symmetric = (given.get(key) for key in ("bits", "group_size", "symmetric"))
    return spec_from(directory, bits, group_size, symmetric, str(given.get("grid", UNIFORM)))


def grids_by_name(most: QuantSpec, others: Mapping[str, QuantSpec]) -> Callable[[str], QuantSpec]:
    """The grid of each module: its own where it has one, or that of most."""
    return lambda module: others.get(module, most)


def require_plain(directory: Path, settings: Mapping[str, Any], plain: Mapping[str, object]) -> None:
    """Refuse settings that change what the tensors mean; one that is missing or empty changes nothing.

    Args:
        directory: Where the file is, for the message.
        settings: What ``config.json`` says of the quantization.
        plain: Names and the only values that are read.

    Raises:
        SwquantError: Naming the setting.
    """
    for name, expected in plain.items():
        value = settings.get(name)
        if value and value != expected:
            raise SwquantError(
                f"{directory} is quantized with {name} {value!r:.80}, which swquant does not read, "
                f"expected {expected!r}"
            )


def require_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        SwquantError: With both shapes.
    """
    if tuple(tensor.shape) != expected:
        raise SwquantError(f"{name} has the shape {list(tensor.shape)}, expected {list(expected)}")


def blocks_of(outline: Outline) -> str:
    """Name of the list of blocks: what the names of quantized modules begin with, up to the block's number.

    Raises:
        SwquantError: There is no such list, or there are several.
    """
    found: dict[str, str] = {}
    for name in outline.linears:
        match = _IN_A_LIST.match(name)
        found.setdefault(match.group(1) if match else "", name)
    if "" in found or len(found) != 1:
        stray = found.get("", list(found.values())[-1])
        raise SwquantError(
            f"{outline.directory} has quantized weights outside of its blocks, such as {stray:.200}, which "
            "swquant does not read"
        )
    return next(iter(found))


def kept_in_blocks(outline: Outline) -> list[str]:
    """Names of the modules in the blocks whose matrices are not quantized."""
    lists = {match.group(1) for name in outline.linears if (match := _IN_A_LIST.match(name))}
    return [name for name in outline.ignored if (match := _IN_A_LIST.match(name)) and match.group(1) in lists]


def generation_settings(directory: Path) -> Mapping[str, Any]:
    """The content of ``generation_config.json``, empty where there is none that can be read."""
    try:
        settings = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
