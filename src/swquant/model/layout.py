"""What is quantized, as a list: every matrix with its name, where it lies on disk, its shape and its own grid."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from swquant.checkpoint.names import Names, Piece
from swquant.errors import SwquantError
from swquant.model.flow import Flow
from swquant.model.skeleton import Skeleton
from swquant.quant.spec import QuantSpec, named

SMALLEST = 32
"""Rows or columns below which a matrix is kept as it is: it is next to nothing of the model, and its groups are odd."""

EXPERTS = re.compile(r"^(.*\bexperts)\.\d+\.")
"""Names of what lies in an expert, up to the list of experts, all of which runtimes compute by one kernel."""

ROUTERS = re.compile(r"(^|_)(router|gate_score|wg)($|_)|^shared_expert_gate$")
"""Names of matrices that decide where a token goes. Their errors change which experts run at all."""


@dataclass(frozen=True)
class Site:
    """One matrix on its way to codes.

    Attributes:
        name: Of the linear in memory, e.g. ``model.layers.3.mlp.experts.7.up_proj``.
        inner: The same within its block; the name itself outside of blocks.
        stored: Where its weight lies on disk; ``None`` where a rule of transformers makes it of several tensors.
        shape: ``(out, in)``.
        kind: The last part of its name, e.g. ``up_proj``.
        fused: Runtimes fuse the sites of one label, so their grids have to be equal.
        spec: Its grid; ``None`` is kept as it is.
    """

    name: str
    inner: str
    stored: Piece | None
    shape: tuple[int, int]
    kind: str
    fused: str
    spec: QuantSpec | None

    @property
    def weight(self) -> str:
        """Name of its weight in memory."""
        return f"{self.name}.weight"

    @property
    def module(self) -> str | None:
        """Name of its module on disk, where its weight is a tensor of its own that is called ``module.weight``."""
        if self.stored is None or not self.stored.whole or not self.stored.key.endswith(".weight"):
            return None
        return self.stored.key.removesuffix(".weight")


@dataclass(frozen=True)
class Layout:
    """What is quantized in a model, and what is not.

    Attributes:
        blocks: The matrices of each block in the order in which they run.
        flows: How each block runs.
        kept: Linears of the blocks that are kept as they are, and why, by name.
    """

    blocks: tuple[tuple[Site, ...], ...]
    flows: tuple[Flow, ...]
    kept: Mapping[str, str]

    @property
    def sites(self) -> Iterator[Site]:
        """All that have a grid."""
        return (site for block in self.blocks for site in block if site.spec is not None)

    @property
    def counts(self) -> dict[str, int]:
        """How many matrices are on each grid, or kept by a pattern, the most first."""
        return dict(Counter(named(site.spec) for block in self.blocks for site in block).most_common())

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """The grids, each once, in the order in which they come."""
        return tuple(dict.fromkeys(site.spec for site in self.sites if site.spec is not None))

    def inputs(self, index: int) -> tuple[tuple[str, ...], ...]:
        """A block's quantized linears in the order in which they run, those that read one tensor together."""
        known = {site.inner for site in self.blocks[index] if site.spec is not None}
        sets = (tuple(name for name in names if name in known) for names in self.flows[index].inputs)
        found = [names for names in sets if names]
        called = {name for names in found for name in names}
        return (*found, *((name,) for name in sorted(known - called)))

    def kinds(self) -> dict[int, int]:
        """Blocks of different kinds, told by their matrices and how they run: the first of each kind, and how many."""
        return dict(Counter(self.firsts()))

    def firsts(self) -> list[int]:
        """For each block the first of its kind."""
        seen: dict[object, int] = {}
        return [
            seen.setdefault((tuple((site.inner, site.shape, site.spec) for site in block), flow.inputs), index)
            for index, (block, flow) in enumerate(zip(self.blocks, self.flows, strict=True))
        ]

    def grids(self, index: int) -> dict[str, QuantSpec]:
        """Grid of each of a block's weights, by its name inside the block."""
        return {f"{site.inner}.weight": site.spec for site in self.blocks[index] if site.spec is not None}


