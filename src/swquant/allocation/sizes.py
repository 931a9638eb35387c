"""Bytes of the files that hold an output's weights, everything in them counted, before there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from swquant.estimate.disk import output_bytes
from swquant.formats.base import Format
from swquant.model.ends import grids_of_ends
from swquant.model.layout import Site, lay_out
from swquant.plan import Plan, make_outline
from swquant.quant.spec import QuantSpec

WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data")
"""Files of an output that hold weights. Beside them lie the configuration, the tokenizer where it is not in them, an
index of shards, and what tells of the run."""


def weight_files_bytes(directory: Path) -> int:
    """Bytes of the files in an output that hold its weights."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in directory.glob(pattern))


def file_bytes(plan: Plan) -> int:
    """The most that :func:`weight_files_bytes` comes to once ``plan`` has been carried out."""
    form = plan.formats[0]
    tensors = output_bytes(form, plan)
    return tensors + form.beside_bytes(plan.outline, tensors)


def tensor_bytes(plan: Plan, form: Format, site: Site, spec: QuantSpec | None) -> int:
    """Bytes of one matrix on a grid, or as it is on disk."""
    if spec is None:
        return plan.checkpoint.tensors[site.weight].nbytes
    return form.weight_bytes(replace(plan.outline, grids={"": spec}, ends={}), *site.shape)


def on_grids(
    plan: Plan, grids: Mapping[str, QuantSpec | None], embedding_bits: int | None, head_bits: int | None
) -> Plan:
    """``plan`` with other grids, as far as its size goes.

    Raises:
        SwquantError: They do not fit the model, or no matrix is quantized.
    """
    layout = lay_out(plan.skeleton, plan.spec, grids, allow_split=plan.recipe.allow_split)
    skeleton = replace(plan.skeleton, ends=grids_of_ends(plan.skeleton, embedding_bits, head_bits))
    outline = make_outline(plan.disk, plan.checkpoint, skeleton, layout)
    return replace(plan, layout=layout, skeleton=skeleton, outline=outline)
