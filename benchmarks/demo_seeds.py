"""OmniQuant with and without the sliced-Wasserstein term on the demo model, over seeds.

    python benchmarks/demo_seeds.py

The seed decides which calibration windows are taken, their order and the slices. Differences are paired by seed; the
interval is Student's t at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from importlib import resources
from pathlib import Path

import torch
from scipy.stats import t

from swquant import Recipe, quantize
from swquant.demo import CONTEXT, WINDOWS

LOSSES = ("mse", "0.9*mse + 0.1*sliced_wasserstein")
EPOCHS = 8
RESULTS = Path(__file__).parent / "results" / "demo_seeds.json"


def summary(values: list[float]) -> dict[str, float]:
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.mean(values), 4), "interval95": round(half, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    assets = Path(str(resources.files("swquant") / "demo_assets"))
    rows: list[dict[str, object]] = []
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [("rtn", LOSSES[0], 0)] + [("omniquant", loss, seed) for seed in range(seeds) for loss in LOSSES]
        for number, (method, loss, seed) in enumerate(jobs):
            recipe = Recipe(
                bits=2,
                group_size=64,
                method=method,
                loss=loss if method == "omniquant" else None,
                epochs=EPOCHS if method == "omniquant" else None,
                calibration=str(assets / "calibration.txt"),
                samples=48,
                seq_len=CONTEXT,
                evaluation=str(assets / "evaluation.txt"),
                evaluation_samples=WINDOWS,
                seed=seed,
                device="cpu",
            )
            quality = quantize(recipe, assets / "model", Path(folder) / str(number)).quality
            assert quality is not None
            rows.append(
                {"method": method, "loss": loss, "seed": seed, "perplexity": quality.perplexity, "kl": quality.kl}
            )
            print(json.dumps(rows[-1]), flush=True)
            if method == "omniquant":
                for key, value in (("perplexity", quality.perplexity), ("kl", quality.kl)):
                    found.setdefault(loss, {}).setdefault(key, []).append(value)
    plain, aligned = (found[loss] for loss in LOSSES)
    result = {
        "torch": torch.__version__,
        "original_perplexity": quality.perplexity_reference,
        "rows": rows,
        "summary": {loss: {key: summary(values) for key, values in found[loss].items()} for loss in LOSSES},
        "difference": {key: summary([a - b for a, b in zip(aligned[key], plain[key], strict=True)]) for key in plain},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"]), json.dumps(result["difference"]))


if __name__ == "__main__":
    main()