def plain_matrices(
    modules: Iterable[tuple[str, nn.Module]],
    names: Names,
    shapes: Mapping[str, tuple[int, ...]],
    quantized: Collection[str],
) -> tuple[str, ...]:
    """Modules with a matrix that is not quantized, as the model and as the files call them, embeddings left out.

    The head, towers, routers, which transformers holds as parameters and other runtimes as linears, and the layers for
    further tokens, which transformers does not load and other runtimes do. What a runtime is not told of, it takes for
    quantized: it then finds no codes, stops, or goes on with a router of zeros (vllm-project/vllm-omni#5573).

    Args:
        modules: Of the model, by name in memory.
        names: Where their tensors lie.
        shapes: Of the tensors on disk, by name.
        quantized: Tensors on disk that are quantized, or are put together from what is.
    """
    found: dict[str, None] = {}
    other = {*quantized, *names.dropped}
    for name, module in modules:
        keys = names.keys_of([f"{name}.weight"])
        if isinstance(module, nn.Linear) and keys.isdisjoint(quantized):
            found[name] = None
        elif isinstance(module, nn.Embedding):
            other |= keys
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2 and key not in other:
            found[key.removesuffix(".weight")] = None
    return tuple(found)


def lay_out(
    skeleton: Skeleton,
    spec: QuantSpec,
    grids: Mapping[str, QuantSpec | None] | None = None,
    *,
    allow_split: bool = False,
) -> Layout:
    """The layout of a model whose blocks' calls have been recorded once.

    Args:
        skeleton: The model's code; each recorder knows its block's flow.
        spec: The grid of every matrix that ``grids`` says nothing of.
        grids: Other grids, or ``None`` to keep a matrix as it is, by shell patterns of names in memory; of patterns
            that match, the last counts.
        allow_split: Matrices that runtimes fuse may have different grids.

    Raises:
        SwquantError: A grid's groups do not divide a matrix, a pattern matches nothing, matrices that runtimes fuse
            differ, or no matrix is left.
    """
    flows = [recorder.flow or Flow((), (), {}, None) for recorder in skeleton.recorders]
    blocks, kept = _sorted_out(skeleton, flows, spec, SMALLEST)
    if not any(blocks):  # a model of nothing but small matrices has them quantized
        blocks, kept = _sorted_out(skeleton, flows, spec, 1)
    if not any(blocks):
        raise SwquantError(f"{type(skeleton.model).__name__} has no matrix in its blocks that could be quantized")
    layout = _with_grids(Layout(tuple(blocks), tuple(flows), kept), grids or {})
    if not allow_split:
        _require_whole(layout)
    for site in layout.sites:
        assert site.spec is not None
        site.spec.require_divides(site.name, site.shape[1])
    if not any(True for _ in layout.sites):
        every = ", ".join(repr(pattern) for pattern, grid in (grids or {}).items() if grid is None)
        raise SwquantError(f"keeping {every} leaves no matrix to quantize; keep fewer")
    return layout


def _sorted_out(
    skeleton: Skeleton, flows: list[Flow], spec: QuantSpec, smallest: int
) -> tuple[list[tuple[Site, ...]], dict[str, str]]:
    """The matrices of each block, and those that are kept and why; ``smallest`` is as :data:`SMALLEST`."""
    blocks: list[tuple[Site, ...]] = []
    kept: dict[str, str] = {}
    for block, flow in zip(skeleton.blocks, flows, strict=True):
        sites: list[Site] = []
        linears = {name: module for name, module in block.module.named_modules() if isinstance(module, nn.Linear)}
        order = {name: place for place, name in enumerate(flow.linears)}
        places = sorted((order.get(name, len(order)), place, name) for place, name in enumerate(linears))
        for _, _, name in places:
            reason = _reason(name, linears[name], block.module, smallest)
            full = f"{block.prefix}.{name}"
            if reason is not None:
                kept[full] = reason
                continue
            sites.append(_site(full, name, linears[name], skeleton.names, flow, spec))
        for name, value in block.module.named_parameters():
            if value.dim() == 3 and min(value.shape[1:]) >= smallest:
                kept[f"{block.prefix}.{name}"] = "several matrices in one tensor that swquant does not take apart"
        blocks.append(tuple(sites))
    return blocks, kept


