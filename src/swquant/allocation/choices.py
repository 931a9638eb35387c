"""What there is to choose: units of matrices whose grids have to be equal, the grids that each can have, and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

from swquant.allocation.sizes import tensor_bytes
from swquant.errors import SwquantError
from swquant.formats.base import Format
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.model.ends import grids_of_ends
from swquant.model.layout import EXPERTS, Site
from swquant.plan import Plan
from swquant.quant.spec import BITS, GROUP_SIZES, UNIFORM, QuantSpec, named
from swquant.recipe import Recipe
from swquant.targets import why_not

EMBEDDING, HEAD = "embedding", "head"
END_BITS = (4, 8)
ALIKE = ("mlx", "compressed_tensors")
"""Formats from which some reader takes the experts of all layers on one grid."""


@dataclass(frozen=True)
class Choice:
    """One grid that a unit can have.

    Attributes:
        spec: The grid; ``None`` keeps the unit as it is.
        bytes: What its tensors take then.
    """

    spec: QuantSpec | None
    bytes: int


@dataclass(frozen=True)
class Unit:
    """Matrices whose grids are chosen together.

    Attributes:
        name: Of the first, or of a list of experts, or ``embedding`` or ``head``.
        kind: What it is in its block, e.g. ``self_attn.q_proj``.
        sites: The matrices; none of the embedding and the head.
        choices: Fewest bytes first.
    """

    name: str
    kind: str
    sites: tuple[Site, ...]
    choices: tuple[Choice, ...]


def units_of(plan: Plan) -> tuple[Unit, ...]:
    """Everything that ``plan`` leaves open: matrices of which no pattern says anything, and the embedding and the head.

    Args:
        plan: A run whose recipe has its patterns alone.
    """
    form = plan.formats[0]
    specs = _grids(plan, form)
    units = [_unit(plan, form, name, sites, specs) for name, sites in _together(plan, form).items()]
    return (*(unit for unit in units if len(unit.choices) > 1), *_ends(plan, form))


def settings_of(chosen: Mapping[Unit, Choice]) -> dict[str, object]:
    """What was chosen as keys of a recipe: ``grids`` by names, and the bits of the embedding and the head."""
    settings: dict[str, object] = {}
    grids: dict[str, QuantSpec | None] = {}
    for unit, choice in chosen.items():
        if unit.sites:
            grids |= dict.fromkeys(_names(unit), choice.spec)
        else:
            settings[f"{unit.name}_bits"] = None if choice.spec is None else choice.spec.bits
    return {**settings, "grids": grids}


def _names(unit: Unit) -> Iterator[str]:
    """Patterns of the matrices of a unit: one for a layer's experts, their names for all else."""
    for site in unit.sites:
        inside = EXPERTS.match(site.name)
        yield site.name if inside is None else f"{inside[1]}.*"


def _together(plan: Plan, form: Format) -> dict[str, tuple[Site, ...]]:
    """Matrices that need one grid, by the name of the first, those left out for which a pattern decides."""
    groups: dict[str, list[Site]] = {}
    for site in (site for block in plan.layout.blocks for site in block):
        if any(fnmatchcase(site.name, pattern) for pattern in plan.recipe.grids):
            continue
        inside = EXPERTS.match(site.name)
        if inside is not None:
            key = "experts" if form.name in ALIKE else inside[1]
        else:
            key = site.name if plan.recipe.allow_split else site.fused
        groups.setdefault(key, []).append(site)
    experts = {key: EXPERTS.match(sites[0].name) for key, sites in groups.items()}
    return {
        sites[0].name if (found := experts[key]) is None else found[1]: tuple(sites) for key, sites in groups.items()
    }


def _grids(plan: Plan, form: Format) -> list[QuantSpec]:
    """Grids that format, runtime and method take, those of one layout with the smallest groups alone."""
    steps = parse_methods(plan.recipe.method)
    symmetries = (True, False) if form.name == "gguf" else (plan.recipe.symmetric,)
    uniform = (QuantSpec(*values) for values in product(BITS, GROUP_SIZES, symmetries))
    others = (QuantSpec.named(kind) for kind in form.kinds or () if kind != UNIFORM)
    seen: set[tuple[int, bool, int]] = set()
    found: list[QuantSpec] = []
    for spec in (*uniform, *others):
        if not _held(plan, form, spec):
            continue
        try:
            build_pipeline(steps, Setting(plan.spec, False, 1.0, others=(spec,)))
        except SwquantError:
            continue
        outline = replace(plan.outline, grids={"": spec}, ends={})
        layout = spec.bits, spec.symmetric, form.weight_bytes(outline, 1, 1 << 12)
        if layout not in seen:
            seen.add(layout)
            found.append(spec)
    return found


