"""A training step of OmniQuant with the paper's loss: ours against the formulation of the paper's code.

    python benchmarks/paper_step.py

The same random LLaMA block, tokens, grid (2 bits, groups of 64, asymmetric), loss (0.8 MSE + 0.2 sliced Wasserstein,
128 slices) and optimizer, no augmented loss, one thread. Theirs is written as it is there: every linear fakes
its weight's quantization by plain operations under autograd, the loss projects, sorts over the tokens by `torch.sort`
and takes the mean absolute difference, it is read before the backward pass, the norm of all gradients after it. Steps
of both alternate, so that both see the same machine. Medians of the processor's time. Theirs, which computes in float32
on a CPU, is compared with both of our precisions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import swquant.run as run
from memory import make
from step_cost import Clock, first_block
from swquant.quant.through import clamped
from swquant.recipe import Recipe

GROUP, LEVELS, SLICES, SHARE = 64, 3, 128, 0.2
SIZES = ((256, 256), (256, 2048), (1024, 2048))
RESULTS = Path(__file__).parent / "results" / "paper_step.json"


def rounded(values: Tensor) -> Tensor:
    """Round to the nearest; the gradient passes."""
    return (values.round() - values).detach() + values


def faked(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The weight through a grid between its groups' minima and maxima times learned factors."""
    groups = weight.reshape(-1, GROUP)
    least = groups.amin(1, keepdim=True) * torch.sigmoid(low)
    most = groups.amax(1, keepdim=True) * torch.sigmoid(high)
    scale = clamped(most - least, 1e-5) / LEVELS
    zero = clamped(-rounded(least / scale), 0, LEVELS)
    codes = clamped(rounded(groups / scale) + zero, 0, LEVELS)
    return ((codes - zero) * scale).reshape(weight.shape)


def loss(target: Tensor, output: Tensor) -> Tensor:
    directions = torch.randn(output.shape[-1], SLICES)
    directions = directions / directions.norm(dim=0, keepdim=True)
    clouds = (cloud.float().reshape(-1, cloud.shape[-1]) @ directions for cloud in (target, output))
    ours, theirs = (torch.sort(cloud, dim=0).values for cloud in clouds)
    return (1 - SHARE) * F.mse_loss(output, target) + SHARE * (ours - theirs).abs().mean()


def paper_step(folder: Path, tokens: int) -> Callable[[], None]:
    """One step on one sample."""
    forward, params = first_block(folder, tokens)
    names = [name for name, value in params.items() if value.dim() == 2]
    clips = {name: _logits(params[name]) for name in names}
    optimizer = torch.optim.AdamW([one for pair in clips.values() for one in pair], lr=1e-2, weight_decay=0.0)
    hidden = torch.randn(
        1, tokens, params["input_layernorm.weight"].numel(), generator=torch.Generator().manual_seed(0)
    )
    target = forward(params, hidden).detach()

    def once() -> None:
        weights: Mapping[str, Tensor] = params | {name: faked(params[name], *clips[name]) for name in names}
        value = loss(target, forward(weights, hidden))
        assert math.isfinite(value.item())
        optimizer.zero_grad()
        value.backward()
        torch.stack([one.grad.norm() for pair in clips.values() for one in pair if one.grad is not None]).norm()
        optimizer.step()

    return once


def _logits(weight: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (torch.full((weight.numel() // GROUP, 1), 4.0, requires_grad=True) for _ in range(2))
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="three steps each")
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for (width, tokens), precision in itertools.product(SIZES, ("float32", "bfloat16")):
        text = torch.randint(2, 256, (4, tokens), generator=torch.Generator().manual_seed(0))
        run.draw_from_model = lambda *_, text=text: text
        recipe = Recipe(
            calibration="self",
            bits=2,
            group_size=GROUP,
            symmetric=False,
            method=f"omniquant(epochs={epochs}, augmented=False, transform=False)",
            loss=f"{1 - SHARE}*mse + {SHARE}*sliced_wasserstein(slices={SLICES})",
            samples=4,
            seq_len=tokens,
            evaluation_samples=0,
            device="cpu",
            precision=precision,
        )
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "model", 1, tokens, width)
            clock = Clock(paper_step(Path(folder) / "model", tokens))
            run.quantize(recipe, Path(folder) / "model", Path(folder) / "out", observer=clock)
        ratio = statistics.median(clock.steps) / statistics.median(clock.plains)
        setting = {"width": width, "tokens": tokens, "our precision": precision}
        rows.append({**setting, "ours / paper's": round(ratio, 3), "steps": len(clock.steps)})
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
