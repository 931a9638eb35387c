"""GPTQ: integer codes as GPTQModel, transformers and most servers load them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import EXPERT, QUANTIZATION_CONFIG, Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import (
    FUSED,
    WORD_BYTES,
    require_fits,
    require_tensor,
    safetensors_beside,
    split_note,
    stored_bytes,
)
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
from swquant.formats.reading import kept_in_blocks, require_plain
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import UNIFORM, QuantSpec

QUANTIZE_CONFIG = "quantize_config.json"

_LOAD = """\
from transformers import AutoModelForCausalLM  # needs gptqmodel and optimum
model = AutoModelForCausalLM.from_pretrained(path)"""

_LOAD_PLAIN_KERNEL = """\
from transformers import AutoModelForCausalLM, GPTQConfig  # needs gptqmodel and optimum
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))"""

_LOAD_SEVERAL = """\
from gptqmodel import GPTQModel
model = GPTQModel.load(path).model"""

_LOAD_SEVERAL_PLAIN_KERNEL = """\
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(path, backend=BACKEND.GPTQ_TORCH).model"""

SEVERAL = "weights on several grids"
"""Which transformers and optimum take for weights on one."""

_PLAIN = {"desc_act": False, "lm_head": False, "pack_dtype": "int32"}
_VERSIONS = {True: "gptq", False: "gptq_v2"}
"""The layout by symmetry: version 1 cannot tell a zero point of 0, version 2 is not read by old programs."""


class Gptq:
    """The layout of AutoGPTQ and GPTQModel: version 1 where the grid is symmetric, version 2 where it is not.

    :func:`swquant.formats.gptq_layout.encode_weight` tells ``qweight``, ``qzeros`` and ``scales``. Beside them stands
    ``name.g_idx``, ``int32 [in]``, the group of each input, here always ``i // g``.
    """

    name: ClassVar[str] = "gptq"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """Every uniform grid fits."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say which programs read it, and where readers round."""
        require_fits(self, outline, mixed=True)
        require_widths(self.name, outline)
        require_one_symmetry(self.name, outline)
        notes = (*split_note(outline), *rounding_notes(outline))
        if outline.others:
            several = (
                f"{SEVERAL}: GPTQModel, vLLM and swquant.load load this output; transformers, which reads one, does not"
            )
            notes = (several, *notes)
        if outline.most.symmetric:
            return notes
        if any(map(_loses_zero_points, outline.specs)):
            kernel = (
                "4 bits, asymmetric, one scale per channel: on a CPU GPTQModel picks a kernel that ignores the zero "
                'points; load with backend="gptq_torch", or choose a group size'
            )
            notes = (kernel, *notes)
        version = (
            "asymmetric: zero points are stored as in version 2 of the layout (gptq_v2), which GPTQModel reads, alone "
            "or through transformers; programs that know version 1 alone, AutoGPTQ among them, add one to each"
        )
        return (version, *notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes; see the class for names and shapes."""
        inputs = q.codes.shape[1]
        group = torch.arange(inputs, dtype=torch.int32) // q.spec.group_width(inputs)
        return {**encode_weight(name, q), f"{name}.g_idx": group}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`; ``g_idx`` may be missing, and may not reorder the inputs."""
        q = decode_weight(name, tensors, spec)
        if f"{name}.g_idx" in tensors:
            group = require_tensor(tensors, f"{name}.g_idx", torch.int32, 1)
            inputs = q.codes.shape[1]
            if not torch.equal(group, torch.arange(inputs, dtype=torch.int32) // spec.group_width(inputs)):
                raise SwquantError(
                    f"{name}.g_idx puts inputs into groups out of order, which swquant does not read; "
                    "quantize the model again without act-order"
                )
        return q

    def config(self, outline: Outline) -> dict[str, object]:
        """``quantization_config``, and the content of ``quantize_config.json``.

        What is on another grid than most or, beside the head, not quantized, stands under ``dynamic`` by patterns, the
        first of which counts. What is kept in the blocks is left out of ``modules_in_block_to_quantize`` too, for
        optimum, which takes all linears of the blocks otherwise.
        """
        spec = outline.most
        plain = [name for name in outline.ignored if name.rpartition(".")[2] != "lm_head"]
        settings: dict[str, object] = {
            "quant_method": "gptq",
            "bits": spec.bits,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "desc_act": False,
            "sym": spec.symmetric,
            "lm_head": False,
            "checkpoint_format": _VERSIONS[spec.symmetric],
            "pack_dtype": "int32",
        }
        patterns = _chosen(outline.grids, plain)
        dynamic: dict[str, dict[str, int]] = {f"-:{patterns[name]}": {} for name in plain}
        dynamic |= {f"+:{patterns[name]}": differing(own, spec) for name, own in outline.others.items()}
        if dynamic:
            settings["dynamic"] = dynamic
        if kept_in_blocks(outline):
            settings["modules_in_block_to_quantize"] = [list(outline.linears)]
        return settings

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A safetensors checkpoint with ``quantization_config``, and ``quantize_config.json`` that repeats it."""
        settings = self.config(model.outline)
        files = {**model.extra_files, QUANTIZE_CONFIG: json.dumps(settings, indent=2) + "\n"}
        whole = replace(with_dtype(model), extra_files=files)
        return write_codes(directory, whole, self.encode, {QUANTIZATION_CONFIG: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model, if ``config`` says GPTQ with our grids, several told as we do, and inputs in order."""
        settings = config.get(QUANTIZATION_CONFIG)
        if not isinstance(settings, dict) or settings.get("quant_method") != "gptq":
            return None
        require_plain(directory, settings, _PLAIN)
        version = settings.get("checkpoint_format", settings.get("format", "gptq"))
        spec = spec_of(directory, settings, "checkpoint_format", version, _VERSIONS)
        checkpoint = open_checkpoint(directory, quantized=True, trusted=trusts_code(config))
        rules = _rules(directory, settings.get("dynamic"), spec)
        used: set[str] = set()

        def of(module: str) -> QuantSpec:
            found = [pattern for pattern in _patterns(module) if pattern in rules]
            used.update(found)
            return rules[found[0]] if found else spec

        model = read_codes(checkpoint, of, (*SUFFIXES, "g_idx"), shape_of, self.decode)
        if rules.keys() - used:
            raise _unread(directory, settings["dynamic"])
        return model

    def loading(self, outline: Outline) -> str:
        """Through transformers, past the kernel that ignores zero points; several grids through GPTQModel alone."""
        plain = any(map(_loses_zero_points, outline.specs))
        if outline.others:
            return _LOAD_SEVERAL_PLAIN_KERNEL if plain else _LOAD_SEVERAL
        return _LOAD_PLAIN_KERNEL if plain else _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """AutoRound's tensors and each input's group."""
        return layout_bytes(outline.spec, rows, columns) + WORD_BYTES * columns

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Headers of shards."""
        return safetensors_beside(self, outline, tensors)


def _patterns(module: str) -> tuple[str, ...]:
    """Patterns that we write for a module: of its own name alone, and of all that runtimes fuse with it, whose one
    name vLLM and SGLang look for.

    Experts are found under the name of their list, with all that is in it.
    """
    own = f".*{re.escape(module)}$"
    inside = EXPERT.search(module)
    if inside is not None:
        return own, rf".*{re.escape(module[: inside.start()])}\.experts(\.|$)"
    parent, dot, last = module.rpartition(".")
    together = next((f"{'|'.join(parts)}|{fused}" for fused, parts in FUSED.items() if last in parts), None)
    return (own,) if together is None else (own, f".*{re.escape(parent + dot)}({together})$")


def _chosen(grids: Mapping[str, QuantSpec], plain: Collection[str]) -> dict[str, str]:
    """The pattern of each module: the wide one where all that it means is on one grid, or kept."""
    alike: dict[str, set[QuantSpec | None]] = {}
    for name in (*grids, *plain):
        alike.setdefault(_patterns(name)[-1], set()).add(grids.get(name))
    return {name: _patterns(name)[-1 if len(alike[_patterns(name)[-1]]) == 1 else 0] for name in (*grids, *plain)}


def _rules(directory: Path, dynamic: object, most: QuantSpec) -> dict[str, QuantSpec]:
    """Grids by pattern; what is left out, ``-:``, is seen by its tensors.

    Raises:
        SwquantError: A grid is told otherwise than by bits and group size.
    """
    if not dynamic:
        return {}
    if not isinstance(dynamic, dict):
        raise _unread(directory, dynamic)
    found: dict[str, QuantSpec] = {}
    for pattern, own in dynamic.items():
        if pattern.startswith("-:"):
            continue
        if not isinstance(own, dict) or not own.keys() <= {"bits", "group_size", "sym", "desc_act"}:
            raise _unread(directory, dynamic)
        if own.get("sym", most.symmetric) is not most.symmetric or own.get("desc_act"):
            raise _unread(directory, dynamic)
        found[pattern.removeprefix("+:")] = own_spec(directory, own, most)
    return found


def _unread(directory: Path, dynamic: object) -> SwquantError:
    return SwquantError(
        f"{directory} is quantized with dynamic {dynamic!r:.80}, of which swquant reads bits and group sizes under the "
        "patterns that it writes"
    )


def _loses_zero_points(spec: QuantSpec) -> bool:
    """Whether GPTQModel (7.6) takes its ``TorchFusedLinear`` on a CPU, which sets all offsets to zero."""
    return spec.bits == 4 and spec.group_size is None and not spec.symmetric
