"""What a run is calibrated and measured on: texts, or samples that the model writes; and what ``auto`` chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from swquant.checkpoint.source import Source
from swquant.corpus import Corpus, read_corpus
from swquant.drawing import Drawing, drawing_of, named, seconds_of
from swquant.model.layout import Layout
from swquant.model.skeleton import Skeleton
from swquant.recipe import AUTO, BUNDLED, SELF, Recipe
from swquant.units import size, span

Room = Callable[[torch.device], int]
"""Bytes that a run may take on a device."""

LONGEST_DRAWING = 1800
"""Seconds of drawing that ``auto`` takes; beyond, samples are of the text that comes with swquant."""


@dataclass(frozen=True)
class Material:
    """What a run is calibrated and measured on.

    Attributes:
        calibration: As the recipe has it, ``auto`` replaced by what it chose.
        text: To calibrate on; ``None`` draws samples from the model.
        evaluation: To measure on; ``None`` holds windows out of the calibration.
        drawing: How samples are drawn, if they are.
        chosen: What ``auto`` chose and why, a sentence; ``None`` where nothing was left to it.
    """

    calibration: str
    text: Corpus | None
    evaluation: Corpus | None
    drawing: Drawing | None
    chosen: str | None


def material_of(
    recipe: Recipe,
    source: Source,
    skeleton: Skeleton,
    layout: Layout,
    device: torch.device,
    room: Room,
    patience: float | None = None,
) -> Material:
    """Read a recipe's texts, or see how samples would be drawn from the model; no weight is read.

    Args:
        recipe: With its samples and their length filled in.
        source: The model as it is on disk.
        skeleton: Its code.
        layout: Tells the kinds of blocks.
        device: Where the run computes.
        room: What it may take there.
        patience: Most seconds of drawing that ``auto`` takes; :data:`LONGEST_DRAWING` by default.

    Raises:
        SwquantError: A text cannot be read.
    """
    samples, tokens = recipe.samples or 1, recipe.seq_len or 1
    held = 0 if recipe.evaluation is not None else recipe.evaluation_samples
    shape = (samples + held, tokens)
    calibration, chosen, drawing = recipe.calibration, None, None
    if calibration in (AUTO, SELF):
        drawing = drawing_of(source, skeleton, device, room(device), shape)
    if calibration == AUTO and drawing is not None:
        calibration, chosen = _choose(drawing, skeleton, layout, shape, patience or LONGEST_DRAWING)
    if calibration != SELF:
        drawing = None
    wanted = (samples + held) * tokens
    text = None if calibration == SELF else read_corpus(calibration, wanted)
    measured = recipe.evaluation_samples * tokens
    evaluation = None if recipe.evaluation is None else read_corpus(recipe.evaluation, measured)
    return Material(calibration, text, evaluation, drawing, chosen)


def _choose(
    drawing: Drawing, skeleton: Skeleton, layout: Layout, shape: tuple[int, int], patience: float
) -> tuple[str, str]:
    """The calibration that ``auto`` takes, and why."""
    spent, why = 0.0, ""
    if drawing.needed > drawing.room:
        why = f"needs {size(drawing.needed)} on {drawing.device}, where {size(max(drawing.room, 0))} are free"
    else:
        spent = seconds_of(drawing, skeleton, layout, shape)
    if spent > patience:
        why = f"would take {span(spent)}"
    if why:
        other = "a --calibration of your own, or mix from the hub, suits a model better"
        return (
            BUNDLED,
            f"Calibrating on the text that comes with swquant (bundled), as drawing from the model {why}; {other}",
        )
    said = f"about {span(spent)} in {named(drawing.dtype)}, {drawing.at_once} at once"
    return SELF, f"Calibrating on samples drawn from the model (self), {said}"
