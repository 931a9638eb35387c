"""What the model's own code does before its first block and after its last one, and what it calls each block with.

A block's arguments (masks, rotary tables of its kind of layer, per-layer inputs, token ids) are made by the model's
own code for each batch: one forward pass of the whole model with recorders in the place of its blocks. So is what
follows the last block: norm, soft-capping, multipliers, head.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from swquant.checkpoint.source import Tensors
from swquant.errors import SwquantError, reason_of
from swquant.model.ends import as_output
from swquant.model.skeleton import Call, Recorder, Skeleton
from swquant.quant.deferred import in_float


class Rows(nn.Module):
    """A token embedding of which some rows are in memory; what the model's own module does with a row is done by it.

    Args:
        module: The model's own module, its weight on ``meta``.
        used: Tokens whose rows there are, ascending.
        rows: ``[used, dim]``.
    """

    def __init__(self, module: nn.Module, used: Tensor, rows: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)
        self.used, self.rows = used, rows
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it says which row gets no gradient, and may lie beyond the rows there are

    def __getattr__(self, name: str) -> Any:
        """Whatever the model asks of its embedding, such as ``embedding_dim``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _Weight(self) if name == "weight" else getattr(self.__dict__["module"], name)

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The embedding of ``ids``, all of which have rows."""
        places = torch.searchsorted(self.used, ids.clamp(max=int(self.used[-1])))
        return functional_call(self.__dict__["module"], {"weight": self.rows}, (places, *args), kwargs)


class _Weight:
    """The weight of :class:`Rows` for code that takes a row of it by its token; zeros where that row is not there."""

    def __init__(self, table: Rows) -> None:
        self.table = table
        self.dtype, self.device = table.rows.dtype, table.rows.device

    def __getitem__(self, index: Any) -> Tensor:
        token = index[0] if isinstance(index, tuple) else index
        place = int(torch.searchsorted(self.table.used, torch.tensor(int(token), device=self.device)))
        there = place < len(self.table.used) and int(self.table.used[place]) == int(token)
        return self.table.rows[place] if there else torch.zeros_like(self.table.rows[0])


def vocabulary_tables(skeleton: Skeleton) -> tuple[str, ...]:
    """The embedding, and other tables outside of the blocks that are looked up by token (per-layer inputs)."""
    size = skeleton.model.get_submodule(skeleton.embedding).weight.shape[0]
    found = [skeleton.embedding]
    for name, module in skeleton.model.named_modules():
        own = f"{name}.weight" in skeleton.outside and isinstance(module, nn.Embedding) and "pos" not in name
        if own and 0.9 * size <= module.weight.shape[0] <= 1.1 * size:
            found.append(name)
    return tuple(found)


@dataclass
class Front:
    """The model without its blocks.

    Attributes:
        skeleton: The model's code.
        params: What lies outside of the blocks, float32, without the tables that are looked up by token.
        tables: Names of those tables.
        device: Where to compute.
    """

    skeleton: Skeleton
    params: Mapping[str, Tensor]
    tables: tuple[str, ...]
    device: torch.device

    @staticmethod
    def load(skeleton: Skeleton, checkpoint: Tensors, device: torch.device) -> Front:
        """Read what lies outside of the blocks."""
        tables = vocabulary_tables(skeleton)
        looked_up = {f"{name}.weight" for name in tables}
        names = [name for name in skeleton.outside if name not in looked_up]
        return Front(skeleton, {name: _wide(checkpoint.read(name)).to(device) for name in names}, tables, device)

    @staticmethod
    def empty(skeleton: Skeleton) -> Front:
        """Random numbers in the place of everything that is on disk."""
        tables = vocabulary_tables(skeleton)
        looked_up = {f"{name}.weight" for name in tables}
        state = skeleton.model.state_dict()
        rng = torch.Generator().manual_seed(0)
        params = {name: _made_up(state[name], rng) for name in skeleton.outside if name not in looked_up}
        return Front(skeleton, params, tables, torch.device("cpu"))

    @contextmanager
    def looking_up(self, used: Tensor, rows: Mapping[str, Tensor]) -> Generator[None]:
        """With ``rows`` of the tokens ``used`` in the place of each table; zeros where it has none."""
        model = self.skeleton.model
        before = {name: model.get_submodule(name) for name in self.tables}
        try:
            for name, module in before.items():
                zeros = torch.zeros(1, module.weight.shape[1], device=self.device)
                one = torch.zeros(1, dtype=torch.long, device=self.device)
                table = Rows(module, used, rows[name]) if name in rows else Rows(module, one, zeros)
                model.set_submodule(name, table)
            yield
        finally:
            for name, module in before.items():
                model.set_submodule(name, module)

    def run(
        self,
        ids: Tensor,
        extra: Mapping[str, Tensor] | None = None,
        given: Tensor | None = None,
        out_of: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """One forward pass of the model's own code; the recorders then have noted their calls.

        Args:
            ids: ``int64 [samples, tokens]``.
            extra: More of what lies outside of the blocks.
            given: Hidden states that come out of the last block.
            out_of: Hidden states that come out of other blocks, by their numbers.

        Raises:
            SwquantError: The model's code does not run without its blocks, or calls them in another order.
        """
        recorders = self.skeleton.recorders
        for recorder in recorders:
            recorder.calls, recorder.hidden, recorder.given = [], None, (out_of or {}).get(recorder.index)
        if given is not None:
            recorders[-1].given = given
        params = {**self.params, **(extra or {})}
        try:
            # A wrapper's code asks for the device of its first parameter, which may be an encoder's and without values.
            with patch.object(PreTrainedModel, "device", self.device):
                out = functional_call(
                    self.skeleton.model, params, kwargs={"input_ids": ids, "use_cache": False}, strict=False
                )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            NotImplementedError,
            IndexError,
        ) as error:
            if "out of memory" in str(error) or "not enough memory" in str(error):
                raise
            name = type(self.skeleton.model).__name__
            raise SwquantError(
                f"{name} cannot be quantized: its code wants more of its blocks than hidden states, or values where "
                f"only shapes are known yet ({reason_of(error)})"
            ) from error
        finally:
            for recorder in recorders:
                recorder.given = None
        _require_once(recorders, type(self.skeleton.model).__name__)
        return out


def _require_once(recorders: Iterable[Recorder], name: str) -> None:
    for recorder in recorders:
        if len(recorder.calls) != 1:
            raise SwquantError(
                f"{name} runs block {recorder.index} {len(recorder.calls)} times for one prediction, and swquant "
                "quantizes models that run each block once"
            )


def probe(skeleton: Skeleton, tokens: int = 8) -> int:
    """Run the model once without its blocks and without weights, so that recorders know each block's flow.

    Returns:
        Channels of the hidden states.

    Raises:
        SwquantError: The model's code does not run so, or blocks hand on more than hidden states.
    """
    _require_plain(Front.empty(skeleton), tokens)
    hidden = skeleton.recorders[0].hidden
    assert hidden is not None
    return hidden.shape[2:].numel()


def _made_up(like: Tensor, rng: torch.Generator) -> Tensor:
    if not like.dtype.is_floating_point:
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.randn(like.shape, generator=rng, dtype=torch.float32).to(like.dtype)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value


@dataclass
class Calls:
    """What each block is called with, made for each batch by the model's own code.

    Where no argument depends on the tokens, batches of one size share theirs.

    Attributes:
        front: The model without its blocks.
        tokens: All samples, ``int64 [samples, tokens]``.
        rows: Of each table that arguments depend on, the rows of the tokens ``used``; empty where none does.
        used: Tokens that occur, ascending.
    """

    front: Front
    tokens: Tensor
    used: Tensor
    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    _made: dict[tuple[int, int], Call] = field(default_factory=dict[tuple[int, int], Call], repr=False)

    @staticmethod
    def prepare(front: Front, checkpoint: Tensors, tokens: Tensor) -> Calls:
        """Find out whether arguments depend on the tokens, and read rows of the embedding if they do."""
        used = tokens.unique().to(front.device)
        calls = Calls(front, tokens, used)
        rows = _rows_of(front, checkpoint, used, front.tables)
        dependent = replace(calls, rows=rows, _made={})
        return dependent if _depends(dependent) else calls

    def of(self, index: int, samples: Tensor) -> Call:
        """What block ``index`` is called with for these samples, on the front's device."""
        if self.rows:
            return self._all(self.tokens[samples])[index]
        key = (index, len(samples))
        if key not in self._made:
            for other in [other for other in self._made if other[0] != index]:
                del self._made[other]  # blocks come one after the other; a mask may be large
            self._made[key] = self._all(torch.zeros(len(samples), self.tokens.shape[1], dtype=torch.long))[index]
        return self._made[key]

    def shortened(self, length: int) -> Calls:
        """The same for the first ``length`` tokens of each sample."""
        return replace(self, tokens=self.tokens[:, :length], _made={})

    def copied(self) -> Calls:
        """The same with copies of what has been made, which a count of memory then sees being made."""
        made = {key: _cloned(call) for key, call in self._made.items()}
        return replace(self, _made=made)

    def _all(self, ids: Tensor) -> list[Call]:
        front = self.front
        with torch.no_grad(), front.looking_up(self.used, self.rows):
            front.run(ids.to(front.device))
        return [recorder.calls[0] for recorder in front.skeleton.recorders]


