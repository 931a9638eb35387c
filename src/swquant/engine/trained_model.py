"""The quantized model while its scales, and perhaps its codes, are trained: one block's weights at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from swquant.engine.alive import Alive
from swquant.engine.block import Job
from swquant.engine.bound import BoundBlock, own_batches
from swquant.engine.precision import at_precision
from swquant.engine.run_state import RunState, stored_parts
from swquant.learnables.base import Theta
from swquant.model.calls import Calls
from swquant.phases.scale_training import ScaleTraining
from swquant.quant.bits import pack
from swquant.quant.deferred import defer
from swquant.quant.draft import Committed
from swquant.quant.finite import is_finite
from swquant.quant.grid import Grid, group
from swquant.quant.qtensor import QTensor
from swquant.quant.rounding import codes_of, fake_quantize
from swquant.quant.through import stored_as

POSITION = ":position"
"""What follows a weight's name where its positions are meant."""

EDGE = 0.49
"""How far from its code a position begins at most; beyond 0.5 it would have another."""


class TrainedModel:
    """The quantized model's blocks: packed codes in the run state, what is learned in memory.

    Attributes:
        thetas: For each block what is learned, float32 leaves. Logarithms of factors: by a weight's name on its scales
            (``[out, groups]``), or with a factor's name after it where that is another (``:d`` and ``:dmin``); by a
            norm's name on its weight (``[dim]``). After them, where weights are trained, their positions in units of
            the scale (``[out, in]``), by a weight's name with :data:`POSITION` after it: the code is the zero point
            plus the nearest integer.
    """

    def __init__(self, job: Job, run_state: RunState, calls: Calls, work: ScaleTraining) -> None:
        self._job, self._run_state, self._calls, self._work = job, run_state, calls, work
        self.thetas = [self._gains(index) | self._positions(index) for index in range(run_state.done)]
        for theta in self.thetas:
            for value in theta.values():
                value.requires_grad_()

    def begun(self) -> Iterator[Theta]:
        """The state in the beginning, made anew block by block: every factor 1, every code as the blocks left it."""
        for index, theta in enumerate(self.thetas):
            gains = {key: torch.zeros_like(value) for key, value in theta.items() if not key.endswith(POSITION)}
            yield gains | self._positions(index)

    def _gains(self, index: int) -> Theta:
        block = self._run_state.block(index, self._job.layout.grids(index))
        shapes = {
            _key(name, part): value.shape
            for name, quantized in block.quantized.items()
            for part, value in quantized.factors.items()
        }
        if self._work.norms:
            shapes |= {name: value.shape for name, value in block.params.items() if _is_norm(name, value)}
        return {name: torch.zeros(shape, device=self._job.device) for name, shape in shapes.items()}

    def _positions(self, index: int) -> Theta:
        """Of the block's weights where they are trained; nothing otherwise."""
        if not self._work.weights:
            return {}
        return {
            name + POSITION: self._position(index, name, quantized).to(self._job.device)
            for name, quantized in self._run_state.block(index, self._job.layout.grids(index)).quantized.items()
            if "codes" in quantized.spec.kind.learned
        }

    def _position(self, index: int, name: str, quantized: QTensor) -> Tensor:
        """Where a weight begins within the cell of its code: as near as that allows to the original's."""
        shape, spec = quantized.codes.shape, quantized.spec
        cells = group(quantized.codes.float(), spec) - quantized.zero.float().unsqueeze(-1)
        if self._work.original:
            weight = self._job.checkpoint.read(f"{self._job.skeleton.blocks[index].prefix}.{name}").float()
            ratio = group(weight, spec) / quantized.scale.unsqueeze(-1)
            cells = cells + (ratio - cells).clamp_(-EDGE, EDGE)
        return cells.view(shape)

    def _rescaled(self, index: int) -> Committed:
        """The block with its present scales and norms, differentiable in their gains, and its first codes."""
        block, theta = self._read(index), self.thetas[index]
        quantized = {
            name: old.rescaled({part: theta[_key(name, part)].exp() for part in old.factors})
            for name, old in block.quantized.items()
        }
        params = {
            name: stored_as(value.float() * theta[name].exp(), value.dtype) if name in theta else value
            for name, value in block.params.items()
        }
        return Committed(quantized, params)

    def _read(self, index: int) -> Committed:
        return self._run_state.read_block(index, self._job.layout.grids(index), self._job.device)

    def floats(self, index: int) -> dict[str, Tensor]:
        """The block's parameters as it is now, differentiable in what is learned."""
        block, theta = self._rescaled(index), self.thetas[index]
        moving = {
            name: _snapped_later(theta[name + POSITION], quantized)
            for name, quantized in block.quantized.items()
            if name + POSITION in theta
        }
        return block.floats() | moving

    def run(self, index: int, hidden: Tensor, samples: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Block number ``index`` on ``hidden [samples, tokens, dim]`` of these samples."""
        return at_precision(self._bound(index).forward, precision)(self.floats(index), hidden, samples)

    def _bound(self, index: int) -> BoundBlock:
        job = self._job
        return BoundBlock(index, job.skeleton.block(index), self._calls, job.layout, job.device, job.ranks)

    def whole(self, hidden: Tensor, samples: Tensor) -> Tensor:
        """The hidden states after the last block as :meth:`forward` has them, differentiable in what is learned.

        The graph of all blocks is kept for it (:meth:`graph_bytes`), which spares :meth:`backward`'s second pass.
        """
        with torch.enable_grad():
            for index in range(len(self.thetas)):
                hidden = self.run(index, hidden, samples, self._job.precision)
        return hidden

    def graph_bytes(self, hidden: Tensor, samples: Tensor) -> int:
        """What the graph of :meth:`whole` holds beside what is learned, as if all blocks were of the largest kind.

        Args:
            hidden: Hidden states of ``samples`` at any block.
            samples: Which samples they are.
        """
        return max(self._graph_bytes(index, hidden, samples) for index in self._job.layout.kinds()) * len(self.thetas)

    def _graph_bytes(self, index: int, hidden: Tensor, samples: Tensor) -> int:
        """Of one block, in a pass of its own."""
        with torch.enable_grad(), Alive() as alive:
            out = self.run(index, hidden, samples, self._job.precision)
            held = alive.now
        del out
        return held

    @torch.no_grad()
    def forward(self, hidden: Tensor, samples: Tensor, keep: bool = True) -> list[Tensor]:
        """The hidden states before each block if ``keep``, and after the last.

        Kept are those of training, in its precision; without ``keep`` all is float32, as it is measured.
        """
        states, precision = [hidden], self._job.precision if keep else torch.float32
        for index in range(len(self.thetas)):
            out = self.run(index, states[-1], samples, precision)
            states = [*states, out] if keep else [out]
        return states

    def backward(self, states: list[Tensor], samples: Tensor, slope: Tensor) -> None:
        """Add to the gradients of what is learned.

        Args:
            states: What :meth:`forward` returned but for the last; each is freed as soon as it is used.
            samples: Which samples they are.
            slope: Gradient of the loss with respect to the hidden states after the last block.
        """
        for index in reversed(range(len(self.thetas))):
            hidden = states.pop().detach().requires_grad_()
            with torch.enable_grad():
                out = self.run(index, hidden, samples, self._job.precision)
            out.backward(slope)
            assert hidden.grad is not None
            slope = hidden.grad

    @torch.no_grad()
    def advance(self, cache: Tensor, first: int) -> bool:
        """Replace the hidden states before the first block by those after the last, in place.

        The samples are those from number ``first`` on. Each rank takes samples of its own; returns whether all of these
        end in finite values.
        """
        own = list(own_batches(self._job.ranks, cache))
        for index in range(len(self.thetas)):
            floats = self.floats(index)
            bound = self._bound(index)
            for part in own:
                samples = torch.arange(first + part.start, first + part.stop)
                cache[part] = bound.forward(floats, cache[part].to(self._job.device), samples).cpu()
        return all(is_finite(cache[part]) for part in own)

    @torch.no_grad()
    def codes(self, index: int) -> dict[str, Tensor]:
        """The trained codes of a block, ``uint8 [out, in]`` by a weight's name; empty where weights are not trained."""
        if not self._work.weights:
            return {}
        return _trained_codes(self.thetas[index], self._rescaled(index))

    @torch.no_grad()
    def final(self) -> dict[str, Tensor]:
        """What has been learned, as :meth:`RunState.finish_training` takes it."""
        out: dict[str, Tensor] = {}
        for index, theta in enumerate(self.thetas):
            block = self._rescaled(index)
            for name, quantized in block.quantized.items():
                stored = stored_parts(quantized)
                out |= {f"{index}/{name}:{part}": stored[part] for part in quantized.factors}
            for name, codes in _trained_codes(theta, block).items():
                out[f"{index}/{name}:codes"] = pack(codes, block.quantized[name].spec.bits)
            out |= {f"{index}/{name}:plain": value for name, value in block.params.items() if name in theta}
        return {name: value.cpu().contiguous() for name, value in out.items()}


def _snapped_later(position: Tensor, quantized: QTensor) -> Tensor:
    """The weight ``(code - zero) * scale`` of a position, straight through the rounding; deferred."""

    def make(position: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return fake_quantize(position, _unit_grid(zero), quantized.spec, scale.unsqueeze(-1))

    sources = (position, quantized.scale, quantized.zero)
    return defer(make, *sources, shape=position.shape, dtype=torch.float32)


def _trained_codes(theta: Theta, block: Committed) -> dict[str, Tensor]:
    return {
        name: _codes(theta[name + POSITION], quantized)
        for name, quantized in block.quantized.items()
        if name + POSITION in theta
    }


def _codes(position: Tensor, quantized: QTensor) -> Tensor:
    """The codes of a position, ``uint8 [out, in]``."""
    levels = codes_of(group(position, quantized.spec), _unit_grid(quantized.zero), quantized.spec)
    return levels.to(torch.uint8).view(position.shape)


def _unit_grid(zero: Tensor) -> Grid:
    """The grid of positions: a code is worth 1."""
    levels = zero.float().unsqueeze(-1)
    return Grid(torch.ones_like(levels), levels)


def _key(name: str, part: str) -> str:
    """The name of the gain of one of a weight's scales."""
    return name if part == "scale" else f"{name}:{part}"


def _is_norm(name: str, value: Tensor) -> bool:
    return value.dim() == 1 and name.endswith(".weight")
