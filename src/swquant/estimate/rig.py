"""A phase's problem on a lone block of a model, its weights made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from swquant.engine.precision import at_precision
from swquant.engine.skeleton import Skeleton
from swquant.engine.streams import batches
from swquant.learnables.base import BlockFacts, ChannelRange
from swquant.phases.base import Phase, Problem
from swquant.phases.portion import Portion
from swquant.plan import Plan
from swquant.quant.deferred import in_float
from swquant.quant.draft import Draft, open_draft
from swquant.seeds import generator


@dataclass(frozen=True)
class Rig:
    """The first block with parameters and activations that stand for the model's.

    Attributes:
        plan: The run.
        kwargs: What the block is called with beside hidden states.
        params: The block's parameters in their stored dtypes.
        streams: Inputs, targets and augmented targets, ``[samples, tokens, dim]`` each.
        device: Where to compute.
    """

    plan: Plan
    kwargs: Mapping[str, Any]
    params: Mapping[str, Tensor]
    streams: tuple[Tensor, Tensor, Tensor]
    device: torch.device

    def forward(self, params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The block's output."""
        return self.plan.skeleton.block(0).forward(params, hidden, self.kwargs)

    @torch.no_grad()
    def advance(self, params: Mapping[str, Tensor]) -> int:
        """Run a batch of the inputs through the block as a run does; returns how many samples it has."""
        some = self.streams[0][next(batches(self.streams[0]))].to(self.device)
        self.forward(params, some).cpu()
        return len(some)

    def draft(self) -> Draft:
        """The block, rounded to the nearest."""
        weights = tuple(f"{linear}.weight" for linear in self.plan.skeleton.family.linears)
        dtypes = {name: value.dtype for name, value in self.params.items()}
        return open_draft(self.params, weights, self.plan.spec, dtypes)

    @torch.no_grad()
    def watch(self, params: Mapping[str, Tensor], linears: Sequence[str], visit: Callable[[str, Tensor], None]) -> None:
        """Show ``visit`` the named linears' inputs for the first sample."""

        def seen(linear: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
            visit(linear, given[0].flatten(0, -2))

        with ExitStack() as hooks:
            for linear in linears:
                module = self.plan.skeleton.block(0).module.get_submodule(linear)
                hooks.callback(module.register_forward_pre_hook(partial(seen, linear)).remove)
            self.forward(in_float(params), self.streams[0][:1].to(self.device))

    def problem(
        self,
        phase: Phase,
        train: Sequence[int],
        held: Sequence[int],
        step: Callable[[int, int], None] = lambda done, total: None,
        watch: Callable[..., None] | None = None,
        micro_batch: int | None = None,
    ) -> Problem:
        """What the block poses to a phase.

        Args:
            phase: The phase.
            train: Samples of the streams to train on.
            held: Samples to compare on.
            step: Hears of the steps.
            watch: In the place of :meth:`watch`.
            micro_batch: Samples that go through the block at once.
        """
        job, skeleton = self.plan.job(), self.plan.skeleton
        return Problem(
            forward=at_precision(self.forward, job.precision),
            facts=BlockFacts(skeleton.family, skeleton.heads, skeleton.key_value_heads, self._ranges),
            inputs=self.streams[0],
            target=self.streams[1],
            augmented=self.streams[2] if phase.augmented else None,
            loss=job.loss,
            watch=watch or self.watch,
            train=train,
            held=held,
            rng=partial(generator, job.seed, "estimate"),
            device=self.device,
            step=step,
            portion=Portion(micro_batch),
        )

    def _ranges(self, linears: Sequence[str]) -> dict[str, ChannelRange]:
        ones = {linear: torch.ones(self.params[f"{linear}.weight"].shape[1], device=self.device) for linear in linears}
        return {linear: ChannelRange(-one, one) for linear, one in ones.items()}


def arguments(skeleton: Skeleton, tokens: int) -> dict[str, Any]:
    """The first block's keyword arguments for samples of so many tokens; no weight is read."""
    model, family = skeleton.model, skeleton.family
    width = int(model.get_submodule(family.embedding).weight.shape[1])
    model.set_submodule(family.embedding, nn.Embedding.from_pretrained(torch.zeros(1, width)))
    body = model.get_submodule("model")
    params = {name: torch.zeros(value.shape) for name, value in body.named_parameters() if value.is_meta}
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        functional_call(body, params, kwargs={"input_ids": ids, "use_cache": False}, strict=False)
    recorder: Any = model.get_submodule(family.blocks)[0]
    return dict(recorder.kwargs)
