"""What methods without training start from: each way alone and together, on trained models.

    python benchmarks/start.py MODELS [--models smollm2 ...] [--grids w2g64 ...] [--seeds 0 1 2] [--blocks N]

``MODELS`` has a folder of ``wheel_model.py`` for each model. A case is a model, a grid, a method and a seed, which
draws the samples: 16 of 256 tokens, measured on windows of 256 tokens of the evaluation text. Each is a process of
its own on one thread; finished cases stay in the results' file and are not repeated. With ``--blocks`` only the first
ones are quantized, which is quicker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from real_models import sentence_of

RESULTS = Path(__file__).parent / "results" / "start.json"
MODELS = ("smollm2", "gemma3-270m")
GRIDS = {
    "w2g64": ["--bits", "2", "--group-size", "64"],
    "w2g64-asym": ["--bits", "2", "--group-size", "64", "--asymmetric"],
    "w3g64": ["--bits", "3", "--group-size", "64"],
}
METHODS = ("rtn", "rtn(search=True)", "gptq(search=False, target=0)", "gptq(target=0)", "gptq(search=False)", "gptq")
SAMPLES, LENGTH = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=tuple(GRIDS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for model, grid, seed, method in product(args.models, args.grids, args.seeds, args.methods):
        results = known(args.out)
        name = f"{model} {grid}{f'/{args.blocks}' if args.blocks else ''} {method} {seed}"
        if name not in results:
            found = run(args.folder.resolve() / model, GRIDS[grid], method, seed, args.blocks, args.windows)
            args.out.write_text(json.dumps({**known(args.out), name: found}, indent=1) + "\n", encoding="utf-8")
            print(name, found, flush=True)
    show(known(args.out))


def known(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def run(folder: Path, grid: list[str], method: str, seed: int, blocks: int | None, windows: int) -> dict[str, float]:
    """Quantize one case, or its first ``blocks`` alone, and read its report."""
    with tempfile.TemporaryDirectory() as scratch:
        layers = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        kept = {f"*.layers.{index}.*": None for index in range(blocks or layers, layers)}
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(json.dumps({"grids": kept} if kept else {}), encoding="utf-8")
        out, started = Path(scratch) / "out", time.monotonic()
        command = [sys.executable, "-m", "swquant", "quantize", str(folder / "model"), "--out", str(out), *grid]
        command += ["--recipe", str(recipe)] if kept else []
        command += ["--method", method, "--seed", str(seed), "--samples", str(SAMPLES), "--seq-len", str(LENGTH)]
        command += ["--calibration", str(folder / "calibration.txt"), "--evaluation", str(folder / "evaluation.txt")]
        command += ["--evaluation-samples", str(windows), "--device", "cpu"]
        refusal = sentence_of(command)
        if refusal is not None:
            sys.exit(refusal)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        work = sum(block["seconds"] for block in report["blocks"])
        quality = {name: report["quality"][name] for name in ("kl", "perplexity", "perplexity_reference")}
        return {
            **quality,
            "windows": windows,
            "seconds": round(time.monotonic() - started, 1),
            "blocks": round(work, 1),
        }


def show(results: Mapping[str, Mapping[str, float]]) -> None:
    """Means over seeds, and each seed's divergence."""
    grouped: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for name, result in results.items():
        model, grid, rest = name.split(" ", 2)
        grouped.setdefault((model, grid, rest.rsplit(" ", 1)[0]), []).append(result)
    print("| model | grid | method | KL | perplexity | s | seeds |\n|---|---|---|---:|---:|---:|---:|")
    for (model, grid, method), found in sorted(grouped.items()):
        kl, perplexity, seconds = (statistics.mean(one[key] for one in found) for key in ("kl", "perplexity", "blocks"))
        print(f"| {model} | {grid} | `{method}` | {kl:.3f} | {perplexity:.1f} | {seconds:.0f} | {len(found)} |")


if __name__ == "__main__":
    main()
