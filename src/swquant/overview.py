"""What can be made of a model, for who has not decided yet: sizes, what loads them, and what a time buys."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from swquant.allocation import Book, grid_settings, measure_costs, plan_for_size, tokens_for, total_of
from swquant.allocation.choices import Unit, units_of
from swquant.allocation.sensitivity import Costs
from swquant.allocation.sizes import file_bytes, on_grids
from swquant.checkpoint.opening import SourceOptions
from swquant.drawing import cache_bytes
from swquant.errors import SwquantError
from swquant.estimate.budget import Budget
from swquant.estimate.curve import START, Curve, curve_of
from swquant.formats.base import dtype_name
from swquant.plan import Plan, make_plan
from swquant.quant.spec import QuantSpec
from swquant.recipe import Recipe
from swquant.targets import describe, load_target, require_loads
from swquant.terminal import next_command, outcome, plain_console, say
from swquant.units import size, span

FLAT = ((2, 64), (2, 32), (3, 64), (4, 64), (4, 32))
"""Bits and groups of all matrices."""

BITS = (2.5, 3.0, 3.5, 4.0, 4.5)
"""Of the whole file, at which grids are chosen for a size; others are the smallest possible and what lies between."""

BETWEEN = 3
"""Sizes between the smallest possible and the largest flat grid, where these bits give none."""

TIMES = ((600.0, "10m"), (3600.0, "1h"), (8 * 3600.0, "8h"))
"""Ten minutes, an hour, a night."""

CONTEXT = 4096
"""Tokens whose keys and values count in the memory to run a model."""

QUICK = 4
"""Samples of a quick measurement."""


@dataclass(frozen=True)
class Size:
    """A size that an output can have.

    Attributes:
        flags: Of ``swquant quantize``.
        bytes: Of the files that hold the weights, at most.
        bits: The same for each of the model's weights.
        memory: To run it: the file, and keys and values of :data:`CONTEXT` tokens.
        kl: What its grids cost, in nats per token, where that was measured.
        runtimes: Those that load it.
    """

    flags: str
    bytes: int
    bits: float
    memory: int
    kl: float | None
    runtimes: tuple[str, ...]


@dataclass(frozen=True)
class Bought:
    """What a time buys.

    Attributes:
        flags: Of ``swquant quantize``.
        seconds: Of the run; of the quickest one where that takes longer than there is.
        what: Stages, samples and tokens; ``None`` where there is too little time.
    """

    flags: str
    seconds: float
    what: str | None


@dataclass(frozen=True)
class Overview:
    """What can be made of a model.

    Attributes:
        model: Its name.
        parameters: Of it.
        bytes: Of its tensors.
        dtype: Most of them are of.
        format: In which the sizes are.
        sizes: Smallest first.
        times: Least first; empty where nothing was measured.
        grid: That the times are of.
        others: Runtimes that read other formats, whose sizes are others.
    """

    model: str
    parameters: int
    bytes: int
    dtype: str
    format: str
    sizes: tuple[Size, ...]
    times: tuple[Bought, ...]
    grid: str
    others: tuple[str, ...]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


def overview(
    recipe: Recipe,
    source: str | Path,
    options: SourceOptions | None = None,
    budget: Budget | None = None,
    hear: Callable[[str], None] = lambda _: None,
    *,
    times: bool = True,
    costs: bool = False,
) -> Overview:
    """Look at a model; no weight of it is read, but for ``costs``.

    Args:
        recipe: What holds whatever is chosen: format, runtime, calibration, device.
        source: The model.
        options: Which of its files.
        budget: Memory that a run may take.
        hear: Hears what is done.
        times: Run a block of random weights, for what a time buys.
        costs: Run the model on a few samples, for the KL that grids cost.

    Raises:
        SwquantError: As a run itself would, of what can be known before.
    """
    room = (budget or Budget()).room
    plan = plan_for_size(replace(recipe, method=START, loss=None), source, options, room)
    units = units_of(plan)
    found = None
    if costs:
        tokens = tokens_for(plan, QUICK, hear)
        hear(f"Measuring what grids cost on {tokens.numel()} tokens")
        found = measure_costs(plan, units, tokens, hear)
    sizes = _sizes(plan, units, found)
    curve = None
    if times:
        hear("Measuring what a block takes here, for the times")
        asked = Recipe.from_mapping({**_open(recipe), **grid_settings(plan.spec), "time": TIMES[-1][0]})
        curve = curve_of(asked, source, options, room, make_plan)
    return Overview(
        plan.disk.directory.name,
        _parameters(plan),
        plan.bytes_source,
        dtype_name(plan.outline.dtype),
        plan.formats[0].name,
        tuple(sorted(sizes, key=lambda one: one.bytes)),
        () if curve is None else tuple(_bought(curve)),
        plan.spec.label,
        _others(plan),
    )


def _open(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.to_mapping(), "method": "auto", "loss": None}


def _parameters(plan: Plan) -> int:
    return sum(math.prod(tensor.shape) for tensor in plan.disk.tensors.values())


def _sizes(plan: Plan, units: Sequence[Unit], costs: Costs | None) -> Iterator[Size]:
    """On one grid each, and by choice."""
    found = (_flat(plan, units, costs, QuantSpec(bits, group, plan.spec.symmetric)) for bits, group in FLAT)
    # Formats with one layout for several groups have the smallest of them.
    flat = list({one.bytes: one for one in found if one is not None}.values())
    yield from flat
    if not any(unit.sites for unit in units):
        return
    book, parameters = Book(plan, units), _parameters(plan)
    largest = max((one.bytes for one in flat), default=book.largest)
    most = min(book.largest - 1, largest)
    limits = [int(bits * parameters / 8) for bits in BITS]
    limits = [limit for limit in limits if book.smallest <= limit <= most]
    if len(limits) < BETWEEN:
        step = (most - book.smallest) / (BETWEEN + 1)
        limits = [int(book.smallest + step * part) for part in range(1, BETWEEN + 1)]
    for limit in dict.fromkeys((book.smallest, *limits)):
        yield _by_choice(plan, units, costs, book, limit)


def _flat(plan: Plan, units: Sequence[Unit], costs: Costs | None, spec: QuantSpec) -> Size | None:
    """All matrices on one grid, if model and format allow it."""
    try:
        held = file_bytes(on_grids(replace(plan, spec=spec), dict(plan.recipe.grids), None, None))
        runtimes = _runtimes(plan, spec)
    except SwquantError:
        return None
    if plan.formats[0].refusal(spec) is not None:
        return None
    kl = None
    if costs is not None:
        places = [[one.spec for one in unit.choices] for unit in units]
        wanted = [spec if unit.sites else None for unit in units]
        if all(one in place for one, place in zip(wanted, places, strict=True)):
            chosen = {
                unit: unit.choices[place.index(one)] for unit, place, one in zip(units, places, wanted, strict=True)
            }
            kl = total_of(units, costs, chosen)
    flags = f"--bits {spec.bits} --group-size {spec.group_size}"
    return _size(plan, flags, held, kl, runtimes)


def _by_choice(plan: Plan, units: Sequence[Unit], costs: Costs | None, book: Book, limit: int) -> Size:
    text = _rounded_up(limit)
    kl = None
    if costs is not None:
        chosen = book.best(costs, limit)
        kl = None if chosen is None else total_of(units, costs, chosen)
    specs = {choice.spec for unit in units if unit.sites for choice in unit.choices if choice.spec is not None}
    return _size(plan, f"--size {text}", limit, kl, _runtimes(plan, *specs))


def _rounded_up(limit: int) -> str:
    """A size as ``--size`` takes it, of three digits and not smaller."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
    unit, name = next((unit, name) for unit, name in units if limit >= unit)
    digits = max(0, 2 - int(math.log10(limit / unit)))
    return f"{math.ceil(limit / unit * 10**digits) / 10**digits:.{digits}f}{name}"


