"""Batches through a block, in micro-batches and over ranks: outputs of all samples, and gradients of batches' losses.

A loss that is no mean over tokens needs all outputs at once: a batch's micro-batches are run without a graph, their
outputs gathered in the batch's order, the loss and its gradient with respect to them computed on every rank, and each
micro-batch run again with a graph that its rows of this gradient go backward through. So the gradient is the whole
batch's whatever the micro-batch and the number of ranks, and only outputs ``[samples, tokens, dim]`` are kept for the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from swquant.device import moved
from swquant.distributed.ranks import own_rows
from swquant.phases.base import Problem
from swquant.phases.micro_batch import together
from swquant.quant.deferred import on_leaves

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(outputs [samples, tokens, dim], samples) -> (loss, its gradient with respect to the outputs)``, both detached."""


@torch.no_grad()
def outputs_of(problem: Problem, params: Mapping[str, Tensor], samples: Tensor, note: Callable[[str], None]) -> Tensor:
    """The block's outputs for ``samples``, ``[samples, tokens, dim]``, on every rank.

    ``note`` hears where memory ran out, and the micro-batch has halved.
    """
    run = partial(_own_outputs, problem, params, _own(problem, samples))
    outputs = problem.micro_batch.fit(partial(together, problem.ranks, run), len(samples), problem.ranks, note)
    return problem.ranks.gather(outputs, len(samples))


def outputs_by_batch(
    problem: Problem, params: Mapping[str, Tensor], batches: Sequence[Tensor], note: Callable[[str], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch's samples and outputs, on every rank; as many batches at a time as there are ranks."""
    for first in range(0, len(batches), problem.ranks.size):
        some = batches[first : first + problem.ranks.size]
        outputs = outputs_of(problem, params, torch.cat(tuple(some)), note)
        yield from zip(some, outputs.split([len(samples) for samples in some]), strict=True)


def pull(
    problem: Problem,
    params: Mapping[str, Tensor],
    samples: Tensor,
    objective: Objective,
    separable: bool,
    trained: Sequence[Tensor],
) -> Tensor:
    """Add the gradient of the loss on a batch to that of the trained tensors; returns the loss, on every rank.

    Args:
        problem: The block.
        params: Its parameters, functions of the trained tensors.
        samples: The batch.
        objective: The loss.
        separable: It is the mean of its values over any equal shares of the samples.
        trained: Leaves; their gradients are summed over the ranks.

    Raises:
        NoRoomError: Memory ran out on some rank; gradients are then undefined.
    """
    cut, pairs = on_leaves(params)
    run = _mean_of_micro_batches if separable else _whole
    loss = run(problem, cut, samples, objective)

    def back() -> None:
        if problem.ranks.size > 1:
            for _, leaf in pairs:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        reached = [(root, leaf.grad) for root, leaf in pairs if root is not leaf and leaf.grad is not None]
        torch.autograd.backward([root for root, _ in reached], [gradient for _, gradient in reached])

    together(problem.ranks, back)
    problem.ranks.sum([value.grad for value in trained if value.grad is not None])
    return loss


def _mean_of_micro_batches(
    problem: Problem, params: Mapping[str, Tensor], samples: Tensor, objective: Objective
) -> Tensor:
    """Each micro-batch's loss and gradient with its share of the samples as weight; nothing is gathered."""

    def run() -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(problem.target.dtype, torch.float32), device=problem.device)
        for part in problem.micro_batch.cut(_own(problem, samples)):
            out = _forward(problem, params, part)
            loss, slope = objective(out.detach(), part)
            share = len(part) / len(samples)
            out.backward(slope if share == 1 else slope * share)  # pyright: ignore[reportUnknownMemberType]
            total = total + loss * share
        return total

    total = together(problem.ranks, run)
    problem.ranks.sum([total])
    return total


def _whole(problem: Problem, params: Mapping[str, Tensor], samples: Tensor, objective: Objective) -> Tensor:
    """The loss of the gathered outputs; a micro-batch that is all of a rank's share is run once, its graph kept."""
    own = _own(problem, samples)
    parts = problem.micro_batch.cut(own)

    def forward() -> tuple[list[Tensor], Tensor]:
        if len(parts) == 1:
            out = _forward(problem, params, own)
            return [out], out.detach()
        with torch.no_grad():
            return [], _own_outputs(problem, params, own)

    kept, outputs = together(problem.ranks, forward)
    whole = problem.ranks.gather(outputs, len(samples))

    def backward() -> Tensor:
        loss, slope = objective(whole, samples)
        rows = slope[own_rows(problem.ranks, len(samples))].split([len(part) for part in parts]) if parts else ()
        for part, row in zip(parts, rows, strict=True):
            out = kept.pop() if kept else _forward(problem, params, part)
            out.backward(row)  # pyright: ignore[reportUnknownMemberType]
        return loss

    return together(problem.ranks, backward)


def _own(problem: Problem, samples: Tensor) -> Tensor:
    return samples[own_rows(problem.ranks, len(samples))]


def _own_outputs(problem: Problem, params: Mapping[str, Tensor], own: Tensor) -> Tensor:
    parts = problem.micro_batch.cut(own)
    if len(parts) == 1:
        return _forward(problem, params, own)
    return torch.cat([problem.target[:0].to(problem.device), *(_forward(problem, params, part) for part in parts)])


def _forward(problem: Problem, params: Mapping[str, Tensor], samples: Tensor) -> Tensor:
    return problem.forward(params, moved(problem.inputs[samples], problem.device), samples)
