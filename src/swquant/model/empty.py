"""transformers' model for a ``config.json``, without weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from swquant.checkpoint.own_code import CODE, names_code, trusts_code
from swquant.errors import SwquantError, reason_of

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
"""Keys of a configuration that say how many layers there are, of the language model or of a tower."""


def read_config(values: Mapping[str, Any], place: Path) -> Any:
    """transformers' configuration for the content of a ``config.json``.

    Args:
        values: The content. Where it names code, it was read with trust in that code, and the code is run.
        place: The directory of the file, and of the code.

    Raises:
        SwquantError: Its ``model_type`` is none that the installed transformers knows.
        Exception: Whatever the content makes transformers run into.
    """
    given = copy.deepcopy({key: value for key, value in values.items() if key not in _QUANTIZATION})
    given = PreTrainedConfig._decode_special_floats(given)  # infinity, which JSON cannot say  # pyright: ignore
    kind = given.get("model_type")
    own = _own_class(values, "AutoConfig", place)
    if own is not None or kind in CONFIG_MAPPING:
        return (own or CONFIG_MAPPING[kind]).from_dict(given)
    if kind is None:
        raise SwquantError("config.json has no model_type; take the configuration that the model's author published")
    unknown = f"model_type {kind!r:.200} is none that transformers {transformers.__version__} knows"
    if not trusts_code(values) and names_code(place):
        raise SwquantError(
            f"{unknown}, and Python code comes with the model: read that code, and give --trust-remote-code to run it"
        )
    raise SwquantError(f"{unknown}; a newer release may")


def _own_class(values: Mapping[str, Any], auto: str, place: Path) -> Any:
    """The class that the model's own trusted code has for one of transformers' ``Auto`` classes, if it has one."""
    named = values.get(CODE) if trusts_code(values) else None
    reference = named.get(auto) if isinstance(named, Mapping) else None
    return get_class_from_dynamic_module(reference, place) if isinstance(reference, str) else None


_QUANTIZATION = ("quantization_config", "quantization")


def model_class(values: Mapping[str, Any], config: Any, place: Path) -> type[PreTrainedModel]:
    """The class with a language-model head: the architecture that ``config.json`` names, or the one for its type.

    Args:
        values: The content of ``config.json``; see :func:`read_config`.
        config: What was read of it.
        place: The directory of the file.

    Raises:
        SwquantError: There is no such class for this kind of model.
    """
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        own = _own_class(values, auto, place)
        if own is not None:
            return own
    known = _classes(config)
    if not known:
        raise SwquantError(
            f"transformers has no class that predicts text for model_type {config.model_type!r}: "
            "give a decoder for text, or a model for images and text"
        )
    for name in values.get("architectures") or ():
        if _OTHER_HEADS.search(str(name)):
            raise SwquantError(
                f"architectures names {name!r:.200}, which does not predict text: give the model that it was made from"
            )
        if name in {one.__name__ for one in known}:
            return next(one for one in known if one.__name__ == name)
    return known[0]


_OTHER_HEADS = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")
"""Ends of architectures whose files have another head than the one for text, even where their kind has both."""


def _classes(config: Any) -> list[type[PreTrainedModel]]:
    found: list[type[PreTrainedModel]] = []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        mapping: Any = auto._model_mapping  # pyright: ignore
        if type(config) in mapping:
            classes = mapping[type(config)]
            found += classes if isinstance(classes, (tuple, list)) else [classes]
    return found


def build_empty(
    values: Mapping[str, Any], dtype: torch.dtype, place: Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> Any:
    """The model for the content of a ``config.json``: parameters on ``meta``, buffers that it computes itself real.

    Args:
        values: The content.
        dtype: Of the parameters.
        place: The directory of the file.
        shapes: Of the tensors in the files. More layers than tensors are refused before any is made, and computed
            buffers that are larger than all tensors before they take memory; a ``config.json`` may say anything.

    Raises:
        SwquantError: There is no class for it, or it asks for too many layers or too large buffers.
        Exception: Whatever else the content makes transformers run into.
    """
    config = read_config(values, place)
    for key, count in _depths(values):
        if shapes is not None and not 0 <= count <= max(len(shapes), 1):
            raise SwquantError(f"{key} is {count}, and the files hold {len(shapes)} tensors")
    chosen = model_class(values, config, place)
    tie = values.get("tie_word_embeddings")
    if isinstance(tie, bool):
        config.tie_word_embeddings = tie
    with torch.device("meta"):
        model: Any = chosen._from_config(config, dtype=dtype)  # pyright: ignore
    model.eval().requires_grad_(False)
    if shapes is not None:
        _refuse_large_buffers(model, shapes)
    compute_buffers(model)
    return model


def _refuse_large_buffers(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse buffers that hold more than the files do, such as the frequencies of a ``head_dim`` of two billion."""
    needed = sum(value.nbytes for _, value in model.named_buffers())
    stored = sum(math.prod(shape) for shape in shapes.values()) * _LEAST_BYTES
    if needed > max(stored, _ALWAYS_BYTES):
        name, largest = max(model.named_buffers(), key=lambda pair: pair[1].nbytes)
        raise SwquantError(
            f"it asks for {needed / 1e9:.1f} GB of computed buffers, such as {name} of shape {list(largest.shape)}, "
            "which is more than the files hold; compare head_dim and max_position_embeddings with its author's"
        )


