"""Q2_K trained against its own grid, beside RTN on it and a uniform grid: the demo model, one seed.

    python benchmarks/kquants.py

Super-blocks have 256 weights and the demo model's MLP is 640 wide, so it is padded with zeros to 768 first, which
leaves the function as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from swquant import Recipe, quantize
from swquant.demo import CONTEXT, WINDOWS

WIDTH = 768
Q2_K, UNIFORM = {"grid": "q2_k"}, {"bits": 2, "group_size": 64, "symmetric": False}
TRAINED = "gptq + block_ap(epochs=4)"
RUNS = {
    "W2 g64 asymmetric, RTN": (UNIFORM, "rtn"),
    "W2 g64 asymmetric, trained": (UNIFORM, TRAINED),
    "Q2_K, RTN": (Q2_K, "rtn"),
    "Q2_K, GPTQ": (Q2_K, "gptq"),
    "Q2_K, trained": (Q2_K, TRAINED),
    "Q2_K, trained, then end to end": (Q2_K, f"{TRAINED} + end_to_end(epochs=3)"),
}


def padded(source: Path, out: Path) -> Path:
    """The model with an MLP of :data:`WIDTH`."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    more = WIDTH - config["intermediate_size"]
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": WIDTH}))
    tensors = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = torch.cat((value, value.new_zeros(more, value.shape[1])))
        elif name.endswith("down_proj.weight"):
            tensors[name] = torch.cat((value, value.new_zeros(value.shape[0], more)), 1)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--only", action="append", choices=RUNS, help="Some of the runs; repeatable.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    assets = Path(str(resources.files("swquant") / "demo_assets"))
    with tempfile.TemporaryDirectory() as folder:
        source = padded(assets / "model", Path(folder) / "model")
        for number, name in enumerate(arguments.only or RUNS):
            grid, method = RUNS[name]
            shared = {
                "calibration": str(assets / "calibration.txt"),
                "samples": 48,
                "seq_len": CONTEXT,
                "evaluation": str(assets / "evaluation.txt"),
                "evaluation_samples": arguments.windows,
                "device": "cpu",
                "format": "dequantized",
            }
            recipe = Recipe.from_mapping({**shared, **grid, "method": method})
            report = quantize(recipe, source, Path(folder) / str(number))
            quality = report.quality
            assert quality is not None
            perplexity = f"{quality.perplexity:.2f} | {quality.kl:.3f}"
            print(f"| {name} | {report.bits_per_weight:.3f} | {perplexity} | {report.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
