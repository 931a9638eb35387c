"""The model's code without its weights: blocks that run on parameters handed to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from swquant.checkpoint.names import Mixed, Names, Piece, analyse
from swquant.errors import SwquantError
from swquant.model.empty import as_described, build_empty
from swquant.model.flow import Flow, is_container, trace
from swquant.model.unfused import FusedExperts, fused_experts, linear_of, unfused
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class Call:
    """What the model calls a block with beside the hidden states, which come first or under a name.

    Attributes:
        args: Further positional arguments.
        kwargs: Keyword arguments.
        name: The keyword under which the hidden states are handed over; ``None`` if they come first.
        inner: Shape of a token's hidden states where it is not ``(dim,)``, as for several residual streams; everywhere
            else they are flat.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str | None = None
    inner: tuple[int, ...] = ()

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, for ``hidden [samples, tokens, dim]``."""
        if len(self.inner) > 1:
            hidden = hidden.view(*hidden.shape[:2], *self.inner)
        if self.name is not None:
            return self.args, {**self.kwargs, self.name: hidden}
        return (hidden, *self.args), dict(self.kwargs)


@dataclass(frozen=True)
class Block:
    """One decoder block: code, and the prefix of its parameters' names in the model."""

    prefix: str
    module: nn.Module

    def names(self) -> tuple[str, ...]:
        """Its parameters and the buffers that are saved with them, by their names inside the block."""
        return tuple(self.module.state_dict())

    def forward(self, params: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """The block's output for ``hidden [samples, tokens, dim]``; a pure function of its arguments."""
        args, kwargs = call.with_hidden(hidden)
        # What a block puts into a list or mapping, such as its keys and values, is not kept from call to call.
        kwargs = {name: copy.copy(value) if is_container(value) else value for name, value in kwargs.items()}
        out = functional_call(self.module, dict(params), args, kwargs)
        out = out[0] if isinstance(out, tuple | list) else out
        return out.flatten(2) if out.dim() > 3 else out


class Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden states on.

    Attributes:
        calls: What it was called with since it was cleared.
        hidden: The hidden states of the last call.
        given: Hidden states to pass on instead.
        extras: What it returned beside the hidden states where the block returns a tuple.
        flow: How its block runs; ``None`` before the first call.
    """

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "replaced", block)
        self.index = index
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None
        self.given: Tensor | None = None
        self.extras: tuple[Tensor, ...] = ()
        self.flow: Flow | None = None

    def __getattr__(self, name: str) -> Any:
        """What the model asks its blocks for, such as ``attention_type``, is the block's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note, and pass on in the form in which the block returns."""
        name = None if args else next(iter(kwargs))
        hidden: Tensor = args[0] if name is None else kwargs[name]
        others = {key: value for key, value in kwargs.items() if key != name}
        call = Call(args[1:], others, name, tuple(hidden.shape[2:]))
        if self.flow is None:
            self.flow = trace(self.__dict__["replaced"], *call.with_hidden(hidden))
        self.calls.append(call)
        self.hidden = hidden
        out = hidden if self.given is None else self.given.view(*self.given.shape[:2], *hidden.shape[2:])
        if self.flow.outputs is None:
            return out
        self.extras = tuple(torch.zeros(()) for _ in range(self.flow.outputs - 1))
        return (out, *self.extras)


@dataclass(frozen=True)
class Skeleton:
    """A model's modules, their parameters on the ``meta`` device.

    Attributes:
        model: The whole model, :class:`Recorder` in the place of its blocks.
        names: Its tensors in memory and on disk.
        blocks: The blocks.
        path: Name of the list of blocks.
        embedding: Name of the token embedding's module.
        head: Name of the output projection's module.
        tied: Whether the head is the token embedding.
        outside: Parameters and saved buffers of the language model outside of its blocks, but for the embedding's
            and the head's weights.
        ends: Grids on which an output has the embedding's and the head's weights, by name; see
            :func:`swquant.model.ends.grids_of_ends`.
    """

    model: Any
    names: Names
    blocks: tuple[Block, ...]
    path: str
    embedding: str
    head: str
    tied: bool
    outside: tuple[str, ...]
    ends: Mapping[str, QuantSpec] = field(default_factory=dict[str, QuantSpec])

    def block(self, index: int) -> Block:
        """One block."""
        return self.blocks[index]

    @property
    def recorders(self) -> tuple[Recorder, ...]:
        """What stands in the place of the blocks."""
        return tuple(self.model.get_submodule(self.path))

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head_weight(self) -> str:
        """Name of the output projection's weight; of the embedding's where they are one."""
        return f"{self.embedding if self.tied else self.head}.weight"

    @property
    def norm_biases(self) -> bool:
        """Whether the norms before the blocks' linears have biases; blocks' flows are known."""
        for block, recorder in zip(self.blocks, self.recorders, strict=True):
            norms = set(recorder.flow.norms.values()) if recorder.flow is not None else ()
            if any(f"{norm}.bias" in block.names() for norm in norms):
                return True
        return False

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes at most; ``None`` where it sets no limit."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def build_model(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: Path, dtype: torch.dtype
) -> tuple[Any, Names]:
    """transformers' model on ``meta``, experts and transposed layers taken apart, and where its tensors lie.

    Args:
        values: The content of its ``config.json``.
        shapes: Of the tensors on disk, by name.
        place: Where they are, for messages.
        dtype: Of its parameters.

    Raises:
        SwquantError: The configuration does not describe a model that the installed transformers knows.
    """
    with as_described(place):
        model = build_empty(values, dtype, place, shapes)
        names = _unfuse(model, *analyse(model, shapes), shapes)
    return model, _with_ties(model, names)