def _rows_of(front: Front, checkpoint: Tensors, used: Tensor, tables: Iterable[str]) -> dict[str, Tensor]:
    return {name: checkpoint.rows(f"{name}.weight", used.cpu()).float().to(front.device) for name in tables}


def _depends(calls: Calls) -> bool:
    """Whether any argument of the first sample differs from any of another's, or has other tokens."""
    first = calls.tokens[:1]
    other = calls.used[torch.arange(first.shape[1]) % len(calls.used)].cpu()[None]
    other = other.roll(1, 1) if torch.equal(other, first) else other
    pairs = zip(calls._all(first), calls._all(other), strict=True)  # pyright: ignore[reportPrivateUsage]
    return any(_differ(one, two) for one, two in pairs)


def _differ(one: Call, other: Call) -> bool:
    """Whether two calls of a block have other tensors among their arguments."""
    mine, theirs = _leaves(one), _leaves(other)
    return len(mine) != len(theirs) or any(
        isinstance(value, Tensor)
        and not (isinstance(same, Tensor) and value.shape == same.shape and torch.equal(value, same))
        for value, same in zip(mine, theirs, strict=True)
    )


def _cloned(call: Call) -> Call:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def _leaves(call: Call) -> list[Any]:
    return pytree.tree_leaves((call.args, dict(call.kwargs)))


