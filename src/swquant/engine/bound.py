"""A block of the model with all that it is called with: a function of parameters, hidden states and samples alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from swquant.distributed.ranks import Alone, Ranks, own_rows
from swquant.engine.activations import Activations, Replay, Room, same_values
from swquant.engine.hidden_states import batches, on_device
from swquant.families.base import Equivalence, QueryKey
from swquant.learnables.base import BlockFacts, ChannelRange
from swquant.learnables.moves import move, source_of
from swquant.model.calls import Calls
from swquant.model.equivalences import candidates, head_counts, prove
from swquant.model.layout import Layout
from swquant.model.skeleton import Block
from swquant.quant.deferred import in_float
from swquant.quant.draft import Draft
from swquant.quant.finite import is_finite
from swquant.seeds import generator

PROOF_TOKENS = 64
"""Tokens of the sample on which equivalences are proven."""


class _AllSeen(BaseException):
    """Every watched linear has been called; no model's own ``except Exception`` takes it for a failure."""


@dataclass
class Drift:
    """How far the quantized model's hidden states are off: ``sum (q - r)**2 / sum r**2`` over all tokens.

    Attributes:
        reference: The original's, ``[samples, tokens, dim]``.
        error: The numerator, of the samples that this rank has added.
        energy: The denominator.
    """

    reference: Tensor
    error: float = 0.0
    energy: float = 0.0

    def add(self, batch: slice, hidden: Tensor) -> None:
        """Count the samples ``batch``: a token's sum is in float32, that of tokens in float64."""
        original = self.reference[batch]
        self.error += float((hidden - original).square_().sum(-1).double().sum())
        self.energy += float(original.square().sum(-1).double().sum())

    def relative(self, ranks: Ranks) -> float:
        """Of all ranks' samples."""
        sums = torch.tensor([self.error, self.energy], dtype=torch.float64)
        ranks.sum([sums])
        error, energy = sums.tolist()
        return error / energy if energy else 0.0


@dataclass(frozen=True)
class _Stream:
    """One model's way through the block.

    Attributes:
        source: Hidden states, ``[samples, tokens, dim]``.
        params: The block's parameters.
        visit: Called with a linear's name, its input ``[tokens, in]``, and how many tokens the batch has.
        known: Whether a batch need not go through the block.
        settled: Linears whose outputs are kept, and taken where they are.
    """

    source: Tensor
    params: Mapping[str, Tensor]
    visit: Callable[[str, Tensor, int], None]
    known: Callable[[slice], bool] = lambda batch: False
    settled: Sequence[str] = ()


