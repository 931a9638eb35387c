"""Runtimes that outputs are made for: a file here that defines a class of its own name is a runtime of that name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product

from swquant import registry
from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError
from swquant.formats.base import Format, cannot_hold
from swquant.formats.compressed_tensors import SEVERAL, not_in_transformers
from swquant.quant.spec import BITS, GROUP_SIZES, UNIFORM, QuantSpec, fixed_by, kinds_of_grids
from swquant.targets.base import Target


def load_target(name: str) -> Target:
    """The runtime ``name``, written as its users write it (``llama.cpp``) or as its file (``llama_cpp``).

    Raises:
        SwquantError: There is none, with the nearest name.
    """
    return registry.load(__name__, name.lower().replace(".", "_").replace("-", "_"))()


def choose_format(target: Target, spec: QuantSpec) -> str:
    """The format in which ``target`` loads such weights.

    Raises:
        SwquantError: There is none; the sentence says why and names the nearest grid that works.
    """
    found = _format(target, spec)
    if found is None:
        reasons = (why_not(target, form, spec) for form in target.formats)
        raise SwquantError(_refused(target, spec, next(reason for reason in reasons if reason)))
    return found


def require_loads(target: Target, form: str, spec: QuantSpec) -> None:
    """Refuse a format that ``target`` does not load.

    Raises:
        SwquantError: With the reason, and what works.
    """
    if form not in target.formats:
        raise SwquantError(
            f"{target.name} does not read the format {form}, expected {', '.join(target.formats)}; "
            f"leave --format out and the right one is taken"
        )
    reason = why_not(target, form, spec)
    if reason is not None:
        other = _format(target, spec)
        if other is not None:
            raise SwquantError(f"{target.name} cannot load {spec.label} as {form}: {reason}; --format {other} works")
        raise SwquantError(_refused(target, spec, reason))


def why_not(target: Target, form: str, spec: QuantSpec) -> str | None:
    """Why ``form`` cannot hold such weights or ``target`` cannot load them from it; ``None`` if both can."""
    held: Format = registry.load("swquant.formats", form)()
    return cannot_hold(held, spec) or target.refusal(form, spec)


def require_together(target: Target, form: str, specs: Collection[QuantSpec]) -> None:
    """Refuse grids each of which ``target`` loads from ``form``, but not several in one model.

    Raises:
        SwquantError: With the reason, and what works.
    """
    # transformers loads asymmetric weights with dequantize=True alone, which reads all on the grid of the first group.
    alone = target.name == "transformers" and form == "compressed_tensors" and not all(spec.symmetric for spec in specs)
    if alone and len(set(specs)) > 1:
        kinds = dict.fromkeys(specs)
        labels = ", ".join(spec.label if spec.symmetric else f"{spec.label} asymmetric" for spec in kinds)
        raise SwquantError(
            f"{target.name} cannot load {form} on several grids ({labels}) of which one is asymmetric; "
            "make all symmetric, or give --format dequantized"
        )


def require_model(target: Target, form: str, outline: Outline) -> None:
    """Refuse a model that ``target`` does not load from ``form``, though it loads each of its grids.

    Raises:
        SwquantError: With the reason, and what works.
    """
    why = not_in_transformers(outline) if form == "compressed_tensors" else None
    if why is not None and (target.name == "transformers" or (target.name == "vllm" and why == SEVERAL)):
        raise SwquantError(
            f"{target.name} cannot load {form} with {why}; make them alike and symmetric, or give --format dequantized"
        )


def _format(target: Target, spec: QuantSpec) -> str | None:
    return next((form for form in target.formats if why_not(target, form, spec) is None), None)


def _refused(target: Target, spec: QuantSpec, reason: str) -> str:
    fitting = [other for other in _grids() if _format(target, other) is not None]
    nearest = min(fitting, key=lambda other: _distance(spec, other))
    return f"{target.name} cannot load {_words(spec)}: {reason}; the nearest that works is {_words(nearest)}"


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
