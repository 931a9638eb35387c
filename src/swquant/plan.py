"""A run before it runs: a recipe checked against a model, with every default filled in."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swquant import registry
from swquant.checkpoint.names import Piece
from swquant.checkpoint.opening import SourceOptions, open_source
from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import Outline
from swquant.checkpoint.rotation import rotate
from swquant.checkpoint.shards import INDEX
from swquant.checkpoint.source import Source
from swquant.corpus import Corpus
from swquant.device import free_memory, resolve_device
from swquant.drawing import Drawing
from swquant.engine.block import Job, split_validation
from swquant.engine.pace import tail_of
from swquant.engine.precision import PRECISIONS, fastest_precision
from swquant.errors import SwquantError
from swquant.families import begins_each_window, family_for, rotatable
from swquant.formats.base import Format, check_dtype, examine, listed
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.formats.in_transformers import rehearsed
from swquant.losses import WeightedSum, parse_loss
from swquant.losses.base import LossContext
from swquant.methods import Pipeline, Setting, build_pipeline, parse_methods
from swquant.model.calls import probe
from swquant.model.ends import grids_of_ends
from swquant.model.layout import Layout, lay_out, plain_matrices
from swquant.model.opening import Model, open_model, untied
from swquant.model.settings import in_full
from swquant.model.skeleton import Skeleton
from swquant.quant.spec import UNIFORM, QuantSpec, in_words, named
from swquant.recipe import PRESETS, Recipe
from swquant.sampling import Room, material_of
from swquant.targets import choose_format, load_target, require_loads, require_model
from swquant.targets.base import Target
from swquant.tokenizer import Reading, digest, open_reading

LONGEST = 2048
UNROTATED = (
    "leave it out: it takes norms that neither subtract a mean nor add a bias, none of them after a block's linears"
)
OUTPUT_KEYS = ("format", "runtime")
"""Keys of a recipe on which nothing depends but how the output is written. Whether the grid fits is checked anew."""


@dataclass(frozen=True)
class Plan:
    """A run whose every part is known to fit the others; no weight has been read.

    Attributes:
        recipe: With every default filled in.
        disk: The model under its names on disk.
        checkpoint: The same under its names in memory, rotated where the method says so.
        skeleton: The model's code.
        layout: What is quantized, and each matrix's grid.
        hidden_size: Channels of the hidden states.
        spec: The recipe's grid.
        pipeline: What is done.
        loss: The training loss; ``None`` leaves each method its own.
        formats: Of the output.
        target: The runtime that it is for.
        outline: What formats know of the output.
        device: Where to compute.
        text: To calibrate on; ``None`` draws samples from the model.
        evaluation: Text to measure on.
        drawing: How samples are drawn, if they are.
        chosen: What was left to ``auto`` and chosen, a sentence.
        notes: What each format has to say.
        bytes_source: Size of the source's tensors.
    """

    recipe: Recipe
    disk: Source
    checkpoint: Source
    skeleton: Skeleton
    layout: Layout
    hidden_size: int
    spec: QuantSpec
    pipeline: Pipeline
    loss: WeightedSum | None
    formats: tuple[Format, ...]
    target: Target | None
    outline: Outline
    device: torch.device
    text: Corpus | None
    evaluation: Corpus | None
    drawing: Drawing | None
    chosen: str | None
    notes: tuple[tuple[str, ...], ...]
    bytes_source: int

    def key(self) -> dict[str, Any]:
        """Everything that codes and measurements depend on: all but how the output is written, and for what."""
        texts = {"calibration_text": self.text, "evaluation_text": self.evaluation}
        recipe = self.recipe.to_mapping()
        return {
            "recipe": {name: value for name, value in recipe.items() if name not in OUTPUT_KEYS},
            "source": self.checkpoint.fingerprint(),
            "grids": {
                site.name: named(site.spec) for block in self.layout.blocks for site in block if site.spec != self.spec
            },
            **{name: text and text.digest() for name, text in texts.items()},
            "tokenizer": digest(self.disk.directory) if any(text is not None for text in texts.values()) else None,
            "begin_each_window": begins_each_window(self.disk.config),
            "versions": versions(),
        }

    def output_key(self) -> dict[str, Any]:
        """What the output depends on beside :meth:`key`."""
        return {name: value for name, value in self.recipe.to_mapping().items() if name in OUTPUT_KEYS}

    def assumed(self) -> str:
        """What was found by inspecting the model, in a sentence."""
        sites, counts, names = list(self.layout.sites), self.layout.counts, self.skeleton.names
        kept: dict[str, set[str]] = {}
        for name, reason in self.layout.kept.items():
            kept.setdefault(reason, set()).add(name.rpartition(".")[2])
        apart = "; ".join(f"{', '.join(sorted(parts))} ({reason})" for reason, parts in kept.items())
        return (
            f"{type(self.skeleton.model).__name__}: {len(self.skeleton.blocks)} blocks in {self.skeleton.path} with "
            f"{len(sites)} matrices to quantize"
            + (f": {in_words(counts)}" if len(counts) > 1 else "")
            + "".join(f"; {name.removesuffix('.weight')} on {named(spec)}" for name, spec in self.skeleton.ends.items())
            + (f"; kept as they are: {apart}" if apart else "")
            + (f"; no module of it reads {listed(names.carried)}" if names.carried else "")
            + (
                f"; {INDEX} names {listed(names.missing)}, which no file has and no module reads"
                if names.missing
                else ""
            )
        )

    def reading(self) -> Reading:
        """The model's tokenizer.

        Raises:
            SwquantError: There is none that loads.
        """
        return open_reading(self.disk.directory, trusted=trusts_code(self.disk.config))

    def job(self) -> Job:
        """What stays the same from block to block."""
        samples, recipe = self.recipe.samples, self.recipe
        assert samples is not None
        return Job(
            self.checkpoint,
            self.skeleton,
            self.layout,
            self.pipeline.phases,
            self.loss,
            samples,
            recipe.seed,
            self.device,
            precision=PRECISIONS[recipe.precision],
        )

    def tail(self) -> float:
        """Work after the last block, see :func:`swquant.engine.pace.tail_of`."""
        finish, samples = self.pipeline.finish, self.recipe.samples
        if finish is None:
            return 0.0
        assert samples is not None
        train, validation = map(len, split_validation(samples))
        whole = sum(parameter.numel() for block in self.skeleton.blocks for parameter in block.module.parameters())
        block = whole / len(self.skeleton.blocks)
        head = math.prod(self.checkpoint.tensors[self.skeleton.head_weight].shape) / block
        return tail_of(finish.epochs, train, validation, len(self.skeleton.blocks), head)


def make_plan(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None = None,
    grids: Mapping[str, QuantSpec | None] | None = None,
    room: Room = free_memory,
    patience: float | None = None,
) -> Plan:
    """Check a recipe against a model, and fill in its defaults.

    Args:
        recipe: What to do.
        source: A model directory, or a hub name.
        options: Which of its files, and whether it may be quantized already.
        grids: As the recipe's, on top of these.
        room: Bytes that it may take on its device.
        patience: Most seconds that samples may be drawn for where that is left open, see
            :func:`swquant.sampling.material_of`.

    Raises:
        SwquantError: If any part is unknown, out of range, or does not fit another.
    """
    if recipe.is_sized:
        raise SwquantError("the recipe asks for a size, and this is of grids: choose them by swquant.allocation first")
    if recipe.time is not None:
        raise SwquantError("the recipe asks for a time, and this is of a method: choose it by swquant.choosing first")
    recipe = replace(recipe, grids=on_top(recipe.grids, grids or {}))
    others = tuple(filter(None, recipe.grids.values()))
    spec, device = recipe.spec, resolve_device(recipe.device)
    recipe = recipe.settled({"device": device.type, "precision": fastest_precision(device)})
    loss = None if recipe.loss is None else parse_loss(recipe.loss)
    target = None if recipe.runtime is None else load_target(recipe.runtime)
    names = choose_formats(recipe.formats, target, (spec, *others))
    formats: tuple[Format, ...] = tuple(registry.load("swquant.formats", name)() for name in names)
    preset, steps = PRESETS[recipe.preset], parse_methods(recipe.method, recipe.options, recipe.epochs)
    model = open_model(open_source(source, options))
    disk = model.checkpoint.inner
    hidden_size = probe(model.skeleton)
    pipeline = build_pipeline(steps, Setting(spec, model.skeleton.norm_biases, preset.effort, others=others))
    _require_use(loss, pipeline, recipe.method)
    check_dtype(disk.dtype)
    layout = lay_out(model.skeleton, spec, recipe.grids, allow_split=recipe.allow_split)
    checkpoint, skeleton = _rotated(model, recipe.seed) if pipeline.rotate else (model.checkpoint, model.skeleton)
    skeleton = replace(skeleton, ends=grids_of_ends(skeleton, recipe.embedding_bits, recipe.head_bits))
    outline = make_outline(disk, checkpoint, skeleton, layout)
    if CompressedTensors.name in names:
        outline = rehearsed(outline)
    notes = _notes(formats, target, outline)
    seq_len = _sample_length(recipe.seq_len, skeleton.longest, loss, hidden_size)
    recipe = replace(recipe, samples=recipe.samples or preset.samples, seq_len=seq_len)
    material = material_of(recipe, disk, model.skeleton, layout, device, room, patience)
    recipe = replace(recipe, method=" + ".join(map(str, steps)), loss=loss and str(loss), format=",".join(names))
    return Plan(
        replace(recipe, options={}, epochs=None, calibration=material.calibration, device=str(device)),
        disk,
        checkpoint,
        skeleton,
        layout,
        hidden_size,
        spec,
        pipeline,
        loss,
        formats,
        target,
        outline,
        device,
        material.text,
        material.evaluation,
        material.drawing,
        material.chosen,
        notes,
        disk.tensor_bytes,
    )


def on_top(grids: Mapping[str, QuantSpec | None], given: Mapping[str, QuantSpec | None]) -> dict[str, QuantSpec | None]:
    """Grids by pattern with those of ``given`` last, which counts."""
    return {name: grid for name, grid in grids.items() if name not in given} | dict(given)


def _notes(formats: Sequence[Format], target: Target | None, outline: Outline) -> tuple[tuple[str, ...], ...]:
    """What each format has to say of the output.

    Raises:
        SwquantError: It cannot hold it, or the runtime cannot load it from there.
    """
    notes = tuple(examine(form, outline) for form in formats)
    for form in formats:
        require_model(target, form.name, outline)
    return notes


def _require_use(loss: WeightedSum | None, pipeline: Pipeline, method: str) -> None:
    """Refuse a loss by which nothing is trained."""
    if loss is not None and not any(part.trained for part in pipeline.parts if part.work in pipeline.phases):
        raise SwquantError(
            f"nothing in {method!r} trains block by block, so no loss is used: leave it out, or name a method that "
            "does, such as block_ap"
        )


def _sample_length(asked: int | None, limit: int | None, loss: WeightedSum | None, hidden_size: int) -> int:
    """Tokens of a sample.

    Raises:
        SwquantError: The model takes no ``asked`` tokens, or the loss's parameters do not suit that many.
    """
    if asked is not None and limit is not None and asked > limit:
        raise SwquantError(f"the sequence length is {asked}, the model takes at most {limit} tokens")
    length = asked or min(LONGEST, limit or LONGEST)
    if loss is not None:
        outputs = torch.zeros(1, length, hidden_size)
        loss(outputs, outputs, LossContext(torch.Generator()))
    return length


def choose_formats(names: tuple[str, ...], target: Target | None, specs: tuple[QuantSpec, ...]) -> tuple[str, ...]:
    """Names of the output's formats: those that were asked for, or the one that suits the runtime.

    Raises:
        SwquantError: The runtime reads none of them, or not such weights from one that it reads.
    """
    specs = tuple(dict.fromkeys(specs))
    if target is None:
        return names or (next((spec.kind.form for spec in specs if spec.grid != UNIFORM), specs[0].kind.form),)
    names = names or (choose_format(target, *specs),)
    for name in [name for name in names if name in target.formats] or names[:1]:
        require_loads(target, name, specs)
    return names


def _rotated(model: Model, seed: int) -> tuple[Source, Skeleton]:
    """The model seen through a rotation; its head is then a matrix of its own."""
    skeleton = model.skeleton
    rotated = rotate(
        model.checkpoint, family_for(model.checkpoint.config, "rotate", rotatable(), UNROTATED), skeleton.tied, seed
    )
    head = f"{skeleton.head}.weight"
    pieces = {**skeleton.names.pieces, head: Piece(head)} if skeleton.tied else skeleton.names.pieces
    names = replace(skeleton.names, pieces=pieces)
    return replace(rotated, config=untied(rotated.config)), replace(skeleton, names=names, tied=False)


def make_outline(disk: Source, checkpoint: Source, skeleton: Skeleton, layout: Layout) -> Outline:
    """What formats need to know of the output: modules by their names on disk."""
    linears: dict[str, tuple[int, int]] = {}
    grids: dict[str, QuantSpec] = {}
    apart: list[str] = []
    for site in layout.sites:
        module = site.module
        if module is None:
            apart.append(site.stored.key if site.stored is not None else site.weight)
        assert site.spec is not None
        linears[module or site.name], grids[module or site.name] = site.shape, site.spec
    shapes = {name: one.shape for name, one in disk.tensors.items()}
    quantized = skeleton.names.keys_of(site.weight for site in layout.sites)
    ends: dict[str, tuple[tuple[int, int], QuantSpec]] = {}
    for name, spec in skeleton.ends.items():
        rows, columns = checkpoint.tensors[name].shape
        ends[skeleton.names.pieces[name].key.removesuffix(".weight")] = (rows, columns), spec
    held = quantized | skeleton.names.keys_of(skeleton.ends)
    return Outline(
        checkpoint.directory,
        in_full(checkpoint.config, checkpoint.directory),
        checkpoint.dtype,
        linears,
        grids,
        unquantized(skeleton, shapes, quantized),
        tuple(dict.fromkeys(apart)),
        _plain(skeleton, shapes, held),
        skeleton.names.carried,
        ends,
    )


def _plain(
    skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]], quantized: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of what the model reads and the output holds as it is."""
    names = skeleton.names
    others = {*quantized, *names.carried, *names.dropped}
    plain = {name: shape for name, shape in shapes.items() if name not in others}
    head = names.pieces.get(f"{skeleton.head}.weight")
    if head is not None and head.key not in plain and head.key not in quantized:  # a rotation has made it
        plain[head.key] = plain[names.pieces[f"{skeleton.embedding}.weight"].key]
    return plain


def unquantized(
    skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]], quantized: Collection[str]
) -> tuple[str, ...]:
    """The head, and all other modules with a matrix that is not quantized: see :func:`plain_matrices`."""
    blocks = (
        (f"{block.prefix}.{name}", module) for block in skeleton.blocks for name, module in block.module.named_modules()
    )
    modules = itertools.chain(skeleton.model.named_modules(), blocks)
    return tuple(dict.fromkeys((skeleton.head, *plain_matrices(modules, skeleton.names, shapes, quantized))))


def versions() -> dict[str, str]:
    """Of swquant and the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("swquant", "torch", "transformers")}