def tie(model: Any) -> None:
    """Tie the weights of a model that has been filled, as transformers does while it loads.

    What is still on ``meta`` is missing in the file. A head that the configuration calls the embedding, and that is
    there and differs, stays one of its own.
    """
    missing = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_meta}
    model.tie_weights(missing_keys=missing)
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(module, "weight", None) for module in ends)
    if head is not embedding:
        model.config.tie_word_embeddings = False


def build_skeleton(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: Path) -> Skeleton:
    """The skeleton of a model; no weight is read.

    Args:
        values: The content of its ``config.json``; ``tie_word_embeddings`` is taken as it stands there.
        shapes: Of the tensors on disk, by name.
        place: Where they are, for messages.

    Raises:
        SwquantError: The architecture is unknown or cannot be run block by block, or a parameter is missing on disk or
            has another shape there.
    """
    model, names = build_model(values, shapes, place, torch.float32)
    path, modules = _find_blocks(model, place)
    embedding, head = _ends(model, place)
    tied = f"{head}.weight" in model.all_tied_weights_keys and _one(names, f"{head}.weight", f"{embedding}.weight")
    outside = _outside(model, path, {f"{embedding}.weight", f"{head}.weight"})
    inside = [f"{path}.{name}" for name in model.get_submodule(path).state_dict()]
    ends = [f"{embedding}.weight", *([] if tied else [f"{head}.weight"])]
    _check_tensors(model, names, [*inside, *outside, *ends], shapes, place)
    _refuse_shared(modules, place)
    model.set_submodule(path, nn.ModuleList(Recorder(module, index) for index, module in enumerate(modules)))
    blocks = tuple(Block(f"{path}.{index}", module) for index, module in enumerate(modules))
    return Skeleton(model, names, blocks, path, embedding, head, tied, tuple(outside))


def _one(names: Names, one: str, other: str) -> bool:
    """Whether two names in memory are one tensor on disk."""
    return one in names.pieces and names.pieces[one] == names.pieces.get(other)


def _find_blocks(model: Any, place: Path) -> tuple[str, list[nn.Module]]:
    """The list of the language model's blocks: of the lists of modules in its decoder, the one with most weights.

    Lists with a module per layer come first, then those that lie least deep, as a tower of vision or audio in the
    decoder does not; lists within another's modules do not count.
    """
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if layers == 0:
        raise SwquantError(f"{place}: num_hidden_layers is 0, so there is nothing to quantize")
    decoder = model.get_decoder()
    start = next((name for name, module in model.named_modules() if module is decoder), "")
    for root, place_of in ((decoder, start), (model, "")):
        found: list[tuple[bool, int, int, str, list[nn.Module]]] = []
        for name, module in root.named_modules():
            full = ".".join(part for part in (place_of, name) if part)
            if not isinstance(module, nn.ModuleList) or any(full.startswith(f"{outer[3]}.") for outer in found):
                continue
            if all(any(True for _ in one.children()) for one in module) and len(module):
                size = sum(value.numel() for value in module.parameters())
                found.append((len(module) == layers, -full.count("."), size, full, list(module)))
        if found:
            *_, path, modules = max(found, key=lambda one: one[:3])
            return path, modules
    raise SwquantError(
        f"{place}: {type(model).__name__} has no list of blocks in its decoder, so it cannot be quantized block by "
        "block"
    )


def _ends(model: Any, place: Path) -> tuple[str, str]:
    """Names of the token embedding's and the output projection's modules."""
    wanted = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for module, what in zip(wanted, ("token embedding", "output projection"), strict=True):
        if id(module) not in names or not isinstance(getattr(module, "weight", None), Tensor):
            raise SwquantError(f"{place}: {type(model).__name__} has no {what}, so its predictions cannot be compared")
    return names[id(wanted[0])], names[id(wanted[1])]