@dataclass(frozen=True)
class BoundBlock:
    """A block bound to its place in the model.

    Attributes:
        index: Which block.
        block: Its code.
        calls: What it is called with, by samples.
        layout: What is quantized in it.
        device: Where to compute.
        ranks: The processes; each runs samples of its own.
        room: Bytes that may be taken on the device for what only saves time.
    """

    index: int
    block: Block
    calls: Calls
    layout: Layout
    device: torch.device
    ranks: Ranks
    room: Room = field(default_factory=Room)

    @cached_property
    def originals(self) -> Activations:
        """What linears read in the original model: kept by its pass, let go by :meth:`watch_both`."""
        return Activations(self.room)

    @cached_property
    def outputs(self) -> Activations:
        """What linears put out that are quantized for good: kept by :meth:`watch_both`."""
        return Activations(self.room)

    def forward(self, params: Mapping[str, Tensor], hidden: Tensor, samples: Tensor) -> Tensor:
        """The block's output ``[samples, tokens, dim]``."""
        return self.block.forward(params, hidden, self.calls.of(self.index, samples))

    @torch.no_grad()
    def advance(
        self,
        params: Mapping[str, Tensor],
        source: Tensor,
        destination: Tensor,
        samples: Tensor | None = None,
        drift: Drift | None = None,
        *,
        keeps: bool = False,
        replays: bool = False,
    ) -> bool:
        """Write what the block makes of this rank's part of ``source`` to ``destination``.

        Args:
            params: The block's parameters.
            source: Hidden states ``[samples, tokens, dim]``.
            destination: Of the same shape.
            samples: Which samples they are; ``None`` is all from the first on.
            drift: Adds up how far the block's outputs are from the original's.
            keeps: What linears read is kept for :meth:`watch_both`; the parameters are the original model's.
            replays: ``source`` begins with what :meth:`watch_both` was given, and what linears put out there is taken
                where they have the same weights.

        Returns:
            Whether all is finite.
        """
        floats, finite = in_float(params), True
        known = torch.arange(len(source)) if samples is None else samples
        batch = slice(0, 0)

        def keep(linear: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.originals.put(linear, batch, arguments[0].flatten(0, -2))

        if keeps:
            self.originals.start(params)
        sets = self.layout.inputs(self.index) if keeps else ()
        kept = [linears[0] for linears in sets if self._once(linears[:1])]
        same = self._as_they_were(params) if replays else ()
        with self._hooked(kept, keep), Replay(self.outputs, self.block.module, same) as replay:
            for batch, hidden in on_device(source, own_batches(self.ranks, source), self.device):
                replay.batch = batch
                out = self.forward(floats, hidden, known[batch]).cpu()
                finite = finite and is_finite(out)
                destination[batch] = out
                if drift is not None:
                    drift.add(batch, out)
        return finite

    def forget(self) -> None:
        """Let go of what was kept."""
        self.originals.start({})
        self.outputs.start({})

    def _as_they_were(self, params: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The linears whose outputs are kept, if they and what is not quantized have the same values in ``params``."""
        linears = tuple(self.outputs.linears)
        if not linears:
            return ()
        others = self.layout.grids(self.index).keys() - {f"{linear}.weight" for linear in linears}
        return linears if same_values(self.outputs.params, params, [*(params.keys() - others)]) else ()

    def _once(self, linears: Sequence[str]) -> bool:
        """Whether each batch is given to the linears once."""
        return set(linears) <= self.layout.flows[self.index].once

    @contextmanager
    def _hooked(self, linears: Sequence[str], hook: Callable[..., None]) -> Generator[None]:
        """Call ``hook(linear, module, arguments)`` before each of the named linears."""
        with ExitStack() as hooks:
            for linear in linears:
                module = self.block.module.get_submodule(linear)
                hooks.callback(module.register_forward_pre_hook(partial(hook, linear)).remove)
            yield

    @torch.no_grad()
    def watch(
        self,
        source: Tensor,
        params: Mapping[str, Tensor],
        linears: Sequence[str],
        visit: Callable[[str, Tensor], None],
    ) -> None:
        """Run over this rank's samples of ``source`` and show ``visit`` each batch's inputs of the named linears.

        A batch goes no further through the block than to the last of them, before it multiplies.
        """
        self._show([_Stream(source, params, lambda linear, x, _: visit(linear, x))], linears)

    @torch.no_grad()
    def watch_both(
        self,
        source: Tensor,
        reference: Tensor,
        params: Mapping[str, Tensor],
        originals: Mapping[str, Tensor],
        linears: Sequence[str],
        visit: Callable[[str, Tensor, Tensor | None], None],
        settled: Sequence[str] = (),
    ) -> None:
        """As :meth:`watch`, with the same tokens' inputs in the original model beside each batch's.

        Those are what the block with ``originals`` makes of ``reference``. They are ``None`` for a linear that is not
        given every token once, such as an expert: which tokens reach it is another matter in each model.

        What :meth:`advance` kept of the original model is taken, and what the ``settled`` linears put out is kept from
        call to call: they, and whatever they depend on, are as they were. None settled is a new beginning.
        """
        held: dict[str, Tensor] = {}
        if not settled:
            self.outputs.start(params)
        self.outputs.params = params

        def hold(linear: str, x: Tensor, tokens: int) -> None:
            if self._once([linear]) and len(x) == tokens:
                held[linear] = x

        def show(linear: str, x: Tensor, tokens: int) -> None:
            visit(linear, x, held.pop(linear, None) if len(x) == tokens else None)

        def known(batch: slice) -> bool:
            found = self.originals.pop(linears, batch) if same else None
            held.update(found or {})
            return found is not None

        same = all(originals.get(name) is value for name, value in self.originals.params.items())
        before = _Stream(reference[: len(source)], originals, hold, known)
        after = _Stream(source, params, show, settled=[name for name in settled if self._once([name])])
        self._show([before, after], linears)

    def _show(self, streams: Sequence[_Stream], linears: Sequence[str]) -> None:
        """Run batch after batch through the block, of each of some streams in turn."""
        left, tokens = set[str](), 0
        visit = streams[0].visit
        ends = self._once(linears)

        def seen(linear: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            visit(linear, arguments[0].flatten(0, -2), tokens)
            left.discard(linear)
            if ends and not left:
                raise _AllSeen

        floats = [in_float(stream.params) for stream in streams]
        parts = [on_device(stream.source, own_batches(self.ranks, stream.source), self.device) for stream in streams]
        replays = [Replay(self.outputs, self.block.module, stream.settled) for stream in streams]
        with self._hooked(linears, seen):
            for together in zip(*parts, strict=True):
                for (batch, hidden), own, stream, replay in zip(together, floats, streams, replays, strict=True):
                    if stream.known(batch):
                        continue
                    left.update(linears)
                    visit, tokens, replay.batch = stream.visit, hidden.shape[0] * hidden.shape[1], batch
                    with suppress(_AllSeen), replay:
                        self.forward(own, hidden, torch.arange(batch.start, batch.stop))

    def input_ranges(
        self, params: Mapping[str, Tensor], source: Tensor, linears: Sequence[str]
    ) -> dict[str, ChannelRange]:
        """Channel ranges of the named linears' inputs over the samples of ``source``; zero where there are none."""
        ends = {
            linear: torch.full((2, params[f"{linear}.weight"].shape[1]), math.inf, device=self.device)
            for linear in linears
        }

        def note(linear: str, inputs: Tensor) -> None:
            if len(inputs):
                low, high = inputs.aminmax(dim=0)
                ends[linear] = torch.minimum(torch.stack((low, -high)), ends[linear])

        self.watch(source, params, linears, note)
        least = {linear: self.ranks.gather(end[None], self.ranks.size).amin(0) for linear, end in ends.items()}
        return {linear: ChannelRange(*_ends(found)) for linear, found in least.items()}

    def facts(self, params: Mapping[str, Tensor], inputs: Tensor, *, proven: bool = True) -> BlockFacts:
        """What methods may know of the block.

        Args:
            params: Its parameters.
            inputs: Hidden states of the calibration samples before it.
            proven: Run the block to prove its equivalences; otherwise they are guesses.
        """
        known = Equivalences(self, params, inputs)
        heads, key_value_heads = known.heads
        ranges = partial(self.input_ranges, params, inputs)
        found = (lambda: known.proven) if proven else (lambda: known.guesses)
        return BlockFacts(self.layout.inputs(self.index), found, heads, key_value_heads, ranges)


def _ends(found: Tensor) -> tuple[Tensor, Tensor]:
    low, high = found
    seen = low.isfinite()
    return torch.where(seen, low, 0.0), torch.where(seen, -high, 0.0)


def own_batches(ranks: Ranks, cache: Tensor) -> Iterator[slice]:
    """This rank's samples of cached hidden states, in ranges that go through a block at once."""
    own = own_rows(ranks, len(cache))
    for batch in batches(cache[own]):
        yield slice(own.start + batch.start, own.start + batch.stop)


class Equivalences:
    """The pairs of a block's modules between which scales can move."""

    def __init__(self, bound: BoundBlock, params: Mapping[str, Tensor], inputs: Tensor) -> None:
        self.bound, self.params, self.inputs = bound, params, inputs

    @cached_property
    def guesses(self) -> tuple[Equivalence, ...]:
        """What names and the flow suggest."""
        layout, index = self.bound.layout, self.bound.index
        quantized = [site.inner for site in layout.blocks[index] if site.spec is not None]
        return candidates(self.bound.block.module, layout.flows[index], quantized)

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        rows = {site.inner: site.shape[0] for site in self.bound.layout.blocks[self.bound.index]}
        return head_counts(self.bound.block.module, rows)

    @cached_property
    def proven(self) -> tuple[Equivalence, ...]:
        """The guesses that leave the block's output as it is; every rank proves them for itself, on one sample."""
        hidden = self.inputs[:1, :PROOF_TOKENS].to(self.bound.device)
        with torch.no_grad():
            return prove(self.guesses, partial(self._moved, hidden), hidden)

    def _moved(self, hidden: Tensor, pair: Equivalence | None, one_sided: bool) -> Tensor | None:
        """The block's output with random scales moved between a pair's modules, or put on its source alone."""
        params = in_float(self.params)
        if pair is not None:
            heads, key_value_heads = self.heads
            bare = BlockFacts((), tuple, heads, key_value_heads, lambda _: {})
            try:
                scales = {source_of(pair): self._scale(pair)}
                moved = dict(move(Draft(params, {}, {}), [pair], scales, {}, bare).params)
                source = source_of(pair)
                params = {
                    **params,
                    **{key: moved[key] for key in moved if key.startswith(f"{source}.") or not one_sided},
                }
            except (RuntimeError, KeyError):  # shapes or heads are not what the guess takes them for
                return None
        bound = replace(self.bound, ranks=Alone(), calls=self.bound.calls.shortened(hidden.shape[1]))
        try:
            return bound.forward(params, hidden, torch.zeros(1, dtype=torch.long))
        except RuntimeError:
            if pair is None:
                raise
            return None

    def _scale(self, pair: Equivalence) -> Tensor:
        """Factors between 1/2 and 2 for each channel that the pair may scale by itself."""
        rng = generator(0, "equivalence", source_of(pair))
        if isinstance(pair, QueryKey):
            key_value_heads = self.heads[1]
            rows = self.params[f"{pair.key}.weight"].shape[0] // key_value_heads
            shape: tuple[int, ...] = (key_value_heads, rows // 2 if pair.rotary else rows)
        else:
            shape = (self.params[f"{source_of(pair)}.weight"].shape[0],)
        return (2 * torch.rand(shape, generator=rng) - 1).exp2().to(self.bound.device)
