"""What a recipe leaves to be chosen when a run starts: grids for a size, and how much is trained for a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from swquant.allocation import allocate, plan_for_size, with_allocation
from swquant.allocation import asked_of as size_asked_of
from swquant.checkpoint.opening import SourceOptions
from swquant.estimate.curve import START, asked_of, chosen, curve_of, require_time, with_time
from swquant.plan import make_plan
from swquant.recipe import Recipe
from swquant.sampling import Room
from swquant.timed import Timed

ALLOCATION, TIME = "allocation", "time"
"""Of what a run state notes and a report has."""


@dataclass(frozen=True)
class Choices:
    """What was chosen.

    Attributes:
        recipe: Nothing of it is left to be chosen.
        notes: A :class:`swquant.allocated.Allocation` and a :class:`swquant.timed.Timed`, as plain values, each where
            it was asked for.
    """

    recipe: Recipe
    notes: Mapping[str, Any]


def choose(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None,
    room: Room,
    say: Callable[[str], None],
    timer: Callable[[], float],
    known: Mapping[str, Any],
    before: Callable[[], None] = lambda: None,
) -> Choices:
    """Choose what ``recipe`` leaves open.

    Args:
        recipe: With a size, a time, both or neither.
        source: The model.
        options: As of the run.
        room: As of the run.
        say: Hears what is done.
        timer: Tells the seconds that the run has taken.
        known: What was chosen when this run began, which it keeps if it is asked for the same.
        before: Called before anything is measured, where something has to be.

    Raises:
        SwquantError: What is asked for cannot be.
    """
    sized = replace(recipe, time=None, method=START, loss=None) if recipe.time is not None else recipe
    grids, time = (known.get(name) for name in (ALLOCATION, TIME))
    grids = grids if recipe.is_sized and grids is not None and grids["asked"] == size_asked_of(sized) else None
    time = time if recipe.time is not None and time is not None and time["asked"] == asked_of(recipe) else None
    if (recipe.is_sized and grids is None) or (recipe.time is not None and time is None):
        before()
    curve = None
    if recipe.time is not None and time is None:
        say("Measuring what a block takes here, for the time")
        curve = curve_of(recipe, source, options, room, plan_for_size if recipe.is_sized else make_plan)
        require_time(curve, timer())
    notes: dict[str, Any] = {}
    asked = recipe
    if recipe.is_sized:
        notes[ALLOCATION] = grids or _plain(allocate(sized, source, options, room, say))
        recipe = with_allocation(recipe, notes[ALLOCATION]["settings"])
    if recipe.time is not None:
        if curve is not None:
            found = chosen(replace(curve, recipe=asked, grids=0.0), timer())
            say(found.summary)
            time = _plain(found)
        assert time is not None
        notes[TIME] = time
        recipe = with_time(recipe, Timed.from_mapping(time).settings)
    return Choices(recipe, notes)


def _plain(value: Any) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(value)))
