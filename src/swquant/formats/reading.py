"""What formats share in reading files that may hold anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swquant.errors import SwquantError
from swquant.families import family_for
from swquant.quant.spec import QuantSpec


def spec_from(directory: Path, bits: object, group_size: object, symmetric: object) -> QuantSpec:
    """The grid that a file's settings tell.

    Args:
        directory: Where the file is, for the message.
        bits: Should be one of ours.
        group_size: Should be one of ours; ``None`` for one scale per output channel.
        symmetric: Should be a truth value.

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
        return QuantSpec(bits, group_size, symmetric)
    except SwquantError as error:
        raise SwquantError(f"{directory} cannot be read: {error}") from error


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


def require_whole(directory: Path, config: Mapping[str, Any], modules: Collection[str]) -> None:
    """Refuse a model whose quantized modules are others than all linears of its blocks: no format could say so.

    Nothing is made of a number of blocks that the files do not hold.

    Raises:
        SwquantError: Naming a module, or the number of blocks.
    """
    family, blocks = family_for(config), config.get("num_hidden_layers")
    if type(blocks) is not int or not 0 < blocks <= len(modules):
        raise SwquantError(
            f"{directory} has {len(modules)} quantized weights for the {blocks!r:.40} blocks of its config.json; "
            "write it again"
        )
    expected = {f"{family.blocks}.{index}.{linear}" for index in range(blocks) for linear in family.linears}
    for name in sorted(expected.symmetric_difference(modules)):
        found = "no quantized" if name in expected else "a quantized"
        raise SwquantError(
            f"{directory} has {found} {name:.200}; swquant reads models of which all linears of the blocks are "
            "quantized, and no others"
        )
