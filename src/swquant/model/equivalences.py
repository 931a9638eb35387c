"""Pairs of modules between which scales can move without changing a block: guessed from its flow, proven by running.

A pair is a guess until the block, its parameters scaled at random on one side and back on the other, has put out what
it put out before. So no family has to be known, and none can be known wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from swquant.families.base import Equivalence, NormLinears, QueryKey, UpDown, ValueOutput
from swquant.model.flow import Flow

QUERY, KEY, VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
UP, DOWN = ("up_proj", "fc1", "w3", "c_fc", "dense_h_to_4h"), ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h")

TOLERANCE = 1e-3
"""Of the change that the block makes to its input; a wrong pair changes its output by as much as it is."""


def candidates(block: nn.Module, flow: Flow, quantized: Sequence[str]) -> tuple[Equivalence, ...]:
    """Pairs that the names of a block's linears and its flow suggest.

    Args:
        block: The block.
        flow: How it runs.
        quantized: Its linears that get codes; others are not touched.
    """
    known = set(quantized)
    found: list[Equivalence] = []
    for names in flow.inputs:
        norm = flow.norms.get(names[0])
        if norm is not None and known.issuperset(names):
            found.append(NormLinears(norm, names))
        if known.issuperset(names):
            found += _attention(block, names, known)
            found += _mlp(block, names, known)
    return tuple(found)


def _attention(block: nn.Module, names: Sequence[str], known: set[str]) -> Iterator[Equivalence]:
    query, key, value = (_named(names, words) for words in (QUERY, KEY, VALUE))
    if query is not None and key is not None:
        yield QueryKey(query, key, rotary=False)
    output = None if value is None else _sibling(block, value, OUTPUT)
    if value is not None and output in known:
        yield ValueOutput(value, output)


def _mlp(block: nn.Module, names: Sequence[str], known: set[str]) -> Iterator[Equivalence]:
    for up in (name for name in names if name.rpartition(".")[2] in UP):
        down = _sibling(block, up, DOWN)
        if down in known:
            yield UpDown(up, down)


def _named(names: Sequence[str], words: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.rpartition(".")[2] in words), None)


def _sibling(block: nn.Module, name: str, words: tuple[str, ...]) -> str | None:
    """A linear of the same module that has one of these names."""
    parent = name.rpartition(".")[0]
    children = dict(block.get_submodule(parent).named_children())
    found = next((word for word in words if isinstance(children.get(word), nn.Linear)), None)
    return None if found is None else ".".join(part for part in (parent, found) if part)


def prove(
    guesses: Sequence[Equivalence],
    run: Callable[[Equivalence | None, bool], Tensor | None],
    hidden: Tensor,
) -> tuple[Equivalence, ...]:
    """Those of the guesses, or of their variants, that leave the block's output as it is.

    Args:
        guesses: Pairs.
        run: The block's output with random scales moved between a pair's modules, as it is for ``None``; with ``True``
            on one side only, which has to change it: otherwise nothing was seen of the pair, as of an expert that no
            token reaches. ``None`` where the pair's shapes do not allow for it.
        hidden: The block's input.
    """
    plain = run(None, False)
    assert plain is not None
    allowed = TOLERANCE * float((plain - hidden).square().mean().sqrt())

    def equal(out: Tensor | None) -> bool:
        return out is not None and float((out - plain).square().mean().sqrt()) <= allowed

    proven: list[Equivalence] = []
    for guess in guesses:
        for pair in _variants(guess):
            if equal(run(pair, False)):
                if not equal(run(pair, True)):
                    proven.append(pair)
                break
    return tuple(proven)


def _variants(pair: Equivalence) -> Iterator[Equivalence]:
    yield pair
    if isinstance(pair, NormLinears):
        yield replace(pair, offset=1.0)
    if isinstance(pair, QueryKey):
        yield replace(pair, rotary=True)


def head_counts(block: nn.Module, names: Mapping[str, int]) -> tuple[int, int]:
    """Query heads and key-value heads of the block's attention, told by the rows of its projections.

    Args:
        block: The block.
        names: Rows of each linear by its name.
    """
    for name, rows in names.items():
        if name.rpartition(".")[2] in QUERY:
            attention = block.get_submodule(name.rpartition(".")[0])
            size = getattr(attention, "head_dim", None)
            keys = names.get(_sibling(block, name, KEY) or "")
            if isinstance(size, int) and size and keys is not None and not rows % size and not keys % size:
                return rows // size, keys // size
    return 1, 1
