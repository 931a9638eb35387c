"""Tiny models of every class in the installed transformers: random weights, a trained tokenizer, written to disk.

    path = save_tiny(folder, "qwen3_5", kind="image-text")

A configuration is shrunk by the names of its fields (``tiny_settings.SIZES``), its lists with an item per layer to one
layer of each kind, its sub-configurations alike; what that does not cover stands in ``tiny_settings.OVERRIDES``.
Nothing is downloaded. Tests and benchmarks share this module, which imports neither of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tiny_settings import INDEX_LISTS, LAYER_COUNTS, OVERRIDES, SIZES, SMALL_PARAMETERS, TOKENS, VECTORS, VOCABULARIES

TEXT = "the model reads a long text and writes short codes for each weight of every block in turn"
VOCABULARY = 320
"""What the tokenizer knows. A model with tokens for pictures or sound has these after it."""
MARKERS = 64
"""What is added to it for those."""
LARGEST = 4_000_000
"""A tiny model with more parameters than this has a size that was not shrunk."""

KINDS: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
"""From a kind to the class that makes its models and to its names: model type to class."""


def prose(words: int, seed: int = 0) -> str:
    """A sentence of so many words of ``TEXT``, drawn by ``seed``."""
    known = TEXT.split(" ")
    draws = torch.randint(len(known), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(known[index] for index in draws.tolist()) + ".\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens, trained on ``prose``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([prose(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_config(model_type: str, *, layers: int | None = None, **settings: Any) -> PreTrainedConfig:
    """The configuration of ``model_type`` with every size shrunk.

    Args:
        model_type: A key of transformers' configuration mapping.
        layers: Of the language model, whose kinds then come in turns; by default one of each kind, and two at least.
        settings: Fields to set on top; those of a wrapper's language model go into a mapping ``text_config``.

    Returns:
        A configuration of which a model has less than ``LARGEST`` parameters. Its vocabulary begins with the
        tokenizer's.
    """
    kind = CONFIG_MAPPING[model_type]
    like = kind(**OVERRIDES.get(model_type, {}).get("_start", {}))
    vocabulary = VOCABULARY + (MARKERS if kind.sub_configs or _markers(like) else 0)
    return _shrunk(like, model_type, settings, vocabulary, layers)


def _shrunk(
    like: Any, model_type: str, settings: Mapping[str, Any], vocabulary: int, layers: int | None
) -> PreTrainedConfig:
    """A configuration of the class of ``like``, its fields made small."""
    kind: type[PreTrainedConfig] = type(like)
    changed = dict(_sizes(like)) | _layers(like) | _tokens(like)
    changed |= _rotary(like, changed)
    changed |= {name: vocabulary for name in VOCABULARIES if isinstance(getattr(like, name, None), int)}
    given = _joined(OVERRIDES.get(model_type, {}), settings)
    given.pop("_start", None)
    for name in kind.sub_configs:
        part = getattr(like, name, None)
        inner = given.pop(name, {})
        if isinstance(inner, dict) and isinstance(part, PreTrainedConfig):
            # A dictionary is read by the class's own code, which may choose the sub-configuration's class by it.
            changed[name] = _shrunk(part, part.model_type, inner, vocabulary, layers).to_dict()
        elif isinstance(inner, dict) and isinstance(part, dict):
            changed[name] = tiny_config(part["model_type"], layers=layers, **inner).to_dict()
    changed |= given
    if layers is not None and "vocab_size" in changed:
        changed |= _deepened(changed, layers)
    return kind(**{name: value for name, value in changed.items() if value is not ...})


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` with ``second`` on top; where both have a mapping, these are joined."""
    out = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = _joined(out[name], value) if both else value
    return out


def _fields(like: Any) -> dict[str, Any]:
    """The fields of a configuration that have a value. Some are stored by other names."""
    stored, aliases = vars(like), like.attribute_map
    values = {field.name: stored.get(aliases.get(field.name, field.name)) for field in dataclasses.fields(like)}
    return {name: value for name, value in values.items() if value is not None}


def _default(like: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(like) if field.name == name)


def _sizes(like: Any) -> Iterator[tuple[str, Any]]:
    """Numbers whose names ``SIZES`` knows. A field without a default is left to the class, which derives it."""
    fields = _fields(like)
    if any(field.name == "head_dim" for field in dataclasses.fields(like)) and "head_dim" not in fields:
        # Classes that do not derive it fail without it.
        yield "head_dim", 16
    for name, value in fields.items():
        if type(value) not in (int, float) or _default(like, name) is None:
            continue
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                yield name, type(value)(size(value, fields) if callable(size) else size)
                break


