"""A size in, grids out: which grid each matrix gets so that a model's predictions lose least within a file's size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from swquant.allocated import Allocation, Allotted, Measured, Option, Other
from swquant.allocation.choices import Choice, Unit, label, most_of, settings_of, units_of
from swquant.allocation.sensitivity import Check, Costs, Sensitivity
from swquant.allocation.sizes import file_bytes, on_grids
from swquant.allocation.solve import solve
from swquant.calibration import calibration_tokens, sample_windows
from swquant.checkpoint.opening import SourceOptions
from swquant.corpus import tokens_of
from swquant.device import free_memory
from swquant.drawing import draw_from_model
from swquant.errors import SwquantError
from swquant.formats.base import dtype_name
from swquant.plan import Plan, make_plan
from swquant.quant.spec import QuantSpec
from swquant.recipe import Recipe
from swquant.sampling import Room
from swquant.targets import choose_format, load_target
from swquant.units import size

SAMPLES, LENGTH = 16, 256
"""Samples of a measurement, and their tokens, or fewer where those of the run are."""

AROUND = (0.95, 1.05)
"""Of the size: what a little less or more would buy."""

ROUNDS = 32
"""In which what a file holds beside its tensors, which depends on the grids, is taken into account."""

SAFE = QuantSpec(4, 32, symmetric=True)
"""A grid that every format holds, and most widths."""

CHOSEN_KEYS = ("bits", "group_size", "symmetric", "grid", "grids", "embedding_bits", "head_bits", "format")
"""Keys of a recipe that an allocation settles."""
SIZE_KEYS = ("size", "target_bits")
"""Those that ask for one."""


def asked_of(recipe: Recipe) -> str:
    """A hash of what is asked for: of a recipe without what depends on the machine, or changes no grid."""
    left_out = dict.fromkeys(("format", "runtime", "device", "precision"))
    return replace(recipe, **{**left_out, "device": "auto", "precision": "auto"}).digest()


def with_allocation(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the grids of an :class:`Allocation` in the place of a size.

    Its format is that of the size, unless the recipe names one, or a runtime that does not read it.
    """
    own = {key: value for key, value in recipe.to_mapping().items() if key not in (*CHOSEN_KEYS, *SIZE_KEYS)}
    read = recipe.runtime is None or settings["format"] in load_target(recipe.runtime).formats
    form = settings["format"] if recipe.format is None and read else recipe.format
    return Recipe.from_mapping({**own, **settings, "format": form})


def allocate(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None = None,
    room: Room = free_memory,
    say: Callable[[str], None] = lambda _: None,
    measure: Callable[[Plan, Sequence[Unit], Tensor, Callable[[str], None]], Costs] | None = None,
) -> Allocation:
    """Choose the grids that ``recipe`` leaves open, for its ``size`` or ``target_bits``.

    Args:
        recipe: Its ``grids`` hold; so do the bits of the embedding and the head where they are given.
        source: The model.
        options: As of the run.
        room: As of the run.
        say: Hears what is done.
        measure: Costs of all choices; by default the KL, see :mod:`swquant.allocation.sensitivity`.

    Raises:
        SwquantError: The size is below the smallest, or the model is no larger as it is, or the format holds one grid.
    """
    started = time.monotonic()
    plan = plan_for_size(recipe, source, options, room)
    form, *others = plan.formats
    if others:
        raise SwquantError(f"--size is of one file, and there would be {len(plan.formats)}: give one --format")
    units = units_of(plan)
    if not any(unit.sites for unit in units):
        raise SwquantError(
            f"{form.name} holds these matrices in one size only, or patterns decide for all of them, so "
            "there is nothing to choose: leave --size out, or choose another format"
        )
    book = Book(plan, units)
    limit = recipe.size if recipe.size is not None else _bytes_of(recipe, plan)
    _require_between(limit, book, recipe)
    tokens = tokens_for(plan, SAMPLES, say)
    say(
        f"Choosing grids of {len(units)} units for {size(limit)} (from {size(book.smallest)} on, "
        f"{size(book.largest)} as it is): costs are measured on {tokens.numel()} tokens"
    )
    costs = (measure or measure_costs)(plan, units, tokens, say)
    chosen = book.best(costs, limit)
    assert chosen is not None
    kl, around = total_of(units, costs, chosen), tuple(_around(book, costs, round(limit * factor)) for factor in AROUND)
    settings, took = _settings(recipe, plan, chosen), time.monotonic() - started
    beside = ", ".join(f"{other.kl:.3g} at {size(other.size)}" for other in around if other.kl is not None)
    say(
        f"Grids for {size(book.bytes_of(chosen))}: {_in_words(chosen)}; their costs add up to a KL of {kl:.3g}, to "
        f"{beside}; took {took:.0f} s"
    )
    return Allocation(
        asked_of(recipe),
        settings,
        limit,
        book.bytes_of(chosen),
        book.smallest,
        book.largest,
        kl,
        _allotted(plan, units, costs, chosen),
        around,
        tuple(_checked(units, check) for check in costs.checks),
        tokens.numel(),
        round(took, 1),
    )