def _require_plain(front: Front, tokens: int) -> None:
    """Refuse a model of which more goes from block to block than hidden states ``[samples, tokens, dim]``.

    Each recorder puts out random hidden states, which the next block has to be given as they are. Nothing else that a
    block is called with may follow from them, from what a block returns beside them, or from what it puts into a
    mapping that it was given; and what reaches the head must follow from the last block's output alone.
    """
    name, recorders = type(front.skeleton.model).__name__, front.skeleton.recorders
    ids = torch.zeros(2, tokens, dtype=torch.long, device=front.device)
    with torch.no_grad(), front.looking_up(ids[0, :1], {}):
        front.run(ids)
        shape = recorders[0].hidden.shape if isinstance(recorders[0].hidden, Tensor) else ()
        if len(shape) < 3 or shape[:2] != (2, tokens):
            raise SwquantError(
                f"the blocks of {name} hand on {list(shape)} instead of hidden states [samples, tokens, dim], which "
                "swquant does not support yet"
            )
        plain = [recorder.calls[0] for recorder in recorders]
        rng = torch.Generator().manual_seed(0)
        drawn, other = (
            {recorder.index: torch.randn(shape, generator=rng).to(front.device) for recorder in recorders}
            for _ in range(2)
        )
        last = {recorders[-1].index: drawn[recorders[-1].index]}
    reached = [_head_input(front, ids, {**out, **last}, seed) for seed, out in enumerate((other, drawn))]
    with torch.no_grad(), front.looking_up(ids[0, :1], {}):
        front.run(ids, out_of=drawn)
    if not torch.equal(*reached):
        raise SwquantError(
            f"{name} predicts from more than its last block's output, which swquant does not support yet"
        )
    extras = {id(extra) for recorder in recorders for extra in recorder.extras}
    # What nobody looks up again, such as keys and values kept for a model that drafts, is of no account.
    read = any(recorder.flow is not None and recorder.flow.reads for recorder in recorders)
    for recorder, before in zip(recorders, plain, strict=True):
        given, call = drawn.get(recorder.index - 1), recorder.calls[0]
        same = given is None or (isinstance(recorder.hidden, Tensor) and torch.equal(recorder.hidden, given))
        used = any(id(leaf) in extras for leaf in _leaves(call)) or _differ(before, call)
        if not same or used or (read and recorder.flow is not None and recorder.flow.writes):
            what = "other hidden states than the block before it puts out" if not same else "more than hidden states"
            raise SwquantError(
                f"block {recorder.index} of {name} takes or hands on {what}, which swquant does not support yet"
            )


