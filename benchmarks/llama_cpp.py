"""Our GGUF files beside llama.cpp's own quantization of the same model, all measured by one llama.cpp.

    python benchmarks/llama_cpp.py [--runtime DIR] [--work DIR] [--out benchmarks/results/llama_cpp.json]

The model is the demo's, its MLPs widened by channels of zeros to a multiple of 256, which K blocks need and which
changes nothing. llama.cpp is the prebuilt one of npm's node-llama-cpp (``node_llama_cpp.py``), on one thread. Its own
rows are ``llama_model_quantize`` from a bfloat16 file: "mixture" is what ``llama-quantize`` makes by default, with more
bits for some weights and quantized embeddings; "alike" has the named type in all linear layers and leaves the
embeddings as they are, as ours does. Speed is that of generating, after a prompt of 16 tokens; rounds go through all
files in turn, so that other work on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

import node_llama_cpp
import swquant
from swquant import Recipe, quantize
from swquant.calibration import eval_windows
from swquant.checkpoint.quantized import Outline, QuantizedModel
from swquant.checkpoint.reader import open_checkpoint
from swquant.corpus import read_text, tokenize
from swquant.formats.gguf import Gguf
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import open_reading

ASSETS = Path(swquant.__file__).parent / "demo_assets"
RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
WINDOWS, LENGTH, SAMPLES = 32, 256, 32
ROUNDS, PROMPT, GENERATED = 5, 16, 128
TRAINED = "gptq + block_ap(epochs=2) + end_to_end(epochs=2)"
FILE_TYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q4_0": 2}


@dataclass(frozen=True)
class Row:
    """A file to measure: its name, who made it, and how it is made in a directory."""

    name: str
    by: str
    make: Callable[[Path], Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runtime", type=Path, default=Path(tempfile.gettempdir()) / "swquant-node-llama-cpp")
    parser.add_argument("--work", type=Path, help="keep the files here, and go on where a killed run stopped")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = node_llama_cpp.install(arguments.runtime)
    with tempfile.TemporaryDirectory() as scratch:
        source = widened(Path(scratch) / "model")
        rows = all_rows(folder, source, write_plain(source, Path(scratch) / "plain"))
        places = [(arguments.work or Path(scratch)) / f"row{index}" for index in range(len(rows))]
        files = {f"{row.by}, {row.name}": row.make(place) for row, place in zip(rows, places, strict=True)}
        results = measure(folder, source, files)
    answer = {"llama.cpp": f"node-llama-cpp {node_llama_cpp.VERSION}", "processor": processor(), "rows": results}
    arguments.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    show(results)


def widened(folder: Path) -> Path:
    """The demo model with MLPs of a multiple of 256 channels."""
    shutil.copytree(ASSETS / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    more = -config["intermediate_size"] % 256
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = pad(tensor, (0, 0, 0, more)).contiguous()
        elif name.endswith("down_proj.weight"):
            tensors[name] = pad(tensor, (0, more)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["intermediate_size"] += more
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_plain(source: Path, out: Path) -> Path:
    """The model as it is, as a GGUF file for llama.cpp's quantizer."""
    checkpoint = open_checkpoint(source)
    outline = Outline(source, checkpoint.config, QuantSpec(8, 32, True), checkpoint.dtype, {}, ("lm_head",))
    Gguf().write(out, QuantizedModel(outline, lambda: ({name: checkpoint.read(name)} for name in checkpoint.tensors)))
    return out / "model.gguf"


def all_rows(folder: Path, source: Path, plain: Path) -> list[Row]:
    def theirs(name: str, *, alike: bool) -> Row:
        def make(out: Path) -> Path:
            out.mkdir(parents=True, exist_ok=True)
            node_llama_cpp.quantize(folder, plain, out / "model.gguf", FILE_TYPES[name], alike=alike)
            return out / "model.gguf"

        return Row(f"{name} {'alike' if alike else 'mixture'}", "llama.cpp", make)

    def ours(name: str, method: str, **grid: Any) -> Row:
        return Row(f"{name} by {method}", "swquant", lambda out: quantized(source, out, method, grid))

    uniform = {"bits": 2, "group_size": 64, "symmetric": True}
    return [
        Row("bfloat16", "original", lambda out: plain),
        theirs("Q2_K", alike=False),
        theirs("Q2_K", alike=True),
        ours("Q2_K", "rtn", grid="q2_k"),
        ours("Q2_K", "gptq", grid="q2_k"),
        ours("Q2_K", TRAINED, grid="q2_k"),
        ours("Q2_0", "gptq", **uniform),
        ours("Q2_0", TRAINED, **uniform),
        theirs("Q3_K_S", alike=True),
        ours("Q3_K", "gptq", grid="q3_k"),
        theirs("Q4_0", alike=True),
        ours("Q4_0", "gptq", bits=4, group_size=32, symmetric=True),
    ]


def quantized(source: Path, out: Path, method: str, grid: dict[str, Any]) -> Path:
    settings = {
        **grid,
        "method": method,
        "format": "gguf",
        "calibration": str(ASSETS / "calibration.txt"),
        "evaluation_samples": 0,
        "samples": SAMPLES if method != "rtn" else 1,
        "device": "cpu",
    }
    quantize(Recipe.from_mapping(settings), source, out)
    return out / "model.gguf"


def measure(folder: Path, source: Path, files: dict[str, Path]) -> list[dict[str, Any]]:
    reading = open_reading(source)
    tokens = tokenize(reading.tokenizer, read_text(str(ASSETS / "evaluation.txt")))
    windows = eval_windows(tokens, LENGTH, WINDOWS, reading.begin)
    speeds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(ROUNDS):
        for name, file in files.items():
            speeds[name] += speed(folder, file, windows[0, :PROMPT])
    return [
        {
            "name": name,
            "bytes": file.stat().st_size,
            "perplexity": perplexity(folder, file, windows),
            "tokens_per_second": statistics.median(speeds[name]),
            "rounds": [round(value, 1) for value in speeds[name]],
        }
        for name, file in files.items()
    ]


def perplexity(folder: Path, file: Path, windows: Tensor) -> float:
    found = node_llama_cpp.ask(folder, file, windows=windows.tolist())["logProbabilities"]
    return float(torch.exp(-torch.tensor(found, dtype=torch.float64).mean()))


def speed(folder: Path, file: Path, prompt: Tensor) -> list[float]:
    job = {"prompt": prompt.tolist(), "tokens": GENERATED, "repeats": 3}
    return node_llama_cpp.ask(folder, file, speed=job)["tokensPerSecond"][1:]


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def show(results: list[dict[str, Any]]) -> None:
    print("| | MB | perplexity | tokens/s |\n|---|---:|---:|---:|")
    for row in results:
        size, found = row["bytes"] / 1e6, row["perplexity"]
        print(f"| {row['name']} | {size:.2f} | {found:.2f} | {row['tokens_per_second']:.0f} |")


if __name__ == "__main__":
    main()
