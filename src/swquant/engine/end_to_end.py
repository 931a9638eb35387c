r"""The end-to-end stage: the scales of all blocks, trained together on the original model's predictions.

Behind the last block, with codes ``c`` and zero points ``z`` as they are, each group's scale becomes
``s = s0 * exp(g)`` and ``g``, zero in the beginning, is trained by AdamW on::

    mean over tokens of KL(softmax(logits of the original) || softmax(logits with weights (c - z) * s))

which is the second step of EfficientQAT (Chen et al., arXiv 2407.11062, E2E-QP) but for the loss and the logarithm.
Adam's steps in ``g`` are shares of a scale, whatever its magnitude, and no scale changes its sign. ``s`` is rounded to
bfloat16 inside of the differentiable path (straight-through), so the model that is trained is the one that is written.
On a K grid it is ``d`` and ``dmin`` of each super-block that have a ``g`` and are rounded to float16; the integers
``sc`` and ``m`` of the groups stay as the codes do.

Codes stay packed on the disk. A step goes forward block by block and keeps the hidden states in front of each,
``[blocks, samples, tokens, dim]``; then backward block by block, running each again with a graph. So one block's
weights exist at a time, and memory grows with the number of blocks by hidden states, scales and AdamW's moments alone.
The blocks' matrix products are in the job's precision; heads and the held-out loss are in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swquant.distributed.ranks import own_rows, own_turns, require_same
from swquant.engine.block import Job, create_together, own_batches, require_finite, split_held
from swquant.engine.capture import capture
from swquant.engine.head import Heads
from swquant.engine.journal import TRAINED, Journal, stored_part
from swquant.engine.observer import Observer
from swquant.engine.precision import at_precision
from swquant.errors import SwquantError
from swquant.learnables.base import Theta
from swquant.phases.base import PhaseReport
from swquant.phases.optimizers import Optimizer, trainable
from swquant.phases.portion import Portion, together
from swquant.phases.rounds import Trail, keep_best, snapshot
from swquant.phases.scale_training import ScaleTraining
from swquant.quant.draft import Committed
from swquant.quant.finite import is_finite
from swquant.quant.through import stored_as
from swquant.seeds import generator

NAME = "EndToEnd"
COSINE = Optimizer(schedule="cosine")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def train_scales(
    job: Job, work: ScaleTraining, journal: Journal, arguments: Sequence[Mapping[str, Any]], observer: Observer
) -> None:
    """Train the scales of all finished blocks, run the evaluation samples through the result, and commit both.

    Args:
        job: The run.
        work: What to train and how.
        journal: Where the run stands; all blocks are finished. Every epoch is saved to it.
        arguments: The blocks' keyword arguments beside the hidden states, on the job's device.
        observer: Hears of the steps.
    """
    observer.stage("Training the scales of all blocks end to end")
    assert journal.shape is not None
    stream = create_together(job.ranks, [journal.stream_path(TRAINED, journal.done)], journal.shape)[0]

    def begin() -> None:
        capture(job.skeleton, job.checkpoint, journal.tokens()["tokens"], write_stored=stream.__setitem__)

    job.ranks.lead(begin)
    stage = _Stage(job, work, TrainedModel(job, journal, arguments, work.norms), journal, stream, observer)
    report = stage.run()
    require_finite(stage.model.advance(stream[job.samples :]), job.ranks, "the model with trained scales puts out")
    job.ranks.barrier()
    require_same(job.ranks, (gain for theta in stage.thetas for gain in theta.values()), "the trained scales")

    def finish() -> None:
        observer.stage(f"End to end: held-out KL {report['before']:.4g} -> {report['after']:.4g}")
        journal.finish_training(stage.model.final(), report)

    job.ranks.lead(finish)


class TrainedModel:
    """The quantized model's blocks: packed codes in the journal, scales in memory.

    Attributes:
        gains: For each block the logarithms of factors, float32 leaves: by a weight's name on its scales (``[out,
            groups]``), or with ``:d`` and ``:dmin`` behind it on a K grid's factors (``[out, supers]``); by a norm's
            name on its weight (``[dim]``).
    """

    def __init__(self, job: Job, journal: Journal, arguments: Sequence[Mapping[str, Any]], norms: bool = False) -> None:
        self._job, self._journal, self._arguments = job, journal, arguments
        self.gains = [self._start(journal.block(index, job.spec), norms) for index in range(journal.done)]

    def _start(self, block: Committed, norms: bool) -> Theta:
        shapes = {
            _key(name, part): value.shape
            for name, quantized in block.quantized.items()
            for part, value in quantized.scales.items()
        }
        if norms:
            shapes |= {name: value.shape for name, value in block.params.items() if _is_norm(name, value)}
        return {name: torch.zeros(shape, device=self._job.device, requires_grad=True) for name, shape in shapes.items()}

    def _block(self, index: int) -> Committed:
        """The block with its present scales, differentiable in the gains."""
        block = self._journal.read_block(index, self._job.spec, self._job.device)
        factors = {name: gain.exp() for name, gain in self.gains[index].items()}
        quantized = {
            name: old.rescaled({part: factors[_key(name, part)] for part in old.scales})
            for name, old in block.quantized.items()
        }
        params = {
            name: stored_as(value.float() * factors[name], value.dtype) if name in factors else value
            for name, value in block.params.items()
        }
        return Committed(quantized, params)

    def _run(self, index: int, hidden: Tensor, precision: torch.dtype) -> Tensor:
        """Block number ``index`` on ``hidden [samples, tokens, dim]``."""
        block = self._job.skeleton.block(index)
        run = at_precision(partial(block.forward, kwargs=self._arguments[index]), precision)
        return run(self._block(index).floats(), hidden)

    @torch.no_grad()
    def forward(self, hidden: Tensor, keep: bool = True) -> list[Tensor]:
        """The hidden states in front of each block if ``keep``, and behind the last.

        Kept are those of training, in its precision; without ``keep`` all is float32, as it is measured.
        """
        states, precision = [hidden], self._job.precision if keep else torch.float32
        for index in range(len(self.gains)):
            out = self._run(index, states[-1], precision)
            states = [*states, out] if keep else [out]
        return states

    def backward(self, states: list[Tensor], slope: Tensor) -> None:
        """Add to the gains' gradients.

        Args:
            states: What :meth:`forward` returned but for the last; they are let go of one after the other.
            slope: Gradient of the loss with respect to the hidden states behind the last block.
        """
        for index in reversed(range(len(self.gains))):
            hidden = states.pop().detach().requires_grad_()
            with torch.enable_grad():
                out = self._run(index, hidden, self._job.precision)
            out.backward(slope)
            assert hidden.grad is not None
            slope = hidden.grad

    @torch.no_grad()
    def advance(self, stream: Tensor) -> bool:
        """Replace the hidden states in front of the first block by those behind the last, in place.

        Each rank takes samples of its own; returns whether all of these end in finite values.
        """
        own = list(own_batches(self._job.ranks, stream))
        for index in range(len(self.gains)):
            floats = self._block(index).floats()
            for part in own:
                hidden = stream[part].to(self._job.device)
                stream[part] = self._job.skeleton.block(index).forward(floats, hidden, self._arguments[index]).cpu()
        return all(is_finite(stream[part]) for part in own)

    @torch.no_grad()
    def final(self) -> dict[str, Tensor]:
        """The trained scales and norms as :meth:`Journal.finish_training` takes them."""
        out: dict[str, Tensor] = {}
        for index, gains in enumerate(self.gains):
            block = self._block(index)
            for name, quantized in block.quantized.items():
                for part, value in quantized.scales.items():
                    out[f"{index}/{name}:{part}"] = stored_part(part, value).cpu().contiguous()
            for name in gains:
                if name in block.params:
                    out[f"{index}/{name}:plain"] = block.params[name].cpu().contiguous()
        return out


@dataclass
class _Stage:
    """The training, as :func:`swquant.phases.rounds.keep_best` drives it."""

    job: Job
    work: ScaleTraining
    model: TrainedModel
    journal: Journal
    inputs: Tensor
    observer: Observer

    def __post_init__(self) -> None:
        self.thetas = self.model.gains
        self.reference = self.journal.open_streams()[0]
        self.heads = Heads.load(self.job.skeleton, self.job.checkpoint, self.job.device)
        self.train, self.held = split_held(self.job.samples)
        self.portion = Portion(self.job.micro_batch)
        self.notes = list[str]()

    def run(self) -> dict[str, Any]:
        """Train from where the journal stands, to the best state; returns the report."""
        began, spent = time.monotonic(), 0.0
        if self.journal.training is None:
            before = self.held_loss()
            if not math.isfinite(before):
                raise SwquantError(
                    "the quantized model's predictions, or the original's, are NaN or infinite on the held-out "
                    "samples, so that nothing can be trained end to end; choose a method without end_to_end"
                )
            trail, optimizer = Trail.begin(before), self.open(1.0)
        else:
            before, spent = self.journal.training["before"], self.journal.training["seconds"]
            trail, optimizer = self._resume(self.journal.training)

        def behind(optimizer: torch.optim.Optimizer) -> None:
            facts = {"before": before, "seconds": spent + time.monotonic() - began}
            self._save(trail, optimizer, facts)

        keep_best(self, trail, optimizer, COSINE, self.work.epochs, before, self.observer.step, behind)
        if trail.curve and trail.best_epoch == 0 and not trail.ended:
            trail.events.append("no epoch had a smaller held-out KL than the start, which was kept")
        events = (*trail.events, *self.notes)
        curve, training = tuple(trail.curve), tuple(trail.training)
        report = PhaseReport(NAME, before, trail.best_loss, curve, trail.best_epoch, events, training)
        return {**asdict(report), "seconds": round(spent + time.monotonic() - began, 3)}

    def begun(self) -> list[Theta]:
        return [{key: torch.zeros_like(value) for key, value in theta.items()} for theta in self.thetas]

    def open(self, rate: float) -> torch.optim.Optimizer:
        params = [gain for theta in self.thetas for gain in trainable(theta)]
        return COSINE.open([{"params": params, "lr": self.work.learning_rate * rate, "weight_decay": 0.0}])

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        return optimizer

    def batches(self, done: int) -> list[Tensor]:
        train = torch.tensor(self.train)
        order = torch.randperm(len(train), generator=generator(self.job.seed, "end to end", "order", done + 1))
        return list(train[order].split(self.work.batch_size))

    def descend(self, samples: Tensor, step: int) -> Tensor:
        ranks, gains = self.job.ranks, [gain for theta in self.thetas for gain in trainable(theta)]

        def attempt() -> Tensor:
            for gain in gains:
                gain.grad = None
            loss = together(ranks, partial(self._pull, samples))
            for gain in gains if ranks.size > 1 else ():
                gain.grad = torch.zeros_like(gain) if gain.grad is None else gain.grad
            ranks.sum([loss, *(gain.grad for gain in gains if gain.grad is not None)])
            return loss

        def note(event: str) -> None:
            self.notes.append(f"step {step + 1}: {event}")

        return self.portion.fit(attempt, len(samples), ranks, note)

    def _pull(self, samples: Tensor) -> Tensor:
        """Add this rank's share of the gradient, a portion at a time; returns its share of the loss."""
        total = torch.zeros(())
        for part in self.portion.cut(samples[own_rows(self.job.ranks, len(samples))]):
            share = len(part) / len(samples)
            states = self.model.forward(self.inputs[part].to(self.job.device))
            loss, slope = self.heads.gradient(self.reference[part].to(self.job.device), states.pop())
            self.model.backward(states, slope if share == 1 else slope * share)
            total += loss * share
        return total

    def settle(self) -> None:
        """Every state is in the domain."""

    def held_loss(self) -> float:
        ranks, size = self.job.ranks, self.work.batch_size
        own = own_turns(ranks, torch.tensor(self.held).split(size))
        attempt = partial(together, ranks, partial(self._divergence, own))
        total = self.portion.fit(attempt, size * ranks.size, ranks, self.notes.append)
        ranks.sum([total])
        return float(total) / len(self.held)

    def _divergence(self, batches: Sequence[Tensor]) -> Tensor:
        """Sum over the samples of ``batches``, a portion at a time, float64."""
        total = torch.zeros((), dtype=torch.float64)
        for part in (part for samples in batches for part in self.portion.cut(samples)):
            hidden = self.model.forward(self.inputs[part].to(self.job.device), keep=False)[-1]
            reference = self.reference[part].to(self.job.device)
            total += float(self.heads.divergence(reference, hidden)) * len(part)
        return total

    def _save(self, trail: Trail, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
        self.job.ranks.lead(partial(self._write, trail, optimizer, facts))

    def _write(self, trail: Trail, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        moments = optimizer.state_dict()["state"]
        for index, (key, gain, best) in enumerate(self._named(trail.best or self.begun())):
            tensors |= {f"{key}:last": gain, f"{key}:best": best}
            tensors |= {f"{key}:{part}": value for part, value in moments.get(index, {}).items()}
        tensors = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        stand = {"curve": trail.curve, "training": trail.training, "events": trail.events, "notes": self.notes}
        best = {"best_loss": trail.best_loss, "best_epoch": trail.best_epoch, "rate": trail.rate}
        self.journal.save_training(len(trail.curve), tensors, {**stand, **best, **facts})
        held = trail.curve[-1]
        shown = "a loss that was not finite" if held is None else f"held-out KL {held:.4g}"
        self.observer.stage(f"End to end, epoch {len(trail.curve)}/{self.work.epochs}: {shown}")

    @torch.no_grad()
    def _resume(self, stand: Mapping[str, Any]) -> tuple[Trail, torch.optim.Optimizer]:
        """The trail and the optimizer that :meth:`_save` saved."""
        tensors, optimizer = self.journal.training_state(), self.open(stand["rate"])
        self.notes = list(stand["notes"])
        best, state = snapshot(self.thetas), optimizer.state_dict()
        for index, (key, gain, kept) in enumerate(self._named(best)):
            gain.copy_(tensors[f"{key}:last"])
            kept.copy_(tensors[f"{key}:best"])
            moments = {part: tensors[f"{key}:{part}"] for part in MOMENTS if f"{key}:{part}" in tensors}
            if moments:
                state["state"][index] = moments
        optimizer.load_state_dict(state)
        best_loss, best_epoch = stand["best_loss"], stand["best_epoch"]
        curves = (stand["curve"], stand["training"])
        trail = Trail(best, best_loss, best_epoch, stand["rate"], *curves, stand["events"])
        return trail, optimizer

    def _named(self, states: list[Theta]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """A key for each gain, the gain, and its counterpart in ``states``."""
        for index, (theta, state) in enumerate(zip(self.thetas, states, strict=True)):
            for name, gain in theta.items():
                yield f"{index}/{name}", gain, state[name]


def _key(name: str, part: str) -> str:
    """The name of the gain of one of a weight's scales."""
    return name if part == "scale" else f"{name}:{part}"


def _is_norm(name: str, value: Tensor) -> bool:
    return value.dim() == 1 and name.endswith(".weight")
