"""Kill runs a hundred times, spread over everything that a run does, and compare what they end in with an unkilled one.

Each run is a process of its own. It is killed once in each stage, in their order, and started again by the same call
each time: as it enters the stage, or for the second time, it sets a timer of the kernel, drawn evenly over the time
that the stage took in a run that was left alone. The timer's signal ends it as SIGKILL would, without another
instruction. A kill is counted where the process was when it died. After every kill the output must be absent or whole;
at the end of every run its bits must be those of the run that was left alone.

    python benchmarks/faults.py --kills 100 --out benchmarks/results/faults.json
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import swquant.run
from swquant import Recipe
from swquant.demo import ASSETS
from swquant.engine.run_state import RunState
from swquant.phases.gptq import Gptq
from swquant.phases.train import Train
from swquant.plan import versions

IGNORED = ("report.json", "report.html", "README.md")
"""Files with times in them."""

TIMED = ("blocks", "finish", "seconds", "advice")

ELSEWHERE = "between"
STAGES: dict[str, tuple[Any, str]] = {
    "sampling": (swquant.run, "_samples"),
    "first hidden states": (RunState, "begin"),
    "block: GPTQ": (Gptq, "run"),
    "block: training": (Train, "run"),
    "block: commit": (RunState, "finish_block"),
    "end to end: training": (swquant.run, "train_scales"),
    "end to end: save of an epoch": (RunState, "save_training"),
    "end to end: commit": (RunState, "finish_training"),
    "measuring": (swquant.run, "_quality"),
    "writing the output": (swquant.run, "write_output"),
    "publishing": (swquant.run, "publish"),
    "clearing up": (RunState, "clear"),
}
"""Where kills are aimed at: functions by what they do; the innermost counts."""

NAMES = (ELSEWHERE, *STAGES)
REPEATED = ("block: GPTQ", "block: training", "block: commit", "end to end: save of an epoch")
"""Those that a run comes to several times."""


@dataclass
class Tally:
    """What happened."""

    runs: int = 0
    stages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))

    @property
    def kills(self) -> int:
        """In all stages together."""
        return sum(self.stages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=Path(str(ASSETS / "calibration.txt")))
    parser.add_argument("--out", type=Path, default=None, help="where the results go as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = small_model(Path(folder) / "model")
        tally = kill(source, recipe(asked.text), Path(folder), asked.kills, random.Random(asked.seed))
    print(f"{tally.kills} kills, {tally.runs} runs came through with the same bits")
    for stage, count in tally.stages.items():
        print(f"{count:4d} {stage}")
    if asked.out is not None:
        found = {"kills": tally.kills, "runs_with_the_same_bits": tally.runs, "by_stage": tally.stages}
        asked.out.write_text(json.dumps({**found, "seed": asked.seed, "versions": versions()}, indent=1) + "\n")


def small_model(folder: Path) -> Path:
    """A LLaMA of random weights with the demo's tokenizer."""
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


@dataclass(frozen=True)
class Aim:
    """When to die: ``delay`` seconds after the beginning of visit number ``visit`` to a stage."""

    stage: str
    visit: int
    delay: float


class Tracker:
    """Where a run is, in memory that outlives it, and the timer that ends it."""

    def __init__(self, place: Any, longest: Any, aim: Aim | None) -> None:
        self.place, self.longest, self.aim, self.left = place, longest, aim, 0 if aim is None else aim.visit

    def around(self, work: Callable[..., Any], number: int) -> Callable[..., Any]:
        """``work``, known as stage ``number`` while it is done."""

        @functools.wraps(work)
        def run(*arguments: Any, **named: Any) -> Any:
            before, self.place.value = self.place.value, number
            began = time.monotonic()
            if self.aim is not None and NAMES[number] == self.aim.stage:
                self.left -= 1
                if self.left < 0:
                    signal.setitimer(signal.ITIMER_REAL, self.aim.delay)
            try:
                return work(*arguments, **named)
            finally:
                self.place.value = before
                self.longest[number] = max(self.longest[number], time.monotonic() - began)

        return run


def victim(place: Any, longest: Any, aim: Aim | None, what: Recipe, source: Path, out: Path) -> None:
    """The run, in a process of its own that says where it is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tracker = Tracker(place, longest, aim)
    for number, (owner, name) in enumerate(STAGES.values(), 1):
        setattr(owner, name, tracker.around(getattr(owner, name), number))
    swquant.run.quantize(what, source, out)


class Bench:
    """Starts runs of ``what`` on ``source`` and looks at where they die."""

    def __init__(self, what: Recipe, source: Path) -> None:
        self.what, self.source = what, source
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["swquant.run"])
        self.place = self.processes.Value("i", 0, lock=False)
        self.longest = self.processes.Array("d", len(NAMES), lock=False)

    def killed(self, out: Path, aim: Aim | None) -> str | None:
        """The stage in which the run died, and ``None`` if it came through."""
        self.place.value = 0
        arguments = (self.place, self.longest, aim, self.what, self.source, out)
        process = self.processes.Process(target=victim, args=arguments)
        process.start()
        process.join()
        if process.exitcode == -signal.SIGALRM:
            return NAMES[self.place.value]
        if process.exitcode:
            sys.exit(f"a run ended with code {process.exitcode}")
        return None


def kill(source: Path, what: Recipe, folder: Path, kills: int, moments: random.Random) -> Tally:
    """Kill runs of ``what`` until there have been ``kills``, each run in one stage after the other."""
    bench, tally = Bench(what, source), Tally()
    bench.killed(folder / "expected", None)
    expected, longest = bits(folder / "expected"), dict(zip(NAMES, bench.longest, strict=True))
    while tally.kills < kills:
        out = folder / f"out-{tally.runs}"
        for stage in STAGES:
            aim = Aim(stage, moments.randrange(2) if stage in REPEATED else 0, moments.uniform(1e-6, longest[stage]))
            died = bench.killed(out, aim) if tally.kills < kills else None
            if died is not None:
                tally.stages[died] += 1
                require_whole(out, expected)
        bench.killed(out, None)
        if bits(out) != expected:
            sys.exit(f"{out} has other bits than the run that was left alone")
        tally.runs += 1
        shutil.rmtree(out)
    return tally


def bits(out: Path) -> dict[str, bytes]:
    """The content of every file that has no times in it, and what the report says beside them."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in IGNORED}
    report = json.loads((out / "report.json").read_text())
    return {**found, "report": json.dumps({key: report[key] for key in report if key not in TIMED}).encode()}


def require_whole(out: Path, expected: dict[str, bytes]) -> None:
    """An output that is there after a kill is all there."""
    if out.exists() and bits(out) != expected:
        sys.exit(f"{out} was published before it was whole")


if __name__ == "__main__":
    main()
