"""A quantized model between the run that made it and the files that hold it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.converted import Blend, Stack
from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.writer import Written, write_checkpoint
from swquant.errors import SwquantError
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

Part = Mapping[str, Tensor | QTensor | Stack | Blend]
"""Some of a model's tensors by their names on disk, e.g. a block's; a quantized weight has the name of the weight.

A tensor that is put together from several quantized ones is a :class:`Stack`, or a :class:`Blend` with others.
"""

Encode = Callable[[str, QTensor, torch.dtype], Mapping[str, Tensor]]
Decode = Callable[[str, Mapping[str, Tensor], QuantSpec], QTensor]
ShapeOf = Callable[[str, Checkpoint, QuantSpec], tuple[int, int]]

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of modules of experts."""

QUANTIZATION_CONFIG = "quantization_config"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outline:
    """What is known of a quantized model before its codes are.

    Attributes:
        directory: A directory with the tokenizer.
        config: ``config.json`` as it is without quantization.
        dtype: The model's dtype, in which plain tensors are stored.
        linears: Each quantized module, e.g. ``model.layers.0.self_attn.q_proj``, and ``(out, in)`` of its weight.
        grids: The grid of each, by the same names.
        ignored: Names of the linear modules that are not quantized, e.g. ``lm_head``.
        apart: Tensors on disk that hold quantized weights and are no module's own: experts in one tensor, transposed
            layers. Formats of codes have no name for them.
        plain: Names and shapes of all other tensors that the model reads, where the files tell them without being read.
        carried: Tensors on disk that no module of the model reads.
        ends: The embedding and the head where they are quantized: shape and grid by module; not among ``linears``.
        unread: Why transformers does not load the model as compressed-tensors; ``None`` if it does.
        unpacked: Why it does so with ``dequantize=True`` alone; ``None`` if it need not.
    """

    directory: Path
    config: Mapping[str, Any]
    dtype: torch.dtype
    linears: Mapping[str, tuple[int, int]]
    grids: Mapping[str, QuantSpec]
    ignored: tuple[str, ...]
    apart: tuple[str, ...] = ()
    plain: Mapping[str, tuple[int, ...]] | None = None
    carried: tuple[str, ...] = ()
    ends: Mapping[str, tuple[tuple[int, int], QuantSpec]] = field(
        default_factory=dict[str, "tuple[tuple[int, int], QuantSpec]"]
    )
    unread: str | None = None
    unpacked: str | None = None

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """The grids, each once."""
        return tuple(dict.fromkeys(self.grids.values()))

    @property
    def most(self) -> QuantSpec:
        """The grid of most weights, which formats with a place for exceptions name once.

        Where there are experts, that of most of theirs: readers that put experts together know them by no name of ours.
        """
        counts: dict[tuple[bool, QuantSpec], int] = {}
        for name, spec in self.grids.items():
            rows, columns = self.linears.get(name, (1, 1))
            key = EXPERT.search(name) is not None, spec
            counts[key] = counts.get(key, 0) + rows * columns
        return max(counts, key=lambda key: (key[0], counts[key]))[1]

    @property
    def others(self) -> dict[str, QuantSpec]:
        """The modules that are on another grid than :attr:`most`, embedding and head among them."""
        most, ends = self.most, {name: spec for name, (_, spec) in self.ends.items()}
        return {name: spec for name, spec in (*self.grids.items(), *ends.items()) if spec != most}

    @property
    def spec(self) -> QuantSpec:
        """The grid that all weights are on.

        Raises:
            SwquantError: There are several.
        """
        if len(self.specs) > 1:
            labels = ", ".join(spec.label for spec in self.specs)
            raise SwquantError(f"{self.directory} has weights on several grids ({labels}), expected one")
        return next(iter(self.specs))


@dataclass(frozen=True)
class QuantizedModel:
    """Everything that a format writes.

    Attributes:
        outline: The model.
        parts: Starts a pass over all of its tensors, part by part, no more than one in memory.
        sidecars: Files to copy beside the weights: tokenizer, licence.
        extra_files: Further files by name.
    """

    outline: Outline
    parts: Callable[[], Iterator[Part]]
    sidecars: tuple[Path, ...] = ()
    extra_files: Mapping[str, str | bytes] = field(default_factory=dict[str, "str | bytes"])


