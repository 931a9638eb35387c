"""An estimate as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from swquant.estimate import Estimate
from swquant.quant.spec import in_words
from swquant.terminal import facts, next_command, outcome, plain_console, say
from swquant.units import size, span


def print_estimate(found: Estimate, recipe: str | None, command: str) -> None:
    """Print what a run will take.

    Args:
        found: What was estimated.
        recipe: The name or the file of the recipe.
        command: What runs it.
    """
    console = plain_console()
    for problem in found.problems:
        outcome(console, f"Does not fit: {problem}", good=False)
    if not found.problems:
        time = "" if found.time is None else f"{span(found.time['total'])}, "
        memory = f"{size(found.host)} of memory, {size(found.disk['peak'])} of disk"
        outcome(console, f"Fits: {time}{memory}, at {found.bits_per_weight:.2f} bits per weight")
    console.print()
    facts(console, _facts(found, recipe))
    if found.chosen is not None:
        say(console, found.chosen)
    if found.faster:
        flags = ", ".join(f"{flag} {span(seconds)}" for flag, seconds in found.faster.items())
        say(console, f"To take less: {flags}; a device that computes faster.")
    if not found.problems:
        next_command(console, "run it", command)


def _facts(found: Estimate, recipe: str | None) -> Iterator[tuple[str, str]]:
    yield "recipe", f"{f'{recipe}: ' if recipe else ''}{found.recipe['method']}"
    yield "model", f"{found.blocks} blocks, {found.parameters:,} parameters, {found.quantized:,} of them quantized"
    yield "bits per quantized weight", f"{found.bits_per_weight:.3f}, scales and zero points included"
    if len(found.grids) > 1:
        yield "matrices", in_words(found.grids)
    tensors = found.parts["tensors"]
    work = ", ".join(f"{name} {size(value)}" for name, value in tensors.items())
    yield "memory of a block at work", f"{size(found.device)} at most: {work}"
    hidden_states = f"{size(found.parts['hidden_states'])} of mapped hidden states, which may be dropped from memory"
    yield (
        "memory of the process",
        f"{size(found.host)}: interpreter {size(found.parts['interpreter'])}, {hidden_states}",
    )
    if found.parts["drawing"]:
        yield "drawing samples from the model", f"{size(found.parts['drawing'])} of memory before the first block"
    else:
        yield "calibration", str(found.recipe["calibration"])
    disk = found.disk
    yield "disk", f"{size(disk['peak'])} at most, {size(disk['free'])} free; finished blocks {size(disk['run_state'])}"
    outputs = (
        f"{name} {size(value)}, {8 * value / found.parameters:.2f} bits per weight over all of it"
        for name, value in disk["outputs"].items()
    )
    yield "output", "; ".join(outputs)
    if found.time is not None:
        time = found.time
        block = ", ".join(f"{name} {span(value)}" for name, value in time["block"].items())
        rest = {"end to end": time["finish"], "drawing samples": time["drawing"], "files": time["files"]}
        others = "".join(f"; {name} {span(value)}" for name, value in rest.items() if value >= 0.01 * time["total"])
        blocks = f"{time['blocks']} blocks {span(time['blocks'] * sum(time['block'].values()))}"
        yield "time", f"{span(time['total'])}: {blocks} (each {block}){others}"
