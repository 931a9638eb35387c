"""AutoRound: the layout of the auto-round package, which transformers loads with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import require_fits, safetensors_beside, split_note, stored_bytes
from swquant.formats.gptq_layout import (
    SUFFIXES,
    decode_weight,
    differing,
    encode_weight,
    layout_bytes,
    own_spec,
    require_one_symmetry,
    require_widths,
    rounding_notes,
    shape_of,
    spec_of,
    with_dtype,
)
from swquant.formats.reading import blocks_of, grids_by_name, kept_in_blocks, require_plain
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import UNIFORM, QuantSpec

SETTINGS = "quantization_config.json"

_LOAD = """\
from transformers import AutoModelForCausalLM  # needs auto-round
model = AutoModelForCausalLM.from_pretrained(path)"""

_PACKINGS = {True: "auto_round:auto_gptq", False: "auto_round"}
"""The packing by symmetry, as the package itself writes it: the first stores zero points less one."""

_KEPT = {"bits": 16, "data_type": "float"}
"""What the package says of a linear that is kept as it is."""

_PLAIN = {"data_type": "int", "act_bits": 16, "rotation_config": {}, "spinquant_config": {}}


class AutoRound:
    """The integer layout of the auto-round package, equal to GPTQ's but for ``g_idx``, which it lacks.

    :func:`swquant.formats.gptq_layout.encode_weight` tells the tensors. A symmetric model is packed as
    ``auto_round:auto_gptq``, zero points less one; an asymmetric one as ``auto_round``, zero points as they are.
    """

    name: ClassVar[str] = "auto_round"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """Every uniform grid fits."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say which programs read it, and where readers round."""
        require_fits(self, outline, mixed=True)
        require_widths(self.name, outline)
        require_one_symmetry(self.name, outline)
        blocks_of(outline)
        notes = (*split_note(outline), *rounding_notes(outline))
        if outline.most.symmetric:
            return notes
        packing = (
            "asymmetric: zero points are stored as they are (packing_format auto_round), as the auto-round package "
            "does; programs that know auto_round:auto_gptq alone refuse it"
        )
        return (packing, *notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes; see the class for names and shapes."""
        return encode_weight(name, q)

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`."""
        return decode_weight(name, tensors, spec)

    def config(self, outline: Outline) -> dict[str, object]:
        """``quantization_config``, for the linears of the blocks; ``extra_config`` names those that are otherwise."""
        spec = outline.most
        extra: dict[str, dict[str, object]] = {name: dict(_KEPT) for name in kept_in_blocks(outline)}
        extra |= {name: dict(differing(own, spec)) for name, own in outline.others.items()}
        settings: dict[str, object] = {
            "quant_method": "auto-round",
            "packing_format": _PACKINGS[spec.symmetric],
            "bits": spec.bits,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "sym": spec.symmetric,
            "data_type": "int",
            "block_name_to_quantize": blocks_of(outline),
        }
        return settings | ({"extra_config": extra} if extra else {})

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A safetensors checkpoint with ``quantization_config``, and a file of that name that repeats it."""
        settings = self.config(model.outline)
        files = {**model.extra_files, SETTINGS: json.dumps(settings, indent=2) + "\n"}
        whole = replace(with_dtype(model), extra_files=files)
        return write_codes(directory, whole, self.encode, {QUANTIZATION_CONFIG: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model, if ``config`` says auto-round with our grids, those that differ by the names of their linears."""
        settings = config.get(QUANTIZATION_CONFIG)
        if not isinstance(settings, dict) or settings.get("quant_method") != "auto-round":
            return None
        require_plain(directory, settings, _PLAIN)
        spec = spec_of(directory, settings, "packing_format", settings.get("packing_format"), _PACKINGS)
        checkpoint = open_checkpoint(directory, quantized=True, trusted=trusts_code(config))
        others = _others(directory, settings.get("extra_config"), spec)
        model = read_codes(checkpoint, grids_by_name(spec, others), SUFFIXES, shape_of, self.decode)
        if not others.keys() <= model.outline.linears.keys():
            raise _unread(directory, settings["extra_config"])
        return model

    def loading(self, outline: Outline) -> str:
        """Through transformers."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Codes, packed zero points and scales."""
        return layout_bytes(outline.spec, rows, columns)

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Headers of shards."""
        return safetensors_beside(self, outline, tensors)


def _others(directory: Path, extra: object, most: QuantSpec) -> dict[str, QuantSpec]:
    """The linears that ``extra_config`` puts on a grid of their own, without those that it keeps.

    Raises:
        SwquantError: It says something else.
    """
    if not extra:
        return {}
    found: dict[str, QuantSpec] = {}
    for name, own in extra.items() if isinstance(extra, dict) else [("", extra)]:
        if own == _KEPT:
            continue
        if not isinstance(own, dict) or not own or not own.keys() <= {"bits", "group_size", "sym", "data_type"}:
            raise _unread(directory, extra)
        if own.get("sym", most.symmetric) is not most.symmetric or own.get("data_type", "int") != "int":
            raise _unread(directory, extra)
        found[name] = own_spec(directory, own, most)
    return found


def _unread(directory: Path, extra: object) -> SwquantError:
    return SwquantError(
        f"{directory} is quantized with extra_config {extra!r:.80}, of which swquant reads bits and group sizes of "
        "linears that are named one by one"
    )
