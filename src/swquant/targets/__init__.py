"""Runtimes that outputs are made for: a file here that defines a class of its own name is a runtime of that name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import product

from swquant import registry
from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError, did_you_mean
from swquant.formats import PLAIN
from swquant.formats.base import Format, cannot_hold, split_of
from swquant.formats.compressed_tensors import SEVERAL, CompressedTensors, not_in_transformers
from swquant.quant.spec import BITS, GROUP_SIZES, UNIFORM, QuantSpec, fixed_by, kinds_of_grids, named
from swquant.targets.base import Target


def load_target(name: str) -> Target:
    """The runtime ``name``, written as its users write it (``llama.cpp``) or as its file (``llama_cpp``).

    Raises:
        SwquantError: There is none, with the nearest name.
    """
    file = name.lower().replace(".", "_").replace("-", "_")
    if file not in registry.names(__name__):
        raise SwquantError(f"no {name!r} among the runtimes{did_you_mean(name, describe())}")
    return registry.load(__name__, file)()


def describe() -> dict[str, str]:
    """Each runtime, written as its users write it, with a line on it."""
    return {registry.load(__name__, file).name: line for file, line in registry.describe(__name__).items()}


def choose_format(target: Target, *specs: QuantSpec) -> str:
    """The format in which ``target`` loads weights on these grids in one model.

    Raises:
        SwquantError: There is none; the sentence says why and names the nearest grid that works.
    """
    found = _format(target, specs)
    if found is None:
        found = _format(target, specs[:1]) or target.formats[0]
        require_loads(target, found, specs)
    return found


def require_loads(target: Target, form: str, specs: Sequence[QuantSpec]) -> None:
    """Refuse a format from which ``target`` does not load such weights.

    Raises:
        SwquantError: With the reason, and what works.
    """
    if form not in target.formats:
        raise SwquantError(
            f"{target.name} does not read the format {form}, expected {', '.join(target.formats)}; "
            f"leave --format out and the right one is taken"
        )
    other = _format(target, specs)
    for spec in specs:
        reason = why_not(target, form, spec)
        if reason is not None:
            if other is not None:
                raise SwquantError(
                    f"{target.name} cannot load {spec.label} as {form}: {reason}; --format {other} works"
                )
            raise SwquantError(_refused(target, spec, reason, [known for known in specs if known != spec]))
    reason = _not_together(target, form, specs)
    if reason is not None:
        labels = ", ".join(map(named, dict.fromkeys(specs)))
        instead = "give --format dequantized" if other is None else f"give --format {other}"
        raise SwquantError(f"{target.name} cannot load {form} on several grids ({labels}){reason}, or {instead}")


def why_not(target: Target, form: str, spec: QuantSpec) -> str | None:
    """Why ``form`` cannot hold such weights or ``target`` cannot load them from it; ``None`` if both can."""
    held: Format = registry.load("swquant.formats", form)()
    return cannot_hold(held, spec) or target.refusal(form, spec)


def _not_together(target: Target, form: str, specs: Collection[QuantSpec]) -> str | None:
    """Why ``target`` does not load several grids from ``form``, each of which it loads, and what would do.

    transformers loads asymmetric compressed-tensors with ``dequantize=True`` alone, which reads all weights on the grid
    of the first group. GPTQ files it reads by optimum, which knows one grid, and GPTQ's and AutoRound's files say once
    for all weights how zero points are stored.
    """
    if len(set(specs)) < 2:
        return None
    if form in ("gptq", "auto_round") and len({spec.symmetric for spec in specs}) > 1:
        return ", symmetric and asymmetric; make all the same"
    if target.name == "transformers" and form == "gptq":
        return ", of which it reads one; give one"
    if target.name == "transformers" and form == "compressed_tensors" and not all(spec.symmetric for spec in specs):
        return " of which one is asymmetric; make all symmetric"
    return None


def require_model(target: Target | None, form: str, outline: Outline) -> None:
    """Refuse a model that ``target`` does not load from ``form``, though it loads each of its grids.

    Where no runtime is named, transformers is meant: an output that it cannot load is for runtimes with code of their
    own alone, which has to be said.

    Raises:
        SwquantError: With the reason, and what works.
    """
    unread = outline.unread is not None and form == CompressedTensors.name
    if unread and (target is None or target.name == "transformers"):
        raise SwquantError(
            f"transformers cannot load this model as compressed_tensors: {outline.unread}; choose the format "
            "dequantized, or name a runtime whose own code may load it, such as --for vllm"
        )
    if target is None:
        return
    split = split_of(outline) if target.fuses and form in target.formats else None
    if split is not None:
        raise SwquantError(f"{target.name} fuses {split[0]} and {split[1]}, which have different grids; give them one")
    why = not_in_transformers(outline) if form == "compressed_tensors" else None
    if why is not None and (target.name == "transformers" or (target.name == "vllm" and why == SEVERAL)):
        raise SwquantError(
            f"{target.name} cannot load {form} with {why}; make them alike and symmetric, or give --format dequantized"
        )


def _format(target: Target, specs: Sequence[QuantSpec]) -> str | None:
    """The first format that holds codes and loads them all; plain weights are no answer for several grids."""
    for form in target.formats:
        if len(specs) > 1 and form == PLAIN:
            continue
        if all(why_not(target, form, spec) is None for spec in specs) and _not_together(target, form, specs) is None:
            return form
    return None


def _refused(target: Target, spec: QuantSpec, reason: str, beside: Sequence[QuantSpec]) -> str:
    fitting = [other for other in _grids() if _format(target, [other, *beside]) is not None]
    sentence = f"{target.name} cannot load {_words(spec)}: {reason}"
    if not fitting:
        return f"{sentence}; give all weights one grid"
    nearest = min(fitting, key=lambda other: _distance(spec, other))
    return f"{sentence}; the nearest that works is {_words(nearest)}"


def _grids() -> Iterator[QuantSpec]:
    every = list(product(BITS, (None, *GROUP_SIZES), (True, False)))
    for grid in kinds_of_grids():
        yield from dict.fromkeys(QuantSpec.named(grid, *values) for values in every)


def _distance(wanted: QuantSpec, other: QuantSpec) -> tuple[int, int, bool, int]:
    """Bits first, more of them rather than fewer, then symmetry, then the group."""
    sizes = [wanted.group_size or 1 << 12, other.group_size or 1 << 12]
    return (
        abs(wanted.bits - other.bits),
        -other.bits,
        wanted.symmetric != other.symmetric,
        max(sizes) // min(sizes),
    )


def _words(spec: QuantSpec) -> str:
    """As flags."""
    group = "channel" if spec.group_size is None else spec.group_size
    flags = {
        "bits": f"--bits {spec.bits}",
        "group_size": f"--group-size {group}",
        "symmetric": f"--{'symmetric' if spec.symmetric else 'asymmetric'}",
    }
    free = [flag for key, flag in flags.items() if key not in fixed_by(spec.grid)]
    return " ".join(free if spec.grid == UNIFORM else [f"--grid {spec.grid}", *free])
