"""What other work on the machine costs a training step, by how long waiting threads of OpenMP spin.

    python benchmarks/contention.py [--widths 192 1024 4096] [--repeats 3]
    python benchmarks/contention.py --demo

A step of OmniQuant on a random LLaMA of one block, on as many threads as there are cores, on a quiet machine and beside
one process that computes without a pause. Each setting of the environment runs in a process of its own, the settings in
turns; medians of the seconds of a step over all repeats, by the clock and of processor time. With ``--demo``, the whole
of ``swquant demo`` as it comes, quiet and beside one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "contention.json"
SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 30000": {"GOMP_SPINCOUNT": "30000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHAPES = {192: (8, 256), 256: (1, 256), 1024: (1, 1024), 4096: (1, 256)}
"""Samples of a step and tokens of a sample; 256 is the demo's."""
STEPS = {192: 40, 256: 100, 1024: 8, 4096: 4}


def main() -> None:
    if sys.argv[1:2] == ["steps"]:
        print(json.dumps(steps(int(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", choices=tuple(SHAPES), default=(192, 1024, 4096))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results["cores"] = len(os.sched_getaffinity(0))
    if args.demo:
        results["demo"] = demo()
    for width in () if args.demo else args.widths:
        results.setdefault("steps", {})[str(width)] = measured(width, args.repeats)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(width: int, repeats: int) -> dict[str, dict[str, float]]:
    """For each setting the seconds of a step: quiet and beside a busy process, by the clock and of the processor."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for _ in range(repeats):
        for busy in (False, True):
            for name, setting in SETTINGS.items():
                with beside(busy):
                    took = json.loads(child([sys.executable, __file__, "steps", str(width)], setting))
                for clock, values in took.items():
                    found[name].setdefault(f"{clock}, {'beside one' if busy else 'quiet'}", []).extend(values)
    rows = {name: {kind: round(statistics.median(one), 4) for kind, one in row.items()} for name, row in found.items()}
    for name, row in rows.items():
        print(width, name, json.dumps(row), flush=True)
    return rows


def child(command: list[str], setting: dict[str, str]) -> str:
    """What a process prints under a setting of OpenMP's variables and no other."""
    plain = {name: value for name, value in os.environ.items() if name not in OPENMP}
    return subprocess.run(command, env={**plain, **setting}, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def beside(busy: bool) -> Generator[None]:
    """With a process that computes without a pause, or without one."""
    if not busy:
        yield
        return
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def steps(width: int) -> dict[str, list[float]]:
    """Seconds of a run's steps after the first."""
    import torch

    import swquant.run as run
    from memory import make
    from swquant.engine.observer import Silent
    from swquant.recipe import Recipe

    class Clock(Silent):
        """The clock and the processor's time at the end of each step."""

        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def step(self, done: int, total: int) -> None:
            """A step has ended."""
            self.ends.append((time.perf_counter(), time.process_time()))

    batch, tokens = SHAPES[width]
    text = torch.randint(2, 256, (batch * STEPS[width], tokens), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = partial(given, text)
    method = f"omniquant(epochs=1, batch_size={batch}, augmented=False)"
    recipe = Recipe(
        symmetric=False,
        method=method,
        samples=batch * STEPS[width],
        seq_len=tokens,
        evaluation_samples=0,
        calibration="self",
        precision="float32",
        device="cpu",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "model", 1, tokens, width)
        run.quantize(recipe, Path(folder) / "model", Path(folder) / "out", observer=clock)
    pairs = list(zip(clock.ends, clock.ends[1:], strict=False))
    return {
        "clock": [after[0] - before[0] for before, after in pairs],
        "processor": [after[1] - before[1] for before, after in pairs],
    }


def given(tokens: Any, *_: object) -> Any:
    """In the place of samples drawn from the model."""
    return tokens


def demo() -> dict[str, dict[str, float]]:
    """Seconds of ``swquant demo``, by the clock and of the processor, as it comes."""
    found: dict[str, dict[str, float]] = {}
    for name, busy in (("quiet", False), ("beside one", True)):
        with beside(busy), tempfile.TemporaryDirectory() as folder:
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            plain = {key: value for key, value in os.environ.items() if key not in OPENMP}
            command = [sys.executable, "-m", "swquant", "demo"]
            subprocess.run(command, env=plain, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            after, took = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found[name] = {"clock": round(took, 1), "processor": round(processor, 1)}
        print("demo", name, json.dumps(found[name]), flush=True)
    return found


if __name__ == "__main__":
    main()
