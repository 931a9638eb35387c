"""A run before it runs: a recipe checked against a model, with every default filled in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swquant import registry
from swquant.calibration import read_text
from swquant.checkpoint.opening import SourceOptions, open_source
from swquant.checkpoint.quantized import Outline
from swquant.checkpoint.rotation import Source, rotate
from swquant.device import resolve_device
from swquant.engine.block import Job, split_held
from swquant.engine.pace import tail_of
from swquant.engine.precision import PRECISIONS
from swquant.engine.skeleton import Skeleton, build_skeleton, check_widths, with_full_names
from swquant.errors import SwquantError
from swquant.families import family_for
from swquant.formats.base import Format, check_dtype
from swquant.losses import WeightedSum, parse_loss
from swquant.losses.balancing import Balance
from swquant.methods import Pipeline, Setting, build_pipeline, parse_methods
from swquant.quant.kgrids import UNIFORM
from swquant.quant.spec import QuantSpec
from swquant.recipe import PRESETS, Recipe
from swquant.targets import choose_format, load_target, require_loads
from swquant.targets.base import Target

LONGEST = 2048
DEFAULT_FORMAT = "compressed_tensors"


@dataclass(frozen=True)
class Plan:
    """A run whose every part is known to fit the others; no weight has been read."""

    recipe: Recipe
    checkpoint: Source
    skeleton: Skeleton
    spec: QuantSpec
    pipeline: Pipeline
    loss: WeightedSum | None
    formats: tuple[Format, ...]
    target: Target | None
    outline: Outline
    device: torch.device
    text: str | None
    evaluation: str | None
    notes: tuple[tuple[str, ...], ...]
    bytes_source: int

    def key(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        texts = {"calibration_text": self.text, "evaluation_text": self.evaluation}
        return {
            "recipe": self.recipe.to_mapping(),
            "source": self.checkpoint.fingerprint(),
            **{name: text and hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
            "versions": versions(),
        }

    def job(self) -> Job:
        """What stays the same from block to block."""
        samples, recipe = self.recipe.samples, self.recipe
        assert samples is not None
        phases, balance = self.pipeline.phases, balance_of(recipe)
        return Job(
            self.checkpoint,
            self.skeleton,
            self.spec,
            phases,
            self.loss,
            samples,
            recipe.seed,
            self.device,
            balance,
            precision=PRECISIONS[recipe.precision],
        )

    def tail(self) -> float:
        """Work behind the last block, see :func:`swquant.engine.pace.tail_of`."""
        finish, samples = self.pipeline.finish, self.recipe.samples
        if finish is None:
            return 0.0
        assert samples is not None
        train, held = map(len, split_held(samples))
        block = sum(parameter.numel() for parameter in self.skeleton.blocks[0].module.parameters())
        head = math.prod(self.checkpoint.tensors[self.skeleton.head_weight].shape) / block
        return tail_of(finish.epochs, train, held, len(self.skeleton.blocks), head)


def make_plan(recipe: Recipe, source: str | Path, options: SourceOptions | None = None) -> Plan:
    """Check a recipe against a model, and fill in its defaults.

    Args:
        recipe: What to do.
        source: A model directory, or a hub name.
        options: Which of its files, and whether it may be quantized already.

    Raises:
        SwquantError: If any part is unknown, out of range, or does not fit another.
    """
    spec, device = recipe.spec, resolve_device(recipe.device)
    loss = None if recipe.loss is None else parse_loss(recipe.loss)
    _check_balance(recipe, loss)
    target = None if recipe.runtime is None else load_target(recipe.runtime)
    names = choose_formats(recipe.formats, target, spec)
    formats: tuple[Format, ...] = tuple(registry.load("swquant.formats", name)() for name in names)
    preset = PRESETS[recipe.preset]
    steps = parse_methods(recipe.method, recipe.options, recipe.epochs)
    checkpoint: Source = with_full_names(open_source(source, options))
    family = family_for(checkpoint.config)
    pipeline = build_pipeline(steps, Setting(spec, family, preset.effort))
    if loss is not None and not any(part.trained for part in pipeline.parts if part.work in pipeline.phases):
        raise SwquantError(f"nothing in {recipe.method!r} trains block by block, so no loss is used: leave it out")
    bytes_source = checkpoint.tensor_bytes
    if pipeline.rotate:
        checkpoint = rotate(checkpoint, family, recipe.seed)
    check_dtype(checkpoint.dtype)
    skeleton = build_skeleton(checkpoint)
    check_widths(skeleton, spec)
    outline = make_outline(checkpoint, skeleton, spec)
    notes = tuple(form.check(outline) for form in formats)
    limit = int(skeleton.model.config.max_position_embeddings)
    if recipe.seq_len is not None and recipe.seq_len > limit:
        raise SwquantError(f"the sequence length is {recipe.seq_len}, the model takes at most {limit} tokens")
    text = None if recipe.calibration == "self" else read_text(recipe.calibration)
    evaluation = None if recipe.evaluation is None else read_text(recipe.evaluation)
    resolved = replace(
        recipe,
        method=" + ".join(map(str, steps)),
        options={},
        epochs=None,
        loss=loss and str(loss),
        samples=recipe.samples or preset.samples,
        seq_len=recipe.seq_len or min(LONGEST, limit),
        format=",".join(names),
        device=str(device),
    )
    return Plan(
        resolved,
        checkpoint,
        skeleton,
        spec,
        pipeline,
        loss,
        formats,
        target,
        outline,
        device,
        text,
        evaluation,
        notes,
        bytes_source,
    )


def balance_of(recipe: Recipe) -> Balance:
    """What the recipe says of the loss's terms."""
    return Balance(recipe.balance, recipe.loss_schedule, recipe.loss_depth)


def _check_balance(recipe: Recipe, loss: WeightedSum | None) -> None:
    if not balance_of(recipe).idle and (loss is None or len(loss.parts) == 1):
        raise SwquantError(
            "balance, loss_schedule and loss_depth say how the terms of a loss share the gradient, and "
            f"{'each method has its own loss here' if loss is None else f'{str(loss)!r} has one term'}: "
            "give a sum, e.g. --loss '0.9*mse + 0.1*sliced_wasserstein'"
        )


def choose_formats(names: tuple[str, ...], target: Target | None, spec: QuantSpec) -> tuple[str, ...]:
    """Names of the output's formats: those that were asked for, or the one that suits the runtime.

    Raises:
        SwquantError: The runtime reads none of them, or not such weights from one that it reads.
    """
    if target is None:
        return names or (DEFAULT_FORMAT if spec.grid == UNIFORM else "gguf",)
    if not names:
        return (choose_format(target, spec),)
    for name in [name for name in names if name in target.formats] or names[:1]:
        require_loads(target, name, spec)
    return names


def make_outline(checkpoint: Source, skeleton: Skeleton, spec: QuantSpec) -> Outline:
    """What formats need to know of the output."""
    family = skeleton.family
    modules = (f"{block.prefix}.{linear}" for block in skeleton.blocks for linear in family.linears)
    linears = {name: _matrix_shape(checkpoint, f"{name}.weight") for name in modules}
    return Outline(checkpoint.directory, checkpoint.config, spec, checkpoint.dtype, linears, (family.head,))


def _matrix_shape(checkpoint: Source, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[name].shape
    return rows, columns


def versions() -> dict[str, str]:
    """Of swquant and the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("swquant", "torch", "transformers")}
