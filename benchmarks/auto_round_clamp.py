"""auto-round at 2 bits on torch 2.14 and newer, as it comes and within our context, on the demo model over seeds.

    python benchmarks/auto_round_clamp.py

by an interpreter with auto-round and such a torch: ``pip install "swquant[auto-round]" "torch>=2.14"``. From 2.14 on
``clamp`` has no gradient at its ends, where at 2 bits most codes stand; ``auto_round_loss("mse")`` gives it back and
leaves the loss as it is. The seed decides which calibration windows are taken and the order of the batches. Ratios are
paired by seed; the interval is Student's t at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib import resources
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from swquant import SwquantError
from swquant.calibration import eval_windows, sample_windows
from swquant.corpus import read_text, tokenize
from swquant.demo import CONTEXT, WINDOWS
from swquant.evaluation.perplexity import window_nll
from swquant.integrations.auto_round import auto_round_loss
from swquant.tokenizer import open_reading

GRIDS: Mapping[str, Mapping[str, Any]] = {
    "symmetric": {"bits": 2, "group_size": 64, "sym": True},
    "asymmetric": {"bits": 2, "group_size": 64, "sym": False},
}
SAMPLES, LENGTH, BATCH, STEPS = 64, 64, 8, 200
WAYS = {"as it comes": nullcontext, "within the context": lambda: auto_round_loss("mse")}
RESULTS = Path(__file__).parent / "results" / "auto_round_clamp.json"


def require_open_clamp() -> None:
    """Refuse a torch on which there is nothing to see."""
    end = torch.ones((), requires_grad=True)
    end.clamp(max=1).backward()
    if end.grad is not None and bool(end.grad):
        raise SwquantError(f"torch {torch.__version__} has the gradient at clamp's ends: install torch>=2.14")


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = [window_nll(model(input_ids=rows).logits, rows) for rows in windows.split(8)]
    return float(torch.cat(losses).double().mean().exp())


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def assets() -> Path:
    return Path(str(resources.files("swquant") / "demo_assets"))


def tokens(name: str) -> tuple[Tensor, int | None]:
    """A text's tokens, and the one that windows begin with."""
    reading = open_reading(assets() / "model")
    return tokenize(reading.tokenizer, read_text(str(assets() / f"{name}.txt"))), reading.begin


def held_out() -> Tensor:
    text, begin = tokens("evaluation")
    return eval_windows(text, CONTEXT, WINDOWS, begin)


def trained(grid: str, seed: int, steps: int, way: str) -> Any:
    """The model that auto-round makes, in memory, with dequantized weights."""
    from auto_round import AutoRound

    text, begin = tokens("calibration")
    windows = sample_windows(text, SAMPLES, LENGTH, seed, begin).split(1)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    with WAYS[way]():
        quantizer = AutoRound(
            loaded(assets() / "model"), tokenizer=AutoTokenizer.from_pretrained(assets() / "model"), dataset=rows,
            nsamples=SAMPLES, seqlen=LENGTH, iters=steps, batch_size=BATCH, seed=seed, device_map="cpu", amp=False,
            enable_torch_compile=False, low_cpu_mem_usage=False, **GRIDS[grid],
        )  # fmt: skip
        return quantizer.quantize()[0].eval()


def measured(grid: str, seed: int, steps: int, way: str) -> dict[str, Any]:
    """A row of the results."""
    torch.set_num_threads(1)
    began = time.process_time()
    model = trained(grid, seed, steps, way)
    spent = round(time.process_time() - began, 1)
    row = {"seed": seed, "way": way, "perplexity": perplexity(model, held_out()), "cpu_seconds": spent}
    print(json.dumps(row), flush=True)
    return row


def interval(values: list[float]) -> dict[str, float]:
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.mean(values), 4), "interval95": round(half, 4)}


def compared(grid: str, seeds: int, steps: int, processes: int) -> dict[str, Any]:
    """Both ways on all seeds; nats lost are those over the original."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [pool.submit(measured, grid, seed, steps, way) for seed in range(seeds) for way in WAYS]
        rows = [job.result() for job in jobs]
    original = perplexity(loaded(assets() / "model"), held_out())
    plain, closed = ([row["perplexity"] for row in rows if row["way"] == way] for way in WAYS)
    pairs = list(zip(plain, closed, strict=True))
    return {
        "versions": {name: version(name) for name in ("torch", "auto-round", "transformers")},
        "setting": {
            **GRIDS[grid], "samples": SAMPLES, "length": LENGTH, "steps": steps, "batch_size": BATCH,
            "evaluation_windows": WINDOWS, "evaluation_length": CONTEXT, "threads": 1,
        },
        "original_perplexity": original,
        "rows": rows,
        "summary": {way: interval(values) for way, values in zip(WAYS, (plain, closed), strict=True)},
        "ratio": interval([one / other for one, other in pairs]),
        "ratio_of_nats_lost": interval([math.log(one / original) / math.log(other / original) for one, other in pairs]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="grids that are in it and were not run again stay")
    options = parser.parse_args()
    require_open_clamp()
    for grid in options.grids:
        result = compared(grid, options.seeds, options.steps, options.processes)
        known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        options.out.write_text(json.dumps({**known, grid: result}, indent=1) + "\n", encoding="utf-8")
        print(
            json.dumps({key: result[key] for key in ("original_perplexity", "summary", "ratio", "ratio_of_nats_lost")})
        )


if __name__ == "__main__":
    main()
