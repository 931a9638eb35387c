"""From a directory or a hub name to a model: one pass over configuration and headers; no weight is read but heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from swquant.checkpoint.converted import ConvertedCheckpoint
from swquant.checkpoint.names import read_by
from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import is_missing, shown
from swquant.checkpoint.source import Source
from swquant.checkpoint.widened import Widened
from swquant.errors import SwquantError
from swquant.model.empty import as_described, build_empty
from swquant.model.skeleton import Skeleton, build_skeleton

TIE = "tie_word_embeddings"
CHUNK = 4096


@dataclass(frozen=True)
class Model:
    """A model that has been opened.

    Attributes:
        checkpoint: Its tensors under their names in memory.
        skeleton: Its code.
    """

    checkpoint: ConvertedCheckpoint
    skeleton: Skeleton


def open_model(source: Checkpoint | Widened) -> Model:
    """The model in a checkpoint.

    Whether the head is the embedding is decided as transformers does while it loads: where the configuration says so
    and the file holds a head that differs, it is not. An equal copy of the embedding is left out.

    A save of a base model, whose names lack its prefix, is seen under full names: an output then has those that every
    runtime knows.

    Raises:
        SwquantError: The architecture is unknown or cannot be run block by block, or tensors are missing or do not fit.
    """
    config: Mapping[str, Any] = source.config
    _require_promised(source)
    missing = tuple(source.missing)
    source, skeleton = _with_embedding(*_under_full_names(source))
    shapes = {name: stored.shape for name, stored in source.tensors.items()}
    keys = two_heads(skeleton)
    if keys is not None:
        equal = _equal(source, *keys)
        if equal:
            del shapes[keys[0]]
        else:
            config = untied(config)
        skeleton = build_skeleton(config, shapes, source.directory)
        if equal:
            skeleton = replace(skeleton, names=replace(skeleton.names, dropped=keys[:1]))
    _require_floats(source, skeleton)
    _require_whole(source, skeleton)
    for mixed in skeleton.names.mixed:
        mixed.require_way_back(shapes)
    skeleton = replace(skeleton, names=replace(skeleton.names, missing=missing))
    config = {**config, "architectures": [type(skeleton.model).__name__]}
    return Model(ConvertedCheckpoint(source, skeleton.names, config), skeleton)


def _require_promised(source: Checkpoint | Widened) -> None:
    """Refuse a tensor that the index promises and no file holds where the model reads it, or a weight's scale.

    All else may be missing, as transformers allows it: a head that is the embedding, stored rotary tables.

    Raises:
        SwquantError: Naming the tensor.
    """
    if not source.missing:
        return
    with as_described(source.directory):
        model = build_empty(
            source.config,
            torch.float32,
            source.directory,
            {name: stored.shape for name, stored in source.tensors.items()},
        )
    read = read_by(model, source.missing)
    for key, file in source.missing.items():
        module, _, last = key.rpartition(".")
        scale = last.startswith("weight_") and f"{module}.weight" in source.tensors
        if scale or (key in read and read[key] not in model.all_tied_weights_keys):
            raise is_missing(key, file)


def _require_floats(source: Source, skeleton: Skeleton) -> None:
    """Refuse integers where the model has weights: codes of a method that the configuration does not name.

    Raises:
        SwquantError: Naming the tensor.
    """
    parameters = list(skeleton.model.named_parameters())
    for block in skeleton.blocks:
        parameters += [(f"{block.prefix}.{name}", value) for name, value in block.module.named_parameters()]
    for name, value in parameters:
        for key in skeleton.names.keys_of([name]) if value.is_floating_point() else ():
            stored = source.tensors[key]
            if not stored.dtype.is_floating_point:
                kind = str(stored.dtype).removeprefix("torch.")
                raise SwquantError(
                    f"{shown(key)} in {stored.file} is {kind}, expected floating-point weights, and config.json names "
                    "no quantization; give the original model"
                )


def _require_whole(source: Source, skeleton: Skeleton) -> None:
    """Refuse a weight that the model would read without what stands beside it, such as ``weight_scale``.

    Without its scale it is another weight; and formats have places of these names for scales of their own.

    Raises:
        SwquantError: Naming the tensor.
    """
    unread = set(skeleton.names.carried)
    for key in skeleton.names.carried:
        module, _, last = key.rpartition(".")
        weight = f"{module}.weight"
        if last.startswith("weight_") and weight in source.tensors and weight not in unread:
            raise SwquantError(
                f"{shown(key)} in {source.tensors[key].file} says something of the weight beside it, and no module of "
                "the model reads it; give the original model, or take the tensor out if the weight is whole without it"
            )


def two_heads(skeleton: Skeleton) -> tuple[str, str] | None:
    """Names on disk of the head and the embedding of a model that has both where its configuration has but one."""
    head = f"{skeleton.head}.weight"
    piece, embedding = skeleton.names.pieces.get(head), skeleton.names.pieces.get(f"{skeleton.embedding}.weight")
    if head in skeleton.model.all_tied_weights_keys and piece and embedding and piece != embedding:
        return piece.key, embedding.key
    return None


def _under_full_names(source: Checkpoint | Widened) -> tuple[Checkpoint | Widened, Skeleton]:
    """The source with the base model's prefix where its names lack it, and its skeleton."""
    skeleton = _skeleton(source)
    prefix, embedding = f"{skeleton.model.base_model_prefix}.", f"{skeleton.embedding}.weight"
    piece = skeleton.names.pieces.get(embedding)
    if piece is None or prefix + piece.key != embedding:
        return source, skeleton
    full = source.prefixed(prefix, embedding, f"{skeleton.head}.")
    return full, _skeleton(full)


def _with_embedding(source: Checkpoint | Widened, skeleton: Skeleton) -> tuple[Checkpoint | Widened, Skeleton]:
    """The source with the embedding under its own name, where it has it as the head that is tied to it alone.

    Of names that share a tensor some savers keep the first in the alphabet, ``lm_head.weight``. transformers ties
    either to the other; other readers look for the embedding.
    """
    embedding, head = f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"
    if not skeleton.tied or skeleton.names.pieces[embedding].key != head:
        return source, skeleton
    named = source.renamed(head, embedding)
    return named, _skeleton(named)


def _skeleton(source: Source) -> Skeleton:
    shapes = {name: stored.shape for name, stored in source.tensors.items()}
    return build_skeleton(source.config, shapes, source.directory)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head is a matrix of its own."""
    text = config.get("text_config")
    nested = {"text_config": {**text, TIE: False}} if isinstance(text, Mapping) and TIE in text else {}
    return {**config, **nested, TIE: False}


def _equal(source: Source, one: str, other: str) -> bool:
    if source.tensors[one].shape != source.tensors[other].shape:
        return False
    rows = source.tensors[one].shape[0]
    ranges = ((start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))
    return all(torch.equal(source.part(one, *range_), source.part(other, *range_)) for range_ in ranges)