@torch.no_grad()
def _head_input(front: Front, ids: Tensor, out_of: Mapping[int, Tensor], seed: int) -> Tensor:
    """What reaches the head, given the outputs of all blocks and a random embedding."""
    seen: list[Tensor] = []
    model, rng = front.skeleton.model, torch.Generator().manual_seed(seed)
    rows = {
        name: torch.randn(1, model.get_submodule(name).weight.shape[1], generator=rng).to(front.device)
        for name in front.tables
    }

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    hook = model.get_submodule(front.skeleton.head).register_forward_pre_hook(see)
    try:
        with front.looking_up(ids[0, :1], rows):
            front.run(ids, out_of=out_of)
    finally:
        hook.remove()
    return seen[0].nan_to_num() if seen else torch.zeros(0)


def capture(front: Front, checkpoint: Tensors, tokens: Tensor, *, stored: bool = False) -> Iterator[Tensor]:
    """Hidden states ``[tokens, dim]`` before the first block, sample by sample.

    Only those rows of the embedding are read whose tokens occur.

    Args:
        front: The model without its blocks.
        checkpoint: Its weights.
        tokens: ``int64 [samples, tokens]``.
        stored: Those that the embedding gives as an output has it, in its dtype there or on its grid.
    """
    used = tokens.unique().to(front.device)
    rows = _rows_of(front, checkpoint, used, front.tables)
    if stored:
        ends, dtypes = front.skeleton.ends, {name: checkpoint.tensors[f"{name}.weight"].dtype for name in rows}
        rows = {
            name: as_output(value, ends.get(f"{name}.weight"), dtypes[name]).float() for name, value in rows.items()
        }
    for sample in tokens:
        with torch.no_grad(), front.looking_up(used, rows):
            front.run(sample[None].to(front.device))
        hidden = front.skeleton.recorders[0].hidden
        assert hidden is not None
        yield hidden[0].flatten(1)


@dataclass(frozen=True)
class Tail:
    """What follows the last block, run as the model's own code.

    Attributes:
        front: The model without its blocks.
        head: The head's weight by its name in the model, in the dtype that it has on disk.
    """

    front: Front
    head: Mapping[str, Tensor]

    @staticmethod
    def load(front: Front, checkpoint: Tensors, *, stored: bool = False) -> Tail:
        """Read the head; ``stored`` is the one that an output holds.

        It differs where a rotation is merged in, or the head is quantized.
        """
        skeleton, name = front.skeleton, front.skeleton.head_weight
        weight = checkpoint.read(name)
        if stored:
            weight = as_output(weight, skeleton.ends.get(name), checkpoint.tensors[name].dtype)
        return Tail(front, {f"{skeleton.head}.weight": weight.to(front.device)})

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary."""
        return next(iter(self.head.values())).shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """``float32 [tokens, vocabulary]`` of hidden states ``[tokens, dim]``, differentiable in them."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self.front.looking_up(ids[0, :1], {}):
            out = self.front.run(ids, in_float(self.head), hidden[None])
        return out.logits[0].float()
