"""Names and shapes on disk, and those in memory: transformers' own conversion mapping, read in both directions.

transformers renames what a checkpoint calls its tensors, and merges, splits or transposes some
(``conversion_mapping.py``). Where a name in memory stands for one tensor on disk, or for a slice of one, that is a
:class:`Piece`, which is read and written without anything else. What takes several tensors apart or puts them together
is a :class:`Mixed`, whose operations are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from swquant.errors import SwquantError, reason_of


class Readable(Protocol):
    """Where tensors are read from by their names on disk."""

    def read(self, name: str) -> Tensor:
        """The tensor ``name``."""
        ...

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``, reading no more than that."""
        ...


@dataclass(frozen=True)
class Piece:
    """Where a tensor in memory lies on disk.

    Attributes:
        key: The tensor on disk.
        index: Which slice along its first dimension; ``None`` is all of it.
        transposed: It lies there transposed.
    """

    key: str
    index: int | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the tensor on disk as it is."""
        return self.index is None and not self.transposed

    def read(self, source: Readable) -> Tensor:
        """The tensor as it is in memory."""
        value = source.read(self.key) if self.index is None else source.part(self.key, self.index, self.index + 1)[0]
        return value.T.contiguous() if self.transposed else value

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in memory, given that of the tensor on disk."""
        shape = stored if self.index is None else stored[1:]
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Mixed:
    """Tensors in memory that are made of tensors on disk by operations of transformers.

    Attributes:
        converter: transformers' rule.
        first: The name in memory that the rule gives its sources.
        sources: Names on disk, by the pattern of the rule that each matches.
        targets: Shapes in memory by name.
        model: transformers' model, which some rules ask for its configuration.
        renamed: Names that the plain renamings before the rule give its sources, to those on disk. The way back is
            looked up, since not every renaming has one: several old names may become one.
        stacked: Names in memory that are slices ``[index]`` of a target, perhaps transposed.
    """

    converter: WeightConverter
    first: str
    sources: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, tuple[int, ...]]
    model: Any = field(repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    stacked: Mapping[str, tuple[str, Piece]] = field(default_factory=dict[str, "tuple[str, Piece]"])

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors on disk."""
        return tuple(key for keys in self.sources.values() for key in keys)

    def read(self, source: Readable) -> dict[str, Tensor]:
        """All targets, by name."""
        return self.convert({key: source.read(key) for key in self.keys})

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The targets made of ``tensors``, by name."""
        rule = deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                rule.add_tensor(self.first, key, pattern, tensors[key])  # pyright: ignore[reportArgumentType]
        found: Any = rule.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape in memory of a target or of a slice of one."""
        target, piece = self.stacked.get(name, (name, Piece(name)))
        return piece.shape_of(self.targets[target])

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is on disk, given the targets.

        Raises:
            SwquantError: transformers' rule makes a tensor of them that it was not made of.
        """
        rule: Any = self.converter.reverse_transform()
        out: dict[str, Tensor] = {}
        first: str | None = None
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = rule.rename_source_key(name)
            first = first or renamed
            rule.add_tensor(first, name, pattern, tensors[name])
        assert first is not None
        for name, value in rule.convert(first, model=self.model, config=self.model.config).items():
            if name not in self.renamed:
                raise SwquantError(f"transformers makes {name} of {first}, and does not read it from there")
            out[self.renamed[name]] = value[0] if isinstance(value, list) else value
        return out

    def require_way_back(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a rule that does not make its sources of its targets again, which is found without values.

        Raises:
            SwquantError: Naming a source.
        """
        try:
            made = self.convert({key: torch.empty(shapes[key], device="meta") for key in self.keys})
            found = {key: tuple(value.shape) for key, value in self.revert(made).items()}
        except Exception as error:  # transformers' rules raise whatever the shapes make them run into
            raise SwquantError(
                f"{self.keys[0]} cannot be written as transformers reads it: {reason_of(error)}"
            ) from error
        for key in self.keys:
            if found.get(key) != shapes[key]:
                raise SwquantError(f"{key} cannot be written as transformers reads it: its rule has no way back")


@dataclass(frozen=True)
class Names:
    """A model's tensors in memory and on disk.

    Attributes:
        pieces: By name in memory, those that are one tensor on disk or a slice of one.
        mixed: All others.
        carried: Tensors on disk that no module of the model reads: formats that have a place for them copy them.
        dropped: An equal copy of the embedding as the head of a model whose head it is: it is left out.
        missing: What an index promises, no file holds and no module reads.
    """

    pieces: Mapping[str, Piece]
    mixed: tuple[Mixed, ...]
    carried: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def mixture(self, name: str) -> Mixed | None:
        """The rule that makes the tensor ``name``, if one does."""
        return self._mixtures.get(name)

    @cached_property
    def _mixtures(self) -> dict[str, Mixed]:
        return {name: mixed for mixed in self.mixed for name in (*mixed.targets, *mixed.stacked)}

    def keys_of(self, names: Iterable[str]) -> set[str]:
        """The tensors on disk that ``names`` are made of."""
        keys: set[str] = set()
        mixtures = self._mixtures
        for name in names:
            if name in self.pieces:
                keys.add(self.pieces[name].key)
            elif name in mixtures:
                keys.update(mixtures[name].keys)
        return keys


def analyse(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Piece], list[Mixed], list[str]]:
    """Where each parameter and saved buffer of transformers' own model lies.

    Args:
        model: transformers' model on ``meta``, as it makes it.
        shapes: Of the tensors on disk, by name.

    Returns:
        Pieces by name in memory, rules, and names on disk that the model does not have. Where experts lie one by one,
        the name of a piece is that of the fused parameter with ``[expert]`` and, for the gate and the up projection
        that it puts together, ``:gate_proj`` or ``:up_proj`` appended.

    Raises:
        SwquantError: transformers' rule for a tensor fails on it.
    """
    renamings, _ = _rules(model)
    state = model.state_dict()
    pieces, groups, carried = _grouped(model, shapes)
    mixed: list[Mixed] = []
    for name, (rule, sources) in groups.items():
        found = _expert_pieces(name, rule, sources, state[name])
        if found is None:
            mixed.append(_mixed(name, rule, sources, shapes, model, renamings))
        else:
            pieces |= found
    return pieces, mixed, carried


def rules_on(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Mixed]:
    """As :func:`analyse`, every rule that puts tensors on disk together, those that only stack experts among them."""
    renamings, _ = _rules(model)
    groups = _grouped(model, shapes)[1]
    return [_mixed(name, rule, sources, shapes, model, renamings) for name, (rule, sources) in groups.items()]


def _grouped(
    model: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Piece], dict[str, tuple[WeightConverter, dict[str, list[str]]]], list[str]]:
    """What is a tensor on disk as it is, what a rule makes of which tensors, by name in memory, and what no one reads.

    A group's sources stand by the pattern of the rule that each matches.
    """
    renamings, converters = _rules(model)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    pieces: dict[str, Piece] = {}
    groups: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    carried: list[str] = []
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = _renamed(key, renamings, converters, model.base_model_prefix, state)
        if name not in state:
            carried.append(key)
        elif pattern is None:
            if name in pieces:
                raise SwquantError(f"both {pieces[name].key} and {key} are {name} in the model; keep one of them")
            pieces[name] = Piece(key)
        else:
            groups.setdefault(name, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(key)
    return pieces, groups, carried


def read_by(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Of names on disk those that transformers' own model has a parameter or a saved buffer for, with its name."""
    renamings, converters = _rules(model)
    state = model.state_dict()
    found = {key: _renamed(key, renamings, converters, model.base_model_prefix, state)[0] for key in keys}
    return {key: name for key, name in found.items() if name in state}


def _rules(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' rules for a model: those that rename, and those that convert."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _renamed(key: str, renamings: list[Any], converters: list[Any], prefix: str, state: Any) -> tuple[str, str | None]:
    """As ``convert_and_load_state_dict_in_model`` finds the name in memory; ``pattern`` is that of a converter."""
    name, pattern = rename_source_key(key, renamings, converters, prefix, state)
    if name not in state and key in state:
        return rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
    return name, pattern


def _expert_pieces(
    name: str, rule: WeightConverter, sources: Mapping[str, list[str]], fused: Tensor
) -> dict[str, Piece] | None:
    """Each expert's own tensors, where the rule only stacks them; ``None`` where it does more."""
    kinds = [type(operation) for operation in rule.operations]
    if kinds[:1] != [MergeModulelist]:
        return None
    patterns = [pattern for pattern in rule.source_patterns if pattern in sources]
    if any(len(sources[pattern]) != len(fused) for pattern in patterns):
        return None
    if kinds == [MergeModulelist] and len(patterns) == 1:
        return {f"{name}[{index}]": Piece(key) for index, key in enumerate(sources[patterns[0]])}
    if kinds == [MergeModulelist, Concatenate] and len(patterns) == 2 and rule.operations[1].dim == 1:  # pyright: ignore
        return {
            f"{name}[{index}]:{part}": Piece(key)
            for part, pattern in zip(("gate_proj", "up_proj"), patterns, strict=True)
            for index, key in enumerate(sources[pattern])
        }
    return None


def _mixed(
    name: str,
    rule: WeightConverter,
    sources: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
    renamings: list[Any],
) -> Mixed:
    """The rule with its targets, found by running it on tensors without values."""
    frozen = {pattern: tuple(sources[pattern]) for pattern in rule.source_patterns if pattern in sources}
    bare = Mixed(rule, name, frozen, {}, model)
    try:
        empty = {key: torch.empty(shapes[key], device="meta") for key in bare.keys}
        made = bare.convert(empty)
    except Exception as error:  # transformers' rules raise whatever the shapes make them run into
        raise SwquantError(
            f"{bare.keys[0]} and what belongs to it do not make {name} as transformers would: {reason_of(error)}"
        ) from error
    targets = {key: tuple(value.shape) for key, value in made.items()}
    return replace(bare, targets=targets, renamed=_renamed_sources(bare.keys, renamings, model.base_model_prefix))


def _renamed_sources(keys: Iterable[str], renamings: list[Any], prefix: str) -> dict[str, str]:
    """Names before a rule to those on disk; transformers puts the base model's prefix before them or takes it off."""
    out: dict[str, str] = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, [])
        out |= {name: key, f"{prefix}.{name}": key, name.removeprefix(f"{prefix}."): key}
    return out
