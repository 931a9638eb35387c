"""Quantization-aware training with torchao at 2 bits, distilled from the model itself, with and without ours.

Written for torchao 0.18 (`pip install "swquant[torchao]"`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from shared import arguments, load, perplexity, windows
from swquant.losses import sliced_wasserstein_loss

try:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig
except ImportError as error:
    sys.exit(f'this example needs torchao 0.18: pip install "swquant[torchao]" ({error})')


def in_blocks(module: nn.Module, name: str) -> bool:
    """Whether it is a linear of a block; the head stays as it is."""
    return isinstance(module, nn.Linear) and ".layers." in name


def train(teacher: Any, batches: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> Any:
    """torchao's quantized model, its weights trained through fake quantization to the teacher's last hidden states."""
    student, grid = copy.deepcopy(teacher), IntxWeightOnlyConfig(torch.int2, PerGroup(32))
    quantize_(student, QATConfig(grid, step="prepare"), filter_fn=in_blocks)
    optimizer = torch.optim.Adam(student.model.layers.parameters(), lr=3e-4)
    for step in range(steps):
        tokens = batches[step % len(batches)]
        with torch.no_grad():
            target = teacher.model(input_ids=tokens).last_hidden_state
        loss(student.model(input_ids=tokens).last_hidden_state, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    quantize_(student, QATConfig(grid, step="convert"), filter_fn=in_blocks)
    return student


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way: its name and its perplexity."""
    options = arguments(__doc__ or "", steps=200).parse_args(argv)
    teacher, held_out = load(options).eval(), windows(options, options.evaluation, 32)
    batches = windows(options, options.calibration, options.samples).split(4)
    directions = torch.Generator().manual_seed(options.seed)

    def aligned(pred: Tensor, target: Tensor) -> Tensor:
        return 0.9 * mse_loss(pred, target) + 0.1 * sliced_wasserstein_loss(pred, target, generator=directions)

    print(f"original: {perplexity(teacher, held_out):.2f}")
    for name, loss, steps in (
        ("rounded", mse_loss, 0),
        ("mse", mse_loss, options.steps),
        ("0.9*mse + 0.1*sliced_wasserstein", aligned, options.steps),
    ):
        print(f"{name}: {perplexity(train(teacher, batches, loss, steps), held_out):.2f}", flush=True)


if __name__ == "__main__":
    main()