def _outside(model: Any, path: str, ends: set[str]) -> list[str]:
    """What the language model has outside of its blocks.

    Modules beside those that hold the blocks are left out if they are towers (of vision, of audio): if they have a list
    of blocks of their own. Text alone never reaches them.
    """
    parts = path.split(".")
    chain = [".".join(parts[:depth]) for depth in range(len(parts))]
    towers = [
        child
        for above in chain
        for name, module in model.get_submodule(above).named_children()
        if (child := ".".join(part for part in (above, name) if part)) not in (*chain, path) and _is_tower(module)
    ]
    return [
        name
        for name in model.state_dict()
        if name not in ends and not name.startswith(tuple(f"{one}." for one in (path, *towers)))
    ]


def _is_tower(module: nn.Module) -> bool:
    lists = (one for one in module.modules() if isinstance(one, nn.ModuleList))
    return any(any(True for _ in block.children()) for one in lists for block in one)


def _with_ties(model: Any, names: Names) -> Names:
    """A tensor that is missing on disk and tied to one that is there lies where that one does, whichever it is."""
    pieces = dict(names.pieces)
    for name, source in model.all_tied_weights_keys.items():
        for missing, there in ((name, source), (source, name)):
            if missing not in pieces and there in pieces:
                pieces[missing] = pieces[there]
    return replace(names, pieces=pieces)


def _check_tensors(
    model: Any, names: Names, wanted: list[str], shapes: Mapping[str, tuple[int, ...]], place: Path
) -> None:
    state = model.state_dict()
    for name in wanted:
        mixture = names.mixture(name)
        if name in names.pieces:
            piece = names.pieces[name]
            key, found = piece.key, piece.shape_of(shapes[piece.key])
        elif mixture is not None:
            key, found = mixture.keys[0], mixture.shape_of(name)
        else:
            if any(key.startswith(f"{name}[") for key in names.pieces):
                raise SwquantError(
                    f"{name} of {type(model).__name__} holds experts in a way that swquant does not take apart yet"
                )
            raise SwquantError(f"{place} has no tensor {name!r}, which its config.json calls for")
        if tuple(state[name].shape) != found:
            raise SwquantError(
                f"{key} in {place} has the shape {list(found)}, config.json calls for {list(state[name].shape)}"
            )


def _refuse_shared(modules: list[nn.Module], place: Path) -> None:
    owners: dict[int, int] = {}
    for index, module in enumerate(modules):
        for name, value in module.named_parameters(remove_duplicate=False):
            if owners.setdefault(id(value), index) != index:
                raise SwquantError(
                    f"{place}: blocks {owners[id(value)]} and {index} share the weight {name}, which swquant does not "
                    "quantize yet"
                )


def _unfuse(
    model: nn.Module,
    pieces: dict[str, Piece],
    mixed: list[Mixed],
    carried: list[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Names:
    """Take fused experts and transposed layers apart in ``model``; returns where their linears lie."""
    for path, module in list(model.named_modules()):
        facts = fused_experts(module)
        if facts is not None:
            pieces, mixed, split = _unfused_names(path, facts, module, pieces, mixed, shapes)
            model.set_submodule(path, unfused(module, facts, split))
        elif isinstance(module, Conv1D):
            name = f"{path}.weight"
            if name in pieces:
                pieces[name] = replace(pieces[name], transposed=True)
            model.set_submodule(path, linear_of(module))
    return Names(pieces, tuple(mixed), tuple(carried))


def _unfused_names(
    path: str,
    facts: FusedExperts,
    module: nn.Module,
    pieces: dict[str, Piece],
    mixed: list[Mixed],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Piece], list[Mixed], bool]:
    """Names of each expert's linears instead of those of the fused parameters."""
    out, mixtures = dict(pieces), list(mixed)
    split = f"{path}.{facts.inputs}[0]:gate_proj" in pieces
    for fused, value in module.named_parameters(recurse=False):
        whole, turned = f"{path}.{fused}", facts.transposed and value.dim() == 3
        part = "bias" if fused.endswith("_bias") else "weight"
        own = fused.removesuffix("_bias")
        stored = out.pop(whole, None)
        if stored is not None and shapes[stored.key][:1] != (facts.count,):
            raise SwquantError(f"{stored.key} has the shape {list(shapes[stored.key])}, expected {facts.count} experts")
        for index in range(facts.count):
            for projection in ("gate_proj", "up_proj") if split and own == facts.inputs else (own,):
                label = f"{whole}[{index}]" + (f":{projection}" if projection != own else "")
                name = f"{path}.{index}.{projection}.{part}"
                if stored is not None:
                    out[name] = Piece(stored.key, index, turned)
                elif label in out:
                    out[name] = replace(out.pop(label), transposed=turned)
        mixtures = [
            replace(rule, stacked={**rule.stacked, **_slices(path, whole, own, part, facts.count, turned)})
            if whole in rule.targets
            else rule
            for rule in mixtures
        ]
    return out, mixtures, split


def _slices(path: str, whole: str, own: str, part: str, count: int, turned: bool) -> dict[str, tuple[str, Piece]]:
    """Each expert's slice of a parameter that a rule makes."""
    return {f"{path}.{index}.{own}.{part}": (whole, Piece(whole, index, turned)) for index in range(count)}