def plan_for_size(
    recipe: Recipe, source: str | Path, options: SourceOptions | None, room: Room, patience: float | None = None
) -> Plan:
    """A plan on some grid that format and model allow for what is open, in a format for several.

    Args:
        recipe: Asks for a size.
        source: The model.
        options: As of the run.
        room: As of the run.
        patience: As of :func:`swquant.plan.make_plan`.
    """
    recipe = replace(recipe, **dict.fromkeys(SIZE_KEYS))
    if recipe.format is None and recipe.runtime is not None:
        two = (QuantSpec(bits, 64, recipe.symmetric) for bits in (2, 4))
        recipe = replace(recipe, format=choose_format(load_target(recipe.runtime), *two))
    try:
        return make_plan(recipe, source, options, room=room, patience=patience)
    except SwquantError:
        if recipe.spec == SAFE:
            raise
    return make_plan(replace(recipe, **grid_settings(SAFE)), source, options, room=room, patience=patience)


def grid_settings(spec: QuantSpec) -> dict[str, Any]:
    """A grid as keys of a recipe."""
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric, "grid": spec.grid}


def measure_costs(plan: Plan, units: Sequence[Unit], tokens: Tensor, say: Callable[[str], None]) -> Costs:
    """What each choice costs in KL, see :mod:`swquant.allocation.sensitivity`."""
    return Sensitivity(plan, units, tokens, say).measure()


@dataclass
class Book:
    """Files' sizes by what is chosen."""

    plan: Plan
    units: Sequence[Unit]

    def __post_init__(self) -> None:
        first = {unit: unit.choices[0] for unit in self.units}
        self.smallest = self.bytes_of(first)
        self.fixed = self.smallest - sum(choice.bytes for choice in first.values())
        self.largest = self.fixed + sum(unit.choices[-1].bytes for unit in self.units)

    def bytes_of(self, chosen: Mapping[Unit, Choice]) -> int:
        """Of the files that hold the weights, by the format's own layout."""
        settings: dict[str, Any] = settings_of(chosen)
        recipe = self.plan.recipe
        ends = (settings.get(key, vars(recipe)[key]) for key in ("embedding_bits", "head_bits"))
        return file_bytes(on_grids(self.plan, {**recipe.grids, **settings["grids"]}, *ends))

    def best(self, costs: Costs, limit: int) -> dict[Unit, Choice] | None:
        """The choices of least cost whose files are not above ``limit``; ``None`` where there are none."""
        sizes = [[choice.bytes for choice in unit.choices] for unit in self.units]
        room = limit - self.fixed
        for _ in range(ROUNDS):
            found = solve(costs.table, sizes, room)
            if found is None:
                return None
            chosen = {unit: unit.choices[place] for unit, place in zip(self.units, found, strict=True)}
            above = self.bytes_of(chosen) - limit
            if above <= 0:
                return chosen
            room = sum(choice.bytes for choice in chosen.values()) - above
        return {unit: unit.choices[0] for unit in self.units} if self.smallest <= limit else None


def _bytes_of(recipe: Recipe, plan: Plan) -> int:
    assert recipe.target_bits is not None
    parameters = sum(math.prod(tensor.shape) for tensor in plan.disk.tensors.values())
    return int(recipe.target_bits * parameters / 8)


