"""GPTQ of a whole model: ours beside gptqmodel's, run by run in turns on the CPU.

    python benchmarks/gptq_speed.py MODEL_DIR --peer-python PATH [--layers 3] [--samples 16] [--seq-len 512]

The model is cut to its first ``--layers`` blocks. Both sides get the same tokens, 2 bits, groups of 64, symmetric
grids, columns in their own order, ranges that are not searched, one sample at a time on one thread; each run is a
process of its own, ours and theirs by turns. Ours is all that ``swquant.quantize`` does: the checkpoint read and
hashed, the journal, the files written and read again, numba's compilation; theirs is ``quantize`` and ``save``. Neither
includes imports. gptqmodel runs as it comes, in bfloat16 (it takes two workers at least). Ratios are of the processor's
time, with the range of the repeats. A further run of ours under a profiler says where the time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peer_python import interpreter

RESULTS = Path(__file__).parent / "results" / "gptq_speed.json"
BITS, GROUP = 2, 64
REQUIRED = "gptqmodel==7.6.0"

COMMON = """
import json, sys, time
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
tokens = load_file(job["tokens"])["tokens"]
def begin():
    global began
    began = time.perf_counter(), time.process_time()
def end(**more):
    took = [round(now - then, 3) for now, then in zip((time.perf_counter(), time.process_time()), began)]
    json.dump({"seconds": took[0], "cpu_seconds": took[1], **more}, open(job["answer"], "w"))
"""

OURS = """
import cProfile, pstats
import swquant.run as run
from swquant import Recipe
run.draw_from_model = lambda *_: tokens
samples, length = tokens.shape
recipe = Recipe(bits=job["bits"], group_size=job["group"], symmetric=True, method="gptq(search=False)", samples=samples,
                seq_len=length, evaluation_samples=0, device="cpu")
watching = cProfile.Profile()
begin()
if job["profile"]:
    watching.enable()
run.quantize(recipe, job["model"], job["out"])
watching.disable()
found = {}
if job["profile"]:
    for (file, _, name), (_, _, _, spent, _) in pstats.Stats(watching).stats.items():
        if "swquant" in file:
            found[name] = found.get(name, 0) + spent
end(profile=found)
"""

THEIRS = """
from gptqmodel import GPTQModel, QuantizeConfig
grid = QuantizeConfig(bits=job["bits"], group_size=job["group"], sym=True, desc_act=False)
model = GPTQModel.load(job["model"], grid, device="cpu")
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
begin()
model.quantize(rows, batch_size=1)
model.save(job["out"])
end()
"""

PARTS = {
    "reading, samples, first hidden states": "_make_ready",
    "passes of the original": "reference",
    "GPTQ: passes and Hessians": "input_moments",
    "GPTQ: Cholesky and inverse": "_factored",
    "GPTQ: columns": "_compensated",
    "GPTQ: errors for the report": "add",
    "the run state": "finish_block",
    "the output": "write_output",
}
"""What a run's time is divided into, and the function whose time it is; the rest is passes and what is around."""


def cut(model: Path, layers: int, out: Path) -> None:
    """A copy of a checkpoint of one file with its first blocks alone."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(config))
    kept = {
        name: value
        for name, value in load_file(model / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, out / "model.safetensors", {"format": "pt"})


def run(python: str, code: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side's run in a process of its own."""
    path, answer, out = folder / "job.json", folder / "answer.json", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    path.write_text(json.dumps({**job, "answer": str(answer), "out": str(out)}))
    single = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    environment = {**os.environ, **single}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", COMMON + code, str(path)], env=environment, cwd=folder, capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"gptq_speed: a side failed: {' '.join(last)[:300]}")
    return json.loads(answer.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", type=interpreter, required=True, help=f"an interpreter that has {REQUIRED}")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    times: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(prefix="swquant-gptq-") as name:
        folder = Path(name)
        cut(args.model, args.layers, folder / "model")
        rng = torch.Generator().manual_seed(0)
        save_file(
            {"tokens": torch.randint(2, 40000, (args.samples, args.seq_len), generator=rng)}, folder / "tokens.st"
        )
        job = {"model": str(folder / "model"), "tokens": str(folder / "tokens.st"), "bits": BITS, "group": GROUP}
        for _ in range(args.repeats):
            for side, python, code in (("ours", sys.executable, OURS), ("theirs", args.peer_python, THEIRS)):
                times[side].append(run(python, code, {**job, "profile": False}, folder))
                print(side, json.dumps(times[side][-1]), flush=True)
        profiled = run(sys.executable, OURS, {**job, "profile": True}, folder)
    found = {part: round(profiled["profile"].get(function, 0.0), 2) for part, function in PARTS.items()}
    ratios = sorted(
        ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in zip(times["ours"], times["theirs"], strict=True)
    )
    row = {
        **{key: value for key, value in vars(args).items() if key in ("layers", "samples", "seq_len", "repeats")},
        "torch": torch.__version__,
        "peer": REQUIRED,
        "ours / theirs, processor": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "cpu_seconds": {side: [one["cpu_seconds"] for one in runs] for side, runs in times.items()},
        "seconds": {side: [one["seconds"] for one in runs] for side, runs in times.items()},
        "profile of ours, seconds": {**found, "whole": profiled["seconds"]},
    }
    print(json.dumps(row, indent=1))
    RESULTS.write_text(json.dumps(row, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
