"""Block reconstruction at 2 bits, in thirty lines of plain torch: the mean squared error, with and without ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrize import register_parametrization

from shared import arguments, load, perplexity, windows
from swquant.losses import sliced_wasserstein_loss


class Rounded(nn.Module):
    """A weight on a grid of ``2**bits`` levels per group; scales and offsets learned, rounding straight through."""

    def __init__(self, weight: Tensor, bits: int = 2, group: int = 64) -> None:
        super().__init__()
        self.group, self.top = group, 2**bits - 1
        low, high = weight.detach().view(-1, group).aminmax(dim=1, keepdim=True)
        self.scale, self.low = nn.Parameter((high - low) / self.top), nn.Parameter(low)

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized weight."""
        codes = (weight.view(-1, self.group) - self.low) / self.scale
        # Not clamp, which from torch 2.14 on has no gradient at its ends, where each group's extremes stand.
        codes = torch.where(codes < 0, 0, torch.where(codes > self.top, self.top, codes))
        codes = codes + (codes.round() - codes).detach()
        return (codes * self.scale + self.low).view_as(weight)


def reconstruct(
    block: nn.Module, calls: Sequence[tuple[Tensor, dict[str, Any], Tensor]], loss: Callable[..., Tensor], steps: int
) -> None:
    """Round a block's weights, then train it to put out for each call's hidden states what the original did."""
    for linear in [module for module in block.modules() if isinstance(module, nn.Linear)]:
        register_parametrization(linear, "weight", Rounded(linear.weight))
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-4)
    for step in range(steps):
        hidden, options, target = calls[step % len(calls)]
        loss(block(hidden, **options), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def record(blocks: nn.ModuleList, run: Callable[[], object]) -> list[tuple[Tensor, dict[str, Any], Tensor]]:
    """What each block is called with and puts out: hidden states, other arguments, output."""
    seen: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    keep = [
        block.register_forward_hook(lambda _, args, others, out: seen.append((args[0], others, out)), with_kwargs=True)
        for block in blocks
    ]
    with torch.no_grad():
        run()
    for hook in keep:
        hook.remove()
    return seen


def quantize(model: Any, batches: Sequence[Tensor], loss: Callable[..., Tensor], steps: int) -> Any:
    """A copy of the model whose blocks are reconstructed one after the other, each on what those before it put out."""
    result = copy.deepcopy(model)
    recorded = [record(model.model.layers, lambda ids=ids: model(input_ids=ids, use_cache=False)) for ids in batches]
    hidden = [calls[0][0] for calls in recorded]
    for index, block in enumerate(result.model.layers):
        calls = [(state, *of[index][1:]) for state, of in zip(hidden, recorded, strict=True)]
        reconstruct(block, calls, loss, steps)
        with torch.no_grad():
            hidden = [block(state, **options) for state, options, _ in calls]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each way: its name and its perplexity."""
    options = arguments(__doc__ or "", steps=48).parse_args(argv)
    model, held_out = load(options).eval().requires_grad_(False), windows(options, options.evaluation, 32)
    batches = windows(options, options.calibration, options.samples).split(4)
    directions = torch.Generator().manual_seed(options.seed)

    def aligned(pred: Tensor, target: Tensor) -> Tensor:
        return 0.9 * mse_loss(pred, target) + 0.1 * sliced_wasserstein_loss(pred, target, generator=directions)

    print(f"original: {perplexity(model, held_out):.2f}")
    for name, loss, steps in (
        ("rounded", mse_loss, 0),
        ("mse", mse_loss, options.steps),
        ("0.9*mse + 0.1*sliced_wasserstein", aligned, options.steps),
    ):
        trained = copy.deepcopy(model).requires_grad_(True)
        print(f"{name}: {perplexity(quantize(trained, batches, loss, steps), held_out):.2f}", flush=True)


if __name__ == "__main__":
    main()