def _require_between(limit: int, book: Book, recipe: Recipe) -> None:
    asked = f"--size {size(limit)}" if recipe.size is not None else f"--target-bits {recipe.target_bits:g}"
    form = book.plan.formats[0].name
    if limit < book.smallest:
        parameters = sum(math.prod(tensor.shape) for tensor in book.plan.disk.tensors.values())
        least = (
            f"{size(book.smallest)} ({book.smallest} bytes)"
            if recipe.size is not None
            else f"{math.ceil(8e3 * book.smallest / parameters) / 1e3:.3f}"
        )
        raise SwquantError(f"{asked} is less than {form} can make of this model: the smallest possible is {least}")
    if limit >= book.largest:
        dtype = dtype_name(book.plan.outline.dtype)
        raise SwquantError(
            f"{asked} holds everything as it is: the model takes {size(book.largest)} in {dtype}, so there is nothing "
            "to quantize"
        )


def tokens_for(plan: Plan, most: int, say: Callable[[str], None]) -> Tensor:
    """Samples of the run's calibration, as :func:`swquant.run.quantize` takes them, ``most`` of them and shorter."""
    recipe = plan.recipe
    assert recipe.seq_len is not None
    assert recipe.samples is not None
    samples, length = min(most, recipe.samples), min(LENGTH, recipe.seq_len)
    if plan.drawing is not None:
        return draw_from_model(plan.disk, plan.drawing, samples, length, recipe.seed, say)
    assert plan.text is not None
    reading = plan.reading()
    tokens, _ = calibration_tokens(
        tokens_of(plan.text, reading.tokenizer),
        recipe.seq_len,
        0 if plan.evaluation is not None else recipe.evaluation_samples,
    )
    return sample_windows(tokens, samples, length, recipe.seed, reading.begin)


def _settings(recipe: Recipe, plan: Plan, chosen: Mapping[Unit, Choice]) -> dict[str, Any]:
    """What was chosen, as a recipe's file has it."""
    most, own = most_of(recipe, chosen), settings_of(chosen)
    grids: Any = own["grids"]
    made = replace(
        recipe,
        **grid_settings(most),
        format=plan.recipe.format,
        **{**own, "grids": {**recipe.grids, **grids}},
        **dict.fromkeys(SIZE_KEYS),
    ).to_mapping()
    return {key: made[key] for key in CHOSEN_KEYS if key in made}


def _in_words(chosen: Mapping[Unit, Choice]) -> str:
    counts: dict[str, int] = {}
    for unit, choice in chosen.items():
        name = label(choice) if unit.sites else f"the {unit.name} {label(choice)}"
        counts[name] = counts.get(name, 0) + max(1, len(unit.sites))
    return ", ".join(f"{count} on {name}" if not name.startswith("the ") else name for name, count in counts.items())


def total_of(units: Sequence[Unit], costs: Costs, chosen: Mapping[Unit, Choice]) -> float:
    """The sum of the costs of what is chosen."""
    return sum(row[unit.choices.index(chosen[unit])] for unit, row in zip(units, costs.table, strict=True))


def _around(book: Book, costs: Costs, limit: int) -> Other:
    chosen = book.best(costs, limit)
    return Other(limit, None if chosen is None else total_of(book.units, costs, chosen))


def _allotted(plan: Plan, units: Sequence[Unit], costs: Costs, chosen: Mapping[Unit, Choice]) -> tuple[Allotted, ...]:
    """A row for each unit."""
    layers = {site.name: index for index, block in enumerate(plan.layout.blocks) for site in block}
    return tuple(
        Allotted(
            unit.name,
            unit.kind,
            layers[unit.sites[0].name] if unit.sites else None,
            tuple(site.inner for site in unit.sites),
            unit.choices.index(chosen[unit]),
            tuple(
                Option(label(choice), None if choice.spec is None else choice.spec.bits, choice.bytes, kl)
                for choice, kl in zip(unit.choices, row, strict=True)
            ),
        )
        for unit, row in zip(units, costs.table, strict=True)
    )


def _checked(units: Sequence[Unit], check: Check) -> Measured:
    unit = units[check.unit]
    estimate = check.estimate if unit.sites else None
    return Measured(unit.name, label(unit.choices[check.choice]), estimate, check.measured)
