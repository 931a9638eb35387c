r"""The end-to-end stage: the scales of all blocks, and weights where asked, trained on the original's predictions.

After the last block, with codes ``c`` and zero points ``z`` as they are, each group's scale becomes
``s = s0 * exp(g)`` and ``g``, zero in the beginning, is trained by AdamW on::

    mean over tokens of KL(softmax(logits of the original) || softmax(logits with weights (c - z) * s))

which is the second step of EfficientQAT (Chen et al., arXiv 2407.11062, E2E-QP) but for the loss and the logarithm.
Adam's steps in ``g`` are shares of a scale, whatever its magnitude, and no scale changes its sign. ``s`` is rounded to
bfloat16 inside of the differentiable path (straight-through), so the model that is trained is the one that is written.
Of grids that have something else for a scale it is the factors that have a ``g`` (``d`` and ``dmin`` of a K grid's
super-blocks, rounded to float16); integers stay as the codes do.

With ``weights`` the codes are trained as well: each weight has a position ``v`` in units of its scale, ``c = z +
round(v)``, and gradients pass straight through the rounding where ``c`` is not clamped. That is quantization-aware
training with the original for a teacher (as in LLM-QAT, Liu et al., arXiv 2305.17888), begun where the blocks' training
ended: ``v`` begins within the cell of its code, as near as that allows to the original's weight over the scale.

Codes stay packed on the disk. Where the graph of all blocks fits into the memory that is there to spare, a step goes
forward and backward once. Where it does not, it goes forward block by block and keeps the hidden states before each,
``[blocks, samples, tokens, dim]``; then backward block by block, running each again with a graph. So one block's
weights exist at a time, and memory grows with the number of blocks by hidden states, by what is learned, its gradient
and AdamW's moments alone: 16 bytes for a scale, and for a weight with ``weights``. Both ways end in the same bits. A
large best state is on a mapped file. The blocks' matrix products are in the job's precision; heads and the validation
loss are in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from swquant.distributed.ranks import own_rows, own_turns, require_same
from swquant.engine.block import Job, create_together, require_finite, split_validation
from swquant.engine.final_drift import final_blocks
from swquant.engine.head import Heads
from swquant.engine.kept import kept_copy
from swquant.engine.observer import Observer
from swquant.engine.run_state import TRAINED, RunState
from swquant.engine.trained_model import POSITION, TrainedModel
from swquant.errors import SwquantError
from swquant.learnables.base import Theta
from swquant.model.calls import Calls, Front, capture
from swquant.phases.base import PhaseReport
from swquant.phases.micro_batch import MicroBatch, together
from swquant.phases.optimizers import Optimizer, trainable
from swquant.phases.rounds import Trail, keep_best
from swquant.phases.scale_training import ScaleTraining
from swquant.seeds import generator

NAME = "EndToEnd"
COSINE = Optimizer(schedule="cosine")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def train_scales(
    job: Job,
    work: ScaleTraining,
    run_state: RunState,
    calls: Calls,
    observer: Observer,
    in_all: Callable[[int], int] | None = None,
) -> None:
    """Train all finished blocks together, run the evaluation samples through the result, and commit both.

    Args:
        job: The run.
        work: What to train and how.
        run_state: Where the run stands; all blocks are finished. Every epoch is saved to it.
        calls: What each block is called with.
        observer: Hears of the steps.
        in_all: Told on rank 0 how many epochs are done, says how many there are to be in all, before that is saved;
            ``None`` leaves it at ``work``'s.
    """
    learned = "scales and weights" if work.weights else "scales"
    observer.stage(f"Training the {learned} of all blocks end to end")
    assert run_state.shape is not None
    cache = create_together(job.ranks, [run_state.hidden_path(TRAINED, run_state.done)], run_state.shape)[0]

    def begin() -> None:
        for index, hidden in enumerate(capture(calls.front, job.checkpoint, run_state.tokens()["tokens"], stored=True)):
            cache[index] = hidden

    job.ranks.lead(begin)
    stage = _Stage(
        job, work, TrainedModel(job, run_state, calls, work), run_state, cache, observer, calls.front, in_all
    )
    report = stage.run()
    require_finite(
        stage.model.advance(cache[job.samples :], job.samples), job.ranks, "the model trained end to end puts out"
    )
    job.ranks.barrier()
    require_same(
        job.ranks, (value for theta in stage.thetas for value in theta.values()), "what was trained end to end"
    )

    def finish() -> None:
        observer.stage(f"End to end: validation KL {report['before']:.4g} -> {report['after']:.4g}")
        blocks = final_blocks(job, run_state, stage.model, calls)
        run_state.finish_training(stage.model.final(), {**report, "blocks": [asdict(block) for block in blocks]})

    job.ranks.lead(finish)


@dataclass
class _Stage:
    """The training, as :func:`swquant.phases.rounds.keep_best` drives it."""

    job: Job
    work: ScaleTraining
    model: TrainedModel
    run_state: RunState
    inputs: Tensor
    observer: Observer
    front: Front
    in_all: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        self.thetas = self.model.thetas
        self.reference = self.run_state.open_hidden_states()[0]
        self.heads = Heads.load(self.front, self.job.checkpoint)
        self.train, self.validation = split_validation(self.job.samples)
        self.micro_batch = MicroBatch(self.job.micro_batch)
        self.notes = list[str]()
        self.keeping: dict[int, bool] = {}

    def run(self) -> dict[str, Any]:
        """Train from where the run stands, to the best state; returns the report."""
        began, spent = time.monotonic(), 0.0
        if self.run_state.training is None:
            before = self.validation_loss()
            if not math.isfinite(before):
                raise SwquantError(
                    "the quantized model's predictions, or the original's, are NaN or infinite on the validation "
                    "samples, so that nothing can be trained end to end; choose a method without end_to_end"
                )
            trail, optimizer = Trail.begin(before), self.open(1.0)
        else:
            before, spent = self.run_state.training["before"], self.run_state.training["seconds"]
            trail, optimizer = self._resume(self.run_state.training)

        def after(optimizer: torch.optim.Optimizer) -> int | None:
            facts = {"before": before, "seconds": spent + time.monotonic() - began}
            return self._save(trail, optimizer, facts)

        keep_best(self, trail, optimizer, COSINE, self.work.epochs, before, self.observer.step, after)
        if trail.curve and trail.best_epoch == 0 and not trail.ended:
            trail.events.append("no epoch had a smaller validation KL than the start, which was kept")
        events = (*trail.events, *self.notes)
        curve, training = tuple(trail.curve), tuple(trail.training)
        report = PhaseReport(NAME, before, trail.best_loss, curve, trail.best_epoch, events, training)
        return {**asdict(report), "seconds": round(spent + time.monotonic() - began, 3)}

    def begun(self) -> Iterator[Theta]:
        return self.model.begun()

    def copied(self) -> list[Theta]:
        return kept_copy(self.run_state.kept_path(self.job.ranks.rank), self.thetas)

    def open(self, rate: float) -> torch.optim.Optimizer:
        """Groups of the values in the order of :meth:`_named`, which saving relies on: runs of one kind."""
        values = ((key.endswith(POSITION), value) for key, value, _ in self._named(self.thetas))
        groups = [
            {"params": [value for _, value in run], "lr": self._rate(moving) * rate, "weight_decay": 0.0}
            for moving, run in groupby(values, itemgetter(0))
        ]
        return COSINE.open(groups)

    def _rate(self, moving: bool) -> float:
        return self.work.weight_rate if moving else self.work.learning_rate

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        return optimizer

    def batches(self, done: int) -> list[Tensor]:
        train = torch.tensor(self.train)
        order = torch.randperm(len(train), generator=generator(self.job.seed, "end to end", "order", done + 1))
        return list(train[order].split(self.work.batch_size))

    def descend(self, samples: Tensor, step: int) -> Tensor:
        ranks, learned = self.job.ranks, [value for theta in self.thetas for value in trainable(theta)]

        def attempt() -> Tensor:
            for value in learned:
                value.grad = None
            loss = together(ranks, partial(self._pull, samples))
            for value in learned if ranks.size > 1 else ():
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            ranks.sum([loss, *(value.grad for value in learned if value.grad is not None)])
            return loss

        def note(event: str) -> None:
            self.notes.append(f"step {step + 1}: {event}")

        return self.micro_batch.fit(attempt, len(samples), ranks, note)

    def _pull(self, samples: Tensor) -> Tensor:
        """Add this rank's share of the gradient, a micro-batch at a time; returns its share of the loss."""
        total = torch.zeros(())
        for part in self.micro_batch.cut(samples[own_rows(self.job.ranks, len(samples))]):
            share = len(part) / len(samples)
            inputs, reference = self.inputs[part].to(self.job.device), self.reference[part].to(self.job.device)
            if self._keeps_graph(inputs, part):
                out = self.model.whole(inputs, part)
                loss, slope = self.heads.gradient(reference, out.detach())
                out.backward(slope if share == 1 else slope * share)
            else:
                states = self.model.forward(inputs, part)
                loss, slope = self.heads.gradient(reference, states.pop())
                self.model.backward(states, part, slope if share == 1 else slope * share)
            total += loss * share
        return total

    def _keeps_graph(self, inputs: Tensor, samples: Tensor) -> bool:
        """Whether memory is there for the graph of all blocks, asked once for each size of a micro-batch.

        It changes no bit of the result, so a run may go on where it is decided otherwise.
        """
        if len(samples) not in self.keeping:
            self.keeping[len(samples)] = self.model.graph_bytes(inputs, samples) <= self.job.spare()
        return self.keeping[len(samples)]

    def settle(self) -> None:
        """Every state is in the domain."""

    def validation_loss(self) -> float:
        ranks, size = self.job.ranks, self.work.batch_size
        own = own_turns(ranks, torch.tensor(self.validation).split(size))
        attempt = partial(together, ranks, partial(self._divergence, own))
        total = self.micro_batch.fit(attempt, size * ranks.size, ranks, self.notes.append)
        ranks.sum([total])
        return float(total) / len(self.validation)

    def _divergence(self, batches: Sequence[Tensor]) -> Tensor:
        """Sum over the samples of ``batches``, a micro-batch at a time, float64."""
        total = torch.zeros((), dtype=torch.float64)
        for part in (part for samples in batches for part in self.micro_batch.cut(samples)):
            hidden = self.model.forward(self.inputs[part].to(self.job.device), part, keep=False)[-1]
            reference = self.reference[part].to(self.job.device)
            total += float(self.heads.divergence(reference, hidden)) * len(part)
        return total

    def _save(self, trail: Trail, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> int | None:
        return self.job.ranks.lead(partial(self._write, trail, optimizer, facts))

    def _write(self, trail: Trail, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> int | None:
        in_all = None if self.in_all is None else self.in_all(len(trail.curve))
        tensors: dict[str, Tensor] = {}
        moments = optimizer.state_dict()["state"]
        for index, (key, value, best) in enumerate(self._named(trail.best or self.thetas)):
            tensors |= {f"{key}:last": value} | ({f"{key}:best": best} if trail.best else {})
            tensors |= {f"{key}:{part}": moment for part, moment in moments.get(index, {}).items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        stand = {"curve": trail.curve, "training": trail.training, "events": trail.events, "notes": self.notes}
        best = {"best_loss": trail.best_loss, "best_epoch": trail.best_epoch, "rate": trail.rate}
        self.run_state.save_training(len(trail.curve), tensors, {**stand, **best, **facts})
        validation = trail.curve[-1]
        shown = "a loss that was not finite" if validation is None else f"validation KL {validation:.4g}"
        self.observer.stage(f"End to end, epoch {len(trail.curve)}/{in_all or self.work.epochs}: {shown}")
        return in_all

    @torch.no_grad()
    def _resume(self, stand: Mapping[str, Any]) -> tuple[Trail, torch.optim.Optimizer]:
        """The trail and the optimizer that :meth:`_save` saved."""
        tensors, optimizer = self.run_state.training_state(), self.open(stand["rate"])
        self.notes = list(stand["notes"])
        best = self.copied() if stand["best_epoch"] else None
        state = optimizer.state_dict()
        for index, (key, value, kept) in enumerate(self._named(best or self.thetas)):
            if best is not None:
                kept.copy_(tensors[f"{key}:best"])
            value.copy_(tensors[f"{key}:last"])
            moments = {part: tensors[f"{key}:{part}"].clone() for part in MOMENTS if f"{key}:{part}" in tensors}
            if moments:
                state["state"][index] = moments
        optimizer.load_state_dict(state)
        best_loss, best_epoch = stand["best_loss"], stand["best_epoch"]
        curves = (stand["curve"], stand["training"])
        trail = Trail(best, best_loss, best_epoch, stand["rate"], *curves, stand["events"])
        return trail, optimizer

    def _named(self, states: list[Theta]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """A key for each value that is learned, the value, and its counterpart in ``states``."""
        for index, (theta, state) in enumerate(zip(self.thetas, states, strict=True)):
            for name, value in theta.items():
                yield f"{index}/{name}", value, state[name]
