"""What the sliced-Wasserstein term adds to an OmniQuant step on a block of width 1024 with 2048 tokens.

    python benchmarks/step_cost.py

Two runs, one with each loss, on a random LLaMA of one block; rounds are interleaved. The time is that of the block, in
which the steps are nearly all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

import swquant.run as run
from memory import WIDTH, make
from swquant.recipe import Recipe

TOKENS, SAMPLES, EPOCHS = 2048, 4, 2
LOSSES = {"mse": "mse", "both": "0.9*mse + 0.1*sliced_wasserstein"}
RESULTS = Path(__file__).parent / "results" / "step_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    text = torch.randint(2, 256, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = lambda *_: text
    shared = Recipe(samples=SAMPLES, seq_len=TOKENS, epochs=EPOCHS, evaluation_samples=0, device="cpu")
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "model", 1, TOKENS)
        for number in range(rounds):
            seconds = {
                name: run.quantize(shared.override({"loss": loss}), place / "model", place / f"{name}{number}").seconds
                for name, loss in LOSSES.items()
            }
            ratios.append(seconds["both"] / seconds["mse"])
            print(json.dumps(seconds), flush=True)
    result = {
        "width": WIDTH,
        "tokens": TOKENS,
        "rounds": rounds,
        "with the term / without": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
