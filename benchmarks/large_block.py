"""Quantize one block of the width of LLaMA-2-70B, and set the memory that it takes beside what `plan` says.

The block has random weights, and before it and after it are the demo's vocabulary and tokenizer. The run is a
process of its own with a budget; its peak is `VmHWM` of /proc, mapped files included, so this needs Linux.

    python benchmarks/large_block.py --out benchmarks/results/large_block.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from swquant.demo import ASSETS
from swquant.plan import versions

GLANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="omniquant(epochs=1)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--budget", default="8GB")
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True, help="where the results go as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = make_model(Path(folder) / "model", asked.width)
        given = [
            *(str(Path(folder) / "model"), f"--method={asked.method}", f"--samples={asked.samples}"),
            *(f"--seq-len={asked.seq_len}", "--evaluation-samples=0", f"--host-memory={asked.budget}", "--device=cpu"),
            f"--calibration={ASSETS / 'calibration.txt'}",
        ]
        planned = json.loads(subprocess.check_output([*swquant("plan"), *given, "--no-time", "--json"]))
        peak, seconds = peak_of([*swquant("quantize"), *given, f"--out={Path(folder) / 'out'}"])
    report = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "parameters_of_the_block": planned["quantized"],
        "recipe": {name: value for name, value in planned["recipe"].items() if name != "calibration"},
        "budget": asked.budget,
        "planned_bytes": planned["host"],
        "planned_parts": planned["parts"],
        "peak_bytes": peak,
        "planned_by_measured": round(planned["host"] / peak, 3),
        "seconds": round(seconds),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"planned {planned['host'] / 1e9:.2f} GB, held at most {peak / 1e9:.2f} GB, budget {asked.budget}")


def swquant(what: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "swquant", what]


def make_model(folder: Path, width: int) -> LlamaConfig:
    """A LLaMA of one block of random bfloat16 weights, 3.5 times as wide within as 70B's is; written to ``folder``."""
    folder.mkdir()
    assets = Path(str(ASSETS / "model"))
    config = LlamaConfig(
        vocab_size=json.loads((assets / "config.json").read_text())["vocab_size"],
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 1024),
        max_position_embeddings=4096,
    )
    rng = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=rng)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    for path in assets.glob("tokenizer*"):
        shutil.copy(path, folder)
    return config


def peak_of(command: list[str]) -> tuple[int, float]:
    """The most bytes that a process has held, and its seconds."""
    began, process, peak = time.monotonic(), subprocess.Popen(command), 0
    while process.poll() is None:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(GLANCE)
    if process.returncode:
        sys.exit(f"the run ended with code {process.returncode}")
    return peak, time.monotonic() - began


def high_water_mark(pid: int) -> int:
    """Bytes; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max([int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")], default=0)


if __name__ == "__main__":
    main()