def write_codes(
    directory: Path, model: QuantizedModel, encode: Encode, settings: Mapping[str, Mapping[str, object]]
) -> Written:
    """Write a model as a safetensors checkpoint whose quantized weights are what ``encode`` makes of them.

    Args:
        directory: See :func:`swquant.checkpoint.writer.write_checkpoint`.
        model: The model.
        encode: From a module's name, its codes and the model's dtype to full names and tensors.
        settings: What ``config.json`` says of the quantization, by key.
    """
    return write_checkpoint(
        directory,
        (_encoded(part, encode, model.outline.dtype) for part in model.parts()),
        config={**model.outline.config, **settings},
        sidecars=model.sidecars,
        extra_files=model.extra_files,
    )


def read_codes(
    checkpoint: Checkpoint,
    spec: QuantSpec | Callable[[str], QuantSpec],
    suffixes: tuple[str, ...],
    shape_of: ShapeOf,
    decode: Decode,
) -> QuantizedModel:
    """The model that :func:`write_codes` has written; tensors are read when ``parts`` comes to them.

    Args:
        checkpoint: Its files.
        spec: The grid that its configuration states, of all modules or of each by its name.
        suffixes: Ends of the names of a quantized module's tensors, such as ``qweight``; the first is of every module.
        shape_of: From a module's name, the files and the spec to ``(out, in)``.
        decode: The inverse of ``encode``.

    Raises:
        SwquantError: There is no quantized module.
    """
    key = f".{suffixes[0]}"
    modules = [name.removesuffix(key) for name in checkpoint.tensors if name.endswith(key)]
    if not modules:
        raise SwquantError(
            f"{checkpoint.directory} holds no tensor that ends with {key}, so nothing in it is quantized"
        )
    grids = {module: spec if isinstance(spec, QuantSpec) else spec(module) for module in modules}
    packed = {f"{module}.{suffix}" for module in modules for suffix in suffixes}

    def parts() -> Iterator[Part]:
        for name in checkpoint.tensors:
            if name not in packed:
                yield {name: checkpoint.read(name)}
        for module in modules:
            names = (f"{module}.{suffix}" for suffix in suffixes)
            tensors = {name: checkpoint.read(name) for name in names if checkpoint.has(name)}
            yield {f"{module}.weight": decode(module, tensors, grids[module])}

    config = {key: value for key, value in checkpoint.config.items() if key not in _SETTINGS}
    outline = Outline(
        checkpoint.directory,
        config,
        model_dtype(config) or checkpoint.dtype,
        {module: shape_of(module, checkpoint, grids[module]) for module in modules},
        grids,
        (),
        plain={name: stored.shape for name, stored in checkpoint.tensors.items() if name not in packed},
    )
    return QuantizedModel(outline, parts, checkpoint.sidecars())


def entries(part: Part) -> Iterator[tuple[str, Tensor | QTensor]]:
    """Tensors and codes by name, for a format that holds nothing else.

    Raises:
        SwquantError: A tensor is put together from several quantized weights.
    """
    for name, value in part.items():
        if isinstance(value, Stack | Blend):
            raise SwquantError(f"{name} holds several quantized weights in one tensor; choose the format dequantized")
        yield name, value


def without(model: QuantizedModel, left_out: Collection[str]) -> QuantizedModel:
    """The model without these of its plain tensors."""
    if not left_out:
        return model
    parts, plain = model.parts, model.outline.plain
    kept = plain and {name: shape for name, shape in plain.items() if name not in left_out}
    return replace(
        model,
        outline=replace(model.outline, plain=kept),
        parts=lambda: ({name: value for name, value in part.items() if name not in left_out} for part in parts()),
    )


def shapes_of(model: QuantizedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of all tensors, weights for codes."""
    outline = model.outline
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": shape for module, shape in outline.linears.items()}
    shapes |= {f"{module}.weight": shape for module, (shape, _) in outline.ends.items()}
    if outline.plain is not None:
        return shapes | dict(outline.plain)
    for part in model.parts():
        shapes |= {name: tuple(value.shape) for name, value in part.items() if isinstance(value, Tensor)}
    return shapes


_SETTINGS = (QUANTIZATION_CONFIG, "quantization")
"""Keys of ``config.json`` that belong to a format; ``quantization`` is MLX's."""


def model_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that ``config.json`` names, if it is one of ours."""
    return _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))))


def _encoded(part: Part, encode: Encode, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in entries(part):
        if isinstance(value, QTensor):
            tensors.update(encode(name.removesuffix(".weight"), value, dtype))
        else:
            tensors[name] = value
    return tensors