def _size(plan: Plan, flags: str, held: int, kl: float | None, runtimes: tuple[str, ...]) -> Size:
    context = min(CONTEXT, plan.skeleton.longest or CONTEXT)
    return Size(flags, held, 8 * held / _parameters(plan), held + cache_bytes(plan.skeleton, context), kl, runtimes)


def _runtimes(plan: Plan, *specs: QuantSpec) -> tuple[str, ...]:
    """Those that load such grids, all in one model, from the plan's format."""
    form = plan.formats[0].name
    names: list[str] = []
    for name in describe():
        target = load_target(name)
        if form in target.formats:
            with contextlib.suppress(SwquantError):
                require_loads(target, form, specs)
                names.append(name)
    return tuple(names)


def _others(plan: Plan) -> tuple[str, ...]:
    """Runtimes that read other formats alone."""
    return tuple(name for name in describe() if plan.formats[0].name not in load_target(name).formats)


def _bought(curve: Curve) -> Iterator[Bought]:
    for limit, text in TIMES:
        step = curve.best(limit)
        if step is None:
            yield Bought(f"--time {text}", curve.quickest, None)
            continue
        stages = ((step.training.blocks, "epochs on blocks"), (step.training.whole, "end to end"))
        trained = "".join(f", {epochs} {where}" for epochs, where in stages if epochs)
        what = f"{START}{trained}; {step.samples} x {step.tokens} tokens"
        yield Bought(f"--time {text}", curve.seconds(step), what)


