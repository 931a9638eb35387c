"""Whether transformers' own code can load a model as compressed-tensors, found by going through it without values.

Two things in it fail on some models, whatever their codes are. The rules that put tensors together or take one apart
(``conversion_mapping.py``) are made to read codes as soon as a model has any, also where what they read is kept as it
is. And before weights are put in, a model's own code draws initial values, and some of it takes a linear's ``weight``
for granted, which a packed linear does not have; with ``dequantize=True`` no linear is packed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from swquant.checkpoint.names import Mixed, analyse, rules_on
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, Outline
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.model.empty import as_described, build_empty

_PACKED = ("weight_packed", "weight_scale", "weight_shape")


def rehearsed(outline: Outline) -> Outline:
    """The outline with what transformers makes of it as compressed-tensors: ``unread`` and ``unpacked``.

    Raises:
        SwquantError: The configuration does not describe a model.
    """
    packed = {f"{module}.weight": tuple(shape) for module, shape in outline.linears.items()}
    settings = CompressedTensors().config(outline)
    config = json.dumps({**outline.config, QUANTIZATION_CONFIG: settings}, sort_keys=True)
    shapes = {**packed, **(outline.plain or {})}
    unread, unpacked = _obstacles(config, outline.directory, tuple(shapes.items()), frozenset(packed))
    return replace(outline, unread=unread, unpacked=unpacked)


@lru_cache(maxsize=4)
def _obstacles(
    config: str, directory: Path, shapes: tuple[tuple[str, tuple[int, ...]], ...], packed: frozenset[str]
) -> tuple[str | None, str | None]:
    values: dict[str, Any] = json.loads(config)
    with as_described(directory):
        model = build_empty(values, torch.float32, directory)
        pieces, _, _ = analyse(model, dict(shapes))
        rules = rules_on(model, dict(shapes))
    for name, piece in pieces.items():
        if piece.whole and piece.key in packed and "[" not in name:
            _pack(model.get_submodule(name.removesuffix(".weight")))
    plain = [rule for rule in rules if not packed.issuperset(rule.keys)]
    unread = _fails_to_convert(model, plain, dict(shapes), values[QUANTIZATION_CONFIG])
    return unread, None if unread is not None else _fails_to_initialize(model)


def _pack(linear: nn.Module) -> None:
    """Give a linear the names that compressed-tensors gives it instead of ``weight``."""
    delattr(linear, "weight")
    for name in _PACKED:
        linear.register_parameter(name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))


def _fails_to_convert(
    model: Any, rules: Iterable[Mixed], shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]
) -> str | None:
    """Make the rules read codes as ``from_pretrained`` does, and put together what is plain."""
    quantizer = CompressedTensorsHfQuantizer(CompressedTensorsConfig(**settings), pre_quantized=True)
    quantizer.validate_environment()
    adapt: Any = quantizer.update_weight_conversions
    more = [model] if len(inspect.signature(adapt).parameters) > 1 else []  # transformers before and after 5.20
    try:
        adapt(get_model_conversion_mapping(model), *more)
    except ValueError:
        return "one of its rules for this model takes a tensor apart, which it cannot do where a model has codes"
    for rule in rules:
        adapted = replace(rule, converter=adapt([rule.converter], *more)[0])
        try:
            made = adapted.convert({key: torch.empty(shapes[key], device="meta") for key in rule.keys})
        except Exception:  # transformers' operations raise whatever they run into
            made = {}
        if made.keys() != rule.targets.keys():
            return f"it puts {rule.keys[0]} together with others by a rule that expects codes there"
    return None


def _fails_to_initialize(model: Any) -> str | None:
    """Draw initial values as ``from_pretrained`` does, module by module."""
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        owner: Any = module if isinstance(module, PreTrainedModel) else owners.get(name.rpartition(".")[0], model)
        owners[name] = owner
        try:
            owner._init_weights(module)
        except AttributeError as error:
            if "has no attribute 'weight'" in str(error):
                return f"its code gives {name} initial values as if linears had plain weights"
        except Exception:
            continue
    return None
