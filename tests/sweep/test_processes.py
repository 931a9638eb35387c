"""Trials in processes of their own, killed and not, and on Ray."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from swquant.sweep import run_sweep
from swquant.sweep.executors import LocalProcesses

Grid = Callable[..., Path]
REQUIREMENTS = ("ray>=2.40", "pyarrow", "torch<2.14")
CHANGING = {"seconds"}


def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CHANGING} for row in rows]


def kill_first_child(stop: threading.Event) -> None:
    """Kill the next process that this one starts with this interpreter, as a machine short of memory does."""
    while not stop.is_set():
        for child in psutil.Process().children():
            if any("spawn_main" in part for part in child.cmdline()):
                child.kill()
                return
        time.sleep(0.01)


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(grid: Grid, tmp_path: Path, retries: int) -> None:
    stop = threading.Event()
    killer = threading.Thread(target=kill_first_child, args=(stop,))
    killer.start()
    try:
        rows = run_sweep(grid(seed=[0, 1]), tmp_path / "out", LocalProcesses(1, retries), 1)
    finally:
        stop.set()
        killer.join()
    assert [row["status"] for row in rows] == (["done", "done"] if retries else ["failed", "done"])
    if not retries:
        assert "killed by signal 9" in rows[0]["error"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_sweeps_go_on_and_workers_change_nothing(grid: Grid, here: Any, tmp_path: Path) -> None:
    path = grid(method=["rtn", "block_ap(epochs=2)"], bits=[2, 3])
    expected = run_sweep(path, tmp_path / "alone", here, 1)
    assert {row["status"] for row in expected} == {"done"}
    one = run_sweep(path, tmp_path / "one", LocalProcesses(1, 0), 1)
    assert same(one) == same(expected)

    out = tmp_path / "two"
    command = [sys.executable, "-m", "swquant", "sweep", str(path), "--out", str(out)]
    local = ["--executor", "local", "--workers", "2", "--threads", "1"]
    process = subprocess.Popen([*command, *local], stderr=subprocess.DEVNULL)
    while not (left := list(out.glob("trials/*/row.json"))):
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers end with the sweep"
    assert not (out / "results.csv").exists()
    times = {row: row.stat().st_mtime_ns for row in left}
    subprocess.run([*command, *local], check=True, capture_output=True)
    assert {row: row.stat().st_mtime_ns for row in left} == times
    rows = [json.loads((out / "trials" / row["trial"] / "row.json").read_text()) for row in expected]
    assert same(rows) == same(expected)
    with (out / "results.csv").open(newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in expected]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """Of an environment that has Ray and pyarrow beside the test environment's packages; made once."""
    home = Path(request.config.cache.mkdir("ray"))
    found = home / "bin/python"
    if not (home / "ready").exists():
        shared = [place for place in sys.path if place.endswith(("site-packages", "dist-packages", "src"))]
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.run([found, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        (Path(own) / "shared.pth").write_text("\n".join([*shared, str(Path(__file__).parents[2] / "src")]) + "\n")
        installed = subprocess.run(
            [found, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=False, capture_output=True, text=True
        )
        if installed.returncode:
            pytest.skip(f"pip cannot install ray: {installed.stderr.strip().splitlines()[-1]}")
        (home / "ready").touch()
    return found


READ = """
import sys
from pyarrow import parquet
print(sorted(parquet.read_table(sys.argv[1])["status"].to_pylist()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ray's support of Windows is partial")
def test_ray_gives_the_same_table(
    python: Path, grid: Grid, here: Any, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    wide = make_model("llama", 2, intermediate_size=96)
    path = grid(model=str(wide), group_size=[64, 32], bits=[2, 3])
    out = tmp_path / "out"
    command = [python, "-m", "swquant", "sweep", path, "--out", out, "--threads", "1", "--workers", "1"]
    finished = subprocess.run(
        [*map(str, command), "--executor", "ray"], check=False, capture_output=True, text=True, timeout=500
    )
    assert finished.returncode == 0, finished.stderr
    assert "4 trials, 2 failed" in finished.stdout
    rows = [json.loads(row.read_text()) for row in out.glob("trials/*/row.json")]
    expected = run_sweep(path, tmp_path / "here", here, 1)
    order = {row["trial"]: place for place, row in enumerate(expected)}
    assert same(sorted(rows, key=lambda row: order[row["trial"]])) == same(expected)
    read = subprocess.run(
        [python, "-c", READ, out / "results.parquet"], check=True, capture_output=True, text=True
    ).stdout
    assert read.strip() == str(["done", "done", "failed", "failed"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ray's support of Windows is partial")
def test_ray_is_not_asked_for_what_it_lacks(python: Path, grid: Grid, tmp_path: Path) -> None:
    command = [python, "-m", "swquant", "sweep", grid(), "--out", tmp_path / "out", "--executor", "ray", "--gpus", "99"]
    finished = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert "99 GPUs" in finished.stderr.strip().splitlines()[-1]
