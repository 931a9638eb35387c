"""The token embedding and the head on a grid of their own: rounded to the nearest, row by row, and nowhere trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swquant.checkpoint.source import Source
from swquant.errors import SwquantError
from swquant.model.skeleton import Skeleton
from swquant.quant.draft import commit, open_draft
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

GROUP = 32
"""Weights that share a scale: a block of llama.cpp's ``Q8_0`` and ``Q4_0``, and MLX's smallest group."""

ROWS = 4096
"""Rows that are in memory in float32 at once."""


def grids_of_ends(skeleton: Skeleton, embedding: int | None, head: int | None) -> dict[str, QuantSpec]:
    """Grids of the embedding and of the head, by the names of their weights in memory.

    Args:
        skeleton: The model's code. Where the head is the embedding, both get what is given for one of them.
        embedding: Bits of the embedding; ``None`` keeps it as it is.
        head: Bits of the head, likewise.

    Raises:
        SwquantError: The two are one and are given different bits, or a weight is no tensor of its own on disk, or its
            rows are no whole groups.
    """
    if skeleton.tied and None not in (embedding, head) and embedding != head:
        raise SwquantError(
            f"the head is the embedding, and --embedding-bits is {embedding} where --head-bits is {head}: give one"
        )
    tied = embedding if embedding is not None else head
    asked = {skeleton.embedding: tied} if skeleton.tied else {skeleton.embedding: embedding, skeleton.head: head}
    found = {f"{name}.weight": QuantSpec(bits, GROUP, True) for name, bits in asked.items() if bits is not None}
    for name in found:
        piece = skeleton.names.pieces.get(name)
        if piece is None or not piece.whole or not piece.key.endswith(".weight"):
            raise SwquantError(f"{name} is no tensor of its own on disk: leave --embedding-bits and --head-bits out")
        columns = skeleton.model.get_parameter(name).shape[1]
        if columns % GROUP:
            raise SwquantError(
                f"{name} has {columns} columns, which groups of {GROUP} do not divide: leave --embedding-bits and "
                "--head-bits out"
            )
    return found


def on_grid(rows: Tensor, spec: QuantSpec) -> QTensor:
    """Rows of such a weight, each rounded by itself."""
    return commit(open_draft({"": rows.float()}, ("",), spec)).quantized[""]


def as_output(rows: Tensor, spec: QuantSpec | None, dtype: torch.dtype) -> Tensor:
    """Rows of a weight as an output holds them: in the dtype that it has there, or what its codes stand for.

    Args:
        rows: ``[rows, columns]``.
        spec: Its grid, if it has one.
        dtype: Of a weight without.
    """
    if spec is None:
        return rows.to(dtype)
    return torch.cat([on_grid(part, spec).dequantize() for part in rows.split(ROWS)])


def quantized_end(source: Source, name: str, spec: QuantSpec) -> QTensor:
    """The weight ``name`` of ``source`` on its grid, some rows in memory at a time."""
    count = source.tensors[name].shape[0]
    parts = [on_grid(source.rows(name, rows), spec) for rows in torch.arange(count).split(ROWS)]
    held: Mapping[str, Tensor] = {key: torch.cat([part.parts[key] for part in parts]) for key in parts[0].parts}
    return QTensor(torch.cat([part.codes for part in parts]), held, spec)
