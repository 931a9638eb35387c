"""Kill runs at random moments, a hundred times, and compare what they end in with a run that nobody killed.

Each run is a process of its own and dies by SIGKILL at a moment drawn evenly over the time that a whole run takes; the
same call is then made again until it comes through. After every kill the output must be absent or whole; at the end of
every run its bits must be those of the run that was left alone.

    python benchmarks/faults.py --kills 100
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swquant import Recipe
from swquant.demo import ASSETS
from swquant.run import quantize

IGNORED = ("report.json", "report.html", "README.md")
"""Files with times in them."""

TIMED = ("blocks", "finish", "seconds", "advice")


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    runs: int = 0
    stages: dict[str, int] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=Path(str(ASSETS / "calibration.txt")))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = small_model(Path(folder) / "model")
        tally = kill(source, recipe(asked.text), Path(folder), asked.kills, random.Random(asked.seed))
    print(f"{tally.kills} kills, {tally.runs} runs came through with the same bits")
    for stage, count in sorted(tally.stages.items()):
        print(f"{count:4d} {stage}")


def small_model(folder: Path) -> Path:
    """A LLaMA of random weights with the demo's tokenizer; its blocks take so little that kills meet every stage."""
    assets = Path(str(ASSETS / "model"))
    vocabulary = json.loads((assets / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in assets.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def recipe(text: Path) -> Recipe:
    """Searches, a training of blocks, and one of the whole model."""
    return Recipe(
        group_size=32,
        method="gptq + block_ap(batch_size=2) + end_to_end(batch_size=2)",
        epochs=4,
        calibration=str(text),
        samples=4,
        seq_len=32,
        evaluation_samples=2,
        device="cpu",
    )


def kill(source: Path, what: Recipe, folder: Path, kills: int, moments: random.Random) -> Tally:
    """Kill runs of ``what`` until there have been ``kills``, each run until it comes through."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["swquant.run"])

    def start(out: Path) -> Any:
        process = processes.Process(target=quantize, args=(what, source, out))
        process.start()
        return process

    start(folder / "warm").join()
    began = time.monotonic()
    start(folder / "expected").join()
    whole = time.monotonic() - began
    expected, tally = bits(folder / "expected"), Tally()
    while tally.kills < kills:
        out = folder / f"out-{tally.runs}"
        while True:
            process = start(out)
            process.join(moments.uniform(0, 1.1 * whole) if tally.kills < kills else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                tally.kills += 1
                stage = stage_of(out)
                tally.stages[stage] = tally.stages.get(stage, 0) + 1
                continue
            if process.exitcode:
                sys.exit(f"a run that was killed before ended with code {process.exitcode}")
            break
        if bits(out) != expected:
            sys.exit(f"{out} has other bits than the run that was left alone")
        tally.runs += 1
    return tally


def bits(out: Path) -> dict[str, bytes]:
    """The content of every file that has no times in it, and what the report says beside them."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in IGNORED}
    report = json.loads((out / "report.json").read_text())
    return {**found, "report": json.dumps({key: report[key] for key in report if key not in TIMED}).encode()}


def stage_of(out: Path) -> str:
    """Where a run was when it was killed; an output must be whole if there is one."""
    work = out.with_name(f"{out.name}.swquant-work")
    if out.exists():
        bits(out)
        return "behind publishing"
    manifest = work / "manifest.json"
    if not manifest.exists():
        return "before the first block" if work.exists() else "before the start"
    state = json.loads(manifest.read_bytes())
    if state["final"] is not None:
        return "writing the output" if (work / "output").exists() else "behind the end-to-end stage"
    if state["training"] is not None:
        return f"end to end, behind epoch {state['training']['epoch']}"
    return f"behind {len(state['reports'])} blocks"


if __name__ == "__main__":
    main()