_LEAST_BYTES = 2
"""Of a weight, as published."""
_ALWAYS_BYTES = 128_000_000
"""Buffers of this size are made for the smallest model."""


@contextmanager
def as_described(place: Path) -> Generator[None]:
    """What the ``config.json`` in ``place`` makes transformers run into becomes one sentence."""
    config = place / "config.json"
    try:
        yield
    except SwquantError as error:
        raise SwquantError(f"{config}: {error}") from error
    except Exception as error:  # transformers raises whatever the file makes it run into
        raise SwquantError(f"{config} does not describe a model: {reason_of(error)}") from error


def _depths(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _depths(value)
        elif key in DEPTHS and type(value) is int:
            yield key, value


@torch.no_grad()
def compute_buffers(model: nn.Module) -> None:
    """Make every buffer that is not saved outside of ``meta``, as ``from_pretrained`` does: by the model's own code.

    A buffer that this code leaves alone stays on ``meta``, so that whoever uses it fails instead of reading anything.
    """
    owners: dict[str, Any] = {}
    unset: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in list(model.named_modules()):
        parent = name.rpartition(".")[0]
        owners[name] = module if isinstance(module, PreTrainedModel) else owners.get(parent, owners.get(""))
        unsaved = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        empty = {key: value for key, value in module.named_buffers(recurse=False) if value.is_meta and key in unsaved}
        for key, value in empty.items():
            module._buffers[key] = torch.full_like(value, _unset(value.dtype), device="cpu")  # pyright: ignore
        if empty:
            unset[name] = empty
            owners[name]._init_weights(module)
    left = [name for name, empty in unset.items() if _still_unset(model.get_submodule(name), empty)]
    # Some models compute a buffer where they initialize the module above.
    for above in dict.fromkeys(parent for name in left for parent in _above(name)):
        owners[above]._init_weights(model.get_submodule(above))
    for name in left:
        module = model.get_submodule(name)
        for key in _still_unset(module, unset[name]):
            module._buffers[key] = unset[name][key]  # pyright: ignore[reportPrivateUsage]


def _still_unset(module: nn.Module, empty: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of a module's buffers that still hold what they were filled with."""
    return [
        key
        for key, value in empty.items()
        if bool((module._buffers[key].nan_to_num(_UNSET) == _unset(value.dtype, _UNSET)).all())  # pyright: ignore
    ]


def _above(name: str) -> Iterator[str]:
    """Names of the modules that hold it, from the inside out, but for the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


_UNSET = -7.0
"""An integer's value before the model's own code fills a buffer in; floats are NaN until then."""


def _unset(dtype: torch.dtype, of_float: float = float("nan")) -> float:
    return of_float if dtype.is_floating_point else _UNSET if dtype.is_signed else 1.0