def print_overview(found: Overview, command: str) -> None:
    """Print it, tables within 80 columns.

    Args:
        found: What was found.
        command: What makes an output, to which flags are added.
    """
    console = plain_console()
    whole = f"{found.parameters:,} parameters, {size(found.bytes)} in {found.dtype}"
    outcome(console, f"{found.model}: {whole}")
    say(console, f"\nSizes as {found.format}, by what is added to: {command}\n")
    measured = any(one.kl is not None for one in found.sizes)
    costs = f" {'KL':>6}" if measured else ""
    console.print(f"{'file':>9} {'bits':>6} {'to run':>9}{costs}  add", soft_wrap=True)
    for one in found.sizes:
        costs = f" {'' if one.kl is None else format(one.kl, '.2g'):>6}" if measured else ""
        console.print(
            f"{size(one.bytes):>9} {one.bits:>6.2f} {size(one.memory):>9}{costs}  {one.flags}", soft_wrap=True
        )
    bits = "bits: of the whole file for each weight; to run: the file, and keys and values of a context"
    costs = "KL: what the grids cost, which orders them." if measured else "--measure adds the KL that the grids cost."
    say(console, f"\n{bits} of {CONTEXT:,} tokens at most. {costs}")
    for runtimes in dict.fromkeys(one.runtimes for one in found.sizes):
        rows = [one.flags for one in found.sizes if one.runtimes == runtimes]
        which = "" if len(rows) == len(found.sizes) else f": {', '.join(rows)}"
        say(console, f"Loaded by {', '.join(runtimes) or 'no runtime that is known'}{which}")
    if found.others:
        say(console, f"Other formats, with sizes of their own: --for {', '.join(found.others)}")
    if found.times:
        say(console, f"\nTimes on this machine, at {found.grid}:\n")
    for one in found.times:
        took = f"too little, the quickest takes {span(one.seconds)}" if one.what is None else f"{span(one.seconds):>6}"
        console.print(f"{one.flags:<11} {took}" + (f"  {one.what}" if one.what else ""), soft_wrap=True)
    first = next((one for one in found.sizes if one.flags.startswith("--bits")), found.sizes[0])
    next_command(console, "make one, or see what it takes by plan in the place of quantize", f"{command} {first.flags}")