def _site(full: str, name: str, linear: nn.Linear, names: Names, flow: Flow, spec: QuantSpec) -> Site:
    together = next((group for group in flow.inputs if name in group), (name,))
    parent = name.rpartition(".")[0]
    # attention and the MLP may read the same states, and are never one product
    beside = next(other for other in together if other.rpartition(".")[0] == parent)
    inside, numbers = EXPERTS.match(name), re.sub(r"\.\d+\.", ".*.", name)
    label = inside[1] if inside is not None else beside if numbers == name else numbers
    prefix = full.removesuffix(name)
    rows, columns = linear.weight.shape
    return Site(
        name=full,
        inner=name,
        stored=names.pieces.get(f"{full}.weight"),
        shape=(rows, columns),
        kind=name.rpartition(".")[2],
        fused=prefix + label,
        spec=spec,
    )


def _reason(name: str, linear: nn.Linear, block: nn.Module, smallest: int) -> str | None:
    """Why a linear is kept as it is; ``None`` if it is quantized."""
    parent, _, last = name.rpartition(".")
    if ROUTERS.search(last):
        return "a router"
    if last == "gate" and any(child == "experts" for child, _ in block.get_submodule(parent).named_children()):
        return "a router"
    if min(linear.weight.shape) < smallest:
        return f"smaller than {smallest} rows or columns"
    return None


def _with_grids(layout: Layout, grids: Mapping[str, QuantSpec | None]) -> Layout:
    names = [site.name for site in layout.sites]
    for pattern in grids:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SwquantError(_unmatched(pattern, layout))
    blocks = tuple(tuple(replace(site, spec=_spec(site, grids)) for site in block) for block in layout.blocks)
    return replace(layout, blocks=blocks)


def _unmatched(pattern: str, layout: Layout) -> str:
    """That a pattern matches no matrix, with the reason where it matches one that is kept, or the nearest names."""
    kept = next((name for name in layout.kept if fnmatchcase(name, pattern)), None)
    if kept is not None:
        return f"{pattern!r} is {kept}, which is kept as it is ({layout.kept[kept]}): leave it out"
    ends = dict.fromkeys(f"*.{name}" for site in layout.sites for name in (site.kind, _within_parent(site)))
    plain = not any(letter in pattern for letter in "*?[")
    near = get_close_matches(pattern, [site.name for site in layout.sites] if plain else ends, n=3, cutoff=0.55)
    known = near or sorted(dict.fromkeys(f"*.{site.kind}" for site in layout.sites))
    return f"no matrix is called {pattern!r}; the nearest names: {', '.join(known)}"


def _within_parent(site: Site) -> str:
    """A site's name from its parent on, e.g. ``mlp.up_proj``."""
    return ".".join(site.name.split(".")[-2:])


def _require_whole(layout: Layout) -> None:
    """Refuse different grids for what runtimes fuse."""
    labels: dict[str, Site] = {}
    for site in (site for block in layout.blocks for site in block):
        other = labels.setdefault(site.fused, site)
        if other.spec != site.spec:
            one, two = named(other.spec), named(site.spec)
            raise SwquantError(
                f"{other.name} and {site.name} have different grids ({one}, {two}), and runtimes fuse the two: give "
                "them one, or allow it with --allow-split, for runtimes that do not"
            )


def _spec(site: Site, grids: Mapping[str, QuantSpec | None]) -> QuantSpec | None:
    spec = site.spec
    for pattern, given in grids.items():
        if fnmatchcase(site.name, pattern):
            spec = given
    return spec
