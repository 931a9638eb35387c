"""A training step of SignRound: ours against auto-round's, in turns.

    python benchmarks/peer_steps.py --peer-python PATH

The same model, tokens, bits, groups and batch in an interpreter of each side's own, both on one thread. One side takes
a step while the other waits at the end of its own, so that both see the same machine; a step is all that lies between
two ends of it, the loss read and the best state kept included. Ratios are of the processor's time and of the clock's.
A repeat is a number of turns; its ratio is that of the medians within it. Tokens are random, which no time depends on.

Both run twice: in float32, theirs without torch.compile; and in bfloat16, theirs as it comes, its rounding compiled.
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
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memory import make
from peer_python import interpreter, require_peer
from swquant import SwquantError

RESULTS = Path(__file__).parent / "results" / "peer_steps.json"
STEPS, WARM, BITS, GROUP = 200, 4, 2, 64

TURN = """
import json, os, sys, time
job, go, done = json.load(open(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
began = [0.0, 0.0]
def wait():
    if not os.read(go, 1):
        os._exit(0)
    began[:] = time.perf_counter(), time.process_time()
def end(*_):
    took = time.perf_counter() - began[0], time.process_time() - began[1]
    os.write(done, (json.dumps(took) + "\\n").encode())
    wait()
wait()
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
tokens = load_file(job["tokens"])["tokens"]
"""

OURS = """
import swquant.run as run
from swquant import Recipe
from swquant.engine.observer import Silent
class Turns(Silent):
    def step(self, done, total):
        end()
run.draw_from_model = lambda *_: tokens
method = "signround(steps={steps}, batch_size={batch})".format(**job)
samples, length = tokens.shape
recipe = Recipe(bits=job["bits"], group_size=job["group"], symmetric=False, method=method, loss="mse", samples=samples,
                seq_len=length, calibration="self", evaluation_samples=0, device="cpu", **job["settings"])
run.quantize(recipe, job["model"], sys.argv[1] + "-out", observer=Turns())
"""

THEIRS = """
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
plain = torch.optim.lr_scheduler.LinearLR.step
def step(self, *given):
    plain(self, *given)
    end()
torch.optim.lr_scheduler.LinearLR.step = step
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
AutoRound(model, tokenizer=tokenizer, dataset=rows, device_map="cpu", low_cpu_mem_usage=False, bits=job["bits"],
          group_size=job["group"], sym=False, iters=job["steps"], nsamples=len(rows), seqlen=tokens.shape[1],
          batch_size=job["batch"], **job["settings"]).quantize()
"""

OWN, OWN_SHORT = "ours", "ours, bfloat16"
PEER, PEER_SHORT = "auto-round, float32, not compiled", "auto-round as it comes"
SETTINGS: Mapping[str, Mapping[str, object]] = {
    OWN: {"precision": "float32"},
    PEER: {"amp": False, "enable_torch_compile": False},
    OWN_SHORT: {"precision": "bfloat16"},
    PEER_SHORT: {},
}
PAIRS = ((OWN, PEER), (OWN_SHORT, PEER_SHORT), (OWN_SHORT, OWN))


@dataclass(frozen=True)
class Size:
    """What a step works on; ``None`` is the demo model."""

    width: int | None
    tokens: int
    batch: int
    samples: int


SIZES = (Size(1024, 2048, 1, 8), Size(None, 256, 8, 64), Size(None, 256, 1, 64))


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, python: str, code: str, job: Path, variables: Mapping[str, str]) -> None:
        go, self._go = os.pipe()
        self._done, done = os.pipe()
        single = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment, log = {**os.environ, **single, **variables}, job.with_suffix(".log")
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [python, "-c", TURN + code, str(job), str(go), str(done)],
                pass_fds=(go, done),
                env=environment,
                stdout=output,
                stderr=output,
                cwd=job.parent,
            )
        os.close(go)
        os.close(done)
        self._log, self._lines = log, os.fdopen(self._done)

    def turn(self) -> tuple[float, float]:
        """Let it take one step; seconds of the clock and of the processor.

        Raises:
            SwquantError: It has ended.
        """
        os.write(self._go, b"g")
        line = self._lines.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SwquantError(f"a side ended before its turn: {' '.join(said)[:300]}")
        clock, processor = json.loads(line)
        return clock, processor

    def close(self) -> None:
        """Tell it that there are no more turns."""
        os.close(self._go)
        self._process.wait()
        self._lines.close()


def copy_model(size: Size, folder: Path) -> None:
    """The demo model, or a random one of one block with its tokenizer, which neither side uses."""
    with resources.as_file(resources.files("swquant") / "demo_assets" / "model") as demo:
        if size.width is None:
            shutil.copytree(demo, folder)
            return
        make(folder, 1, size.tokens, size.width)
        for path in demo.glob("tokenizer*"):
            shutil.copy(path, folder)


def prepare(size: Size, folder: Path, settings: Mapping[str, Mapping[str, object]]) -> dict[str, Path]:
    """Write the model, the tokens and a job for each side, by its name."""
    model, tokens = folder / "model", folder / "tokens.safetensors"
    copy_model(size, model)
    rng = torch.Generator().manual_seed(0)
    save_file({"tokens": torch.randint(2, 256, (size.samples, size.tokens), generator=rng)}, tokens)
    shared = {"model": str(model), "tokens": str(tokens), "steps": STEPS, "batch": size.batch}
    jobs = {name: folder / f"job-{index}.json" for index, name in enumerate(settings)}
    for name, job in jobs.items():
        job.write_text(json.dumps({**shared, "bits": BITS, "group": GROUP, "settings": settings[name]}))
    return jobs


@contextmanager
def sides(size: Size, peer: str, folder: Path) -> Generator[dict[str, Side]]:
    """All sides, ready to take turns."""
    jobs = prepare(size, folder, SETTINGS)
    open_sides: dict[str, Side] = {}
    try:
        for name, job in jobs.items():
            python, code = (sys.executable, OURS) if name in (OWN, OWN_SHORT) else (peer, THEIRS)
            open_sides[name] = Side(python, code, job, {})
        yield open_sides
    finally:
        for side in open_sides.values():
            side.close()


def measured(size: Size, peer: str, repeats: int, turns: int) -> dict[str, Any]:
    """One row: the ratios of each pair."""
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="swquant-peers-") as folder, sides(size, peer, Path(folder)) as both:
        for count in range(WARM + repeats * turns):
            for name, side in both.items():
                took = side.turn()
                if count >= WARM:
                    times.setdefault(name, []).append(took)
    row: dict[str, Any] = {"model": "demo" if size.width is None else f"width {size.width}", **vars(size)}
    for one, other in PAIRS:
        for which, kind in enumerate(("clock", "processor")):
            ratios = sorted(
                _median(times[one], which, first, turns) / _median(times[other], which, first, turns)
                for first in range(0, repeats * turns, turns)
            )
            whole = sum(took[which] for took in times[one]) / sum(took[which] for took in times[other])
            found = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1], "of all time": whole}
            row[f"{one} / {other}, {kind}"] = {key: round(value, 3) for key, value in found.items()}
    return {**row, "repeats": repeats, "turns": turns}


def _median(times: list[tuple[float, float]], which: int, first: int, turns: int) -> float:
    return statistics.median(took[which] for took in times[first : first + turns])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=interpreter, help="an interpreter that has auto-round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=8, help="of each repeat")
    args = parser.parse_args()
    if WARM + args.repeats * args.turns >= STEPS:
        parser.error(f"a run has {STEPS} steps: ask for less than {STEPS - WARM} turns in all")
    rows: list[dict[str, Any]] = []
    where = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    try:
        require_peer(args.peer_python)
        for size in SIZES:
            rows.append(measured(size, args.peer_python, args.repeats, args.turns))
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps({**where, "results": rows}, indent=1) + "\n")
    except SwquantError as error:
        print(f"peer_steps: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