def _rotary(like: Any, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of the rotary table for time, height and width that make up half of the small rotary width."""
    rope = getattr(like, "rope_parameters", None)
    if "mrope_section" not in like.ignore_keys_at_rope_validation or not isinstance(rope, dict):
        return {}
    width = changed.get("head_dim") or changed["hidden_size"] // changed["num_attention_heads"]
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    return {"rope_parameters": rope | {"mrope_section": [half - 2 * third, third, third]}}


def _layers(like: Any) -> dict[str, Any]:
    """Lists with an item per layer, cut to one layer of each kind (to two where all are alike)."""
    fields = _fields(like)
    count = next((fields[name] for name in LAYER_COUNTS if isinstance(fields.get(name), int)), None)
    lists = {
        name: list(value)
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == count and not re.search(INDEX_LISTS, name)
    }
    counts = [name for name in LAYER_COUNTS if isinstance(fields.get(name), int)]
    if not lists:
        return dict.fromkeys(counts, 2)
    rows = list(zip(*lists.values(), strict=True))
    seen = [index for index, row in enumerate(rows) if row not in rows[:index]]
    # Kinds come in the order in which they first appear. A single one twice, since a block must follow a block.
    chosen = seen if len(seen) > 1 else [0, 1]
    return dict.fromkeys(counts, len(chosen)) | {
        name: [values[index] for index in chosen] for name, values in lists.items()
    }


def _deepened(changed: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The number of layers, and every list with an item per layer repeated up to it."""
    counts = {name: changed[name] for name in LAYER_COUNTS if name in changed}
    lists = {
        name: [value[index % len(value)] for index in range(layers)]
        for name, value in changed.items()
        if isinstance(value, list) and len(value) in counts.values() and not re.search(INDEX_LISTS, name)
    }
    return dict.fromkeys(counts, layers) | lists


def _tokens(like: Any) -> dict[str, Any]:
    """Token ids within the vocabulary: the tokenizer's own for begin and end, one after it for any other marker."""
    out: dict[str, Any] = {}
    known = TOKENS | {name: VOCABULARY + index for index, name in enumerate(_markers(like))}
    for name, token in known.items():
        value = getattr(like, name, None)
        if isinstance(value, int) and value >= 0:
            out[name] = token
        elif isinstance(value, list):
            out[name] = [token]
    return out


def _markers(like: Any) -> list[str]:
    """Fields that name tokens of other than text."""
    return sorted(name for name in vars(like) if re.search(r"token_(id|index)$", name) and name not in TOKENS)


def tiny_model(model_type: str, kind: str = "causal", **settings: Any) -> PreTrainedModel:
    """A model of ``model_type`` in float32 with random weights of which every one matters for the logits.

    Args:
        model_type: A key of transformers' mapping for ``kind``.
        kind: One of ``KINDS``.
        settings: As in :func:`tiny_config`, ``layers`` too.

    Raises:
        ValueError: If the model has more than ``LARGEST`` parameters.
    """
    config = tiny_config(model_type, **settings)
    maker = KINDS[kind][0]
    with torch.device("meta"):
        size = sum(value.numel() for value in maker.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the tiny {model_type} has {size} parameters, expected at most {LARGEST}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = maker.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, value in model.named_parameters():
                _draw(name, value)
            # Corrections that routers add to their scores are buffers in some classes, and written to disk.
            stored = model.state_dict()
            for name, value in model.named_buffers():
                if name in stored and name.endswith("bias") and value.dim() == 1:
                    value.add_(torch.randn_like(value) * 0.02)
    return model.eval()


def _draw(name: str, value: torch.Tensor) -> None:
    """Matrices anew, vectors a little off where they were: both must matter, and neither may make logits infinite."""
    if value.dim() < 2 or re.search(VECTORS, name):
        value.add_(torch.randn_like(value) * (0.02 if re.search(SMALL_PARAMETERS, name) else 0.1))
    else:
        value.normal_(0, 0.1)


def save_tiny(
    folder: Path, model_type: str, kind: str = "causal", dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Write :func:`tiny_model` and the tokenizer to ``folder`` as transformers does, and return ``folder``."""
    return write(folder, tiny_model(model_type, kind, **settings), dtype)


def write(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Write ``model``, its parameters cast to ``dtype``, and the tokenizer to ``folder``, and return ``folder``."""
    for value in model.parameters():
        # Not ``model.to``, which would make tables of complex numbers real.
        value.data = value.data.to(dtype)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