def _held(plan: Plan, form: Format, spec: QuantSpec) -> bool:
    """Whether the format holds such weights, of those matrices that the grid divides, and the runtime loads them."""
    refused = why_not(plan.target, form.name, spec) if plan.target is not None else form.refusal(spec)
    fitting = {name: shape for name, shape in plan.outline.linears.items() if _divides(spec, shape[1])}
    if refused is not None or not fitting or (form.kinds is not None and spec.grid not in form.kinds):
        return False
    try:
        form.check(replace(plan.outline, linears=fitting, grids=dict.fromkeys(fitting, spec)))
    except SwquantError:
        return False
    return True


def _divides(spec: QuantSpec, columns: int) -> bool:
    return columns % (spec.super_width or spec.group_width(columns)) == 0


def _unit(plan: Plan, form: Format, name: str, sites: tuple[Site, ...], specs: Iterable[QuantSpec]) -> Unit:
    fitting = [spec for spec in specs if all(_divides(spec, site.shape[1]) for site in sites)]
    choices = [Choice(spec, sum(tensor_bytes(plan, form, site, spec) for site in sites)) for spec in (*fitting, None)]
    first = sites[0]
    kind = first.inner if EXPERTS.match(first.name) is None else EXPERTS.sub(r"experts.", first.inner)
    return Unit(name, kind, sites, tuple(_smaller_than_kept(choices)))


def _smaller_than_kept(choices: list[Choice]) -> list[Choice]:
    """By bytes, without grids on which a matrix takes no less than it does as it is."""
    kept = choices[-1]
    return [*sorted((one for one in choices[:-1] if one.bytes < kept.bytes), key=lambda one: one.bytes), kept]


def _ends(plan: Plan, form: Format) -> Iterator[Unit]:
    """The embedding and the head, where the format holds them quantized and the recipe leaves them open."""
    recipe, skeleton = plan.recipe, plan.skeleton
    if recipe.embedding_bits is not None or (skeleton.tied and recipe.head_bits is not None):
        names = []
    else:
        names = [(EMBEDDING, f"{skeleton.embedding}.weight")]
    if not skeleton.tied and recipe.head_bits is None:
        names.append((HEAD, skeleton.head_weight))
    for end, weight in names:
        choices = [Choice(None, plan.checkpoint.tensors[weight].nbytes)]
        for bits in END_BITS:
            try:
                spec = grids_of_ends(skeleton, *((bits, None) if end == EMBEDDING else (None, bits)))[weight]
                rows, columns = plan.checkpoint.tensors[weight].shape
                module = skeleton.names.pieces[weight].key.removesuffix(".weight")
                form.check(replace(plan.outline, ends={module: ((rows, columns), spec)}))
            except SwquantError:
                continue
            outline = replace(plan.outline, grids={"": spec}, ends={})
            choices.append(Choice(spec, form.weight_bytes(outline, rows, columns)))
        if len(choices) > 1:
            yield Unit(end, end, (), tuple(_smaller_than_kept([*choices[1:], choices[0]])))


def weights_of(unit: Unit) -> int:
    """Weights of the matrices of a unit."""
    return sum(math.prod(site.shape) for site in unit.sites)


def most_of(recipe: Recipe, chosen: Mapping[Unit, Choice]) -> QuantSpec:
    """The grid of most weights, for a recipe's ``bits`` and the other keys of the grid of all that has no other."""
    counts: dict[QuantSpec, int] = {recipe.spec: 0}
    for unit, choice in chosen.items():
        if choice.spec is not None and unit.sites:
            counts[choice.spec] = counts.get(choice.spec, 0) + weights_of(unit)
    return max(counts, key=lambda spec: counts[spec])


def label(choice: Choice) -> str:
    """A choice's grid in a word."""
    return named(choice.spec)
