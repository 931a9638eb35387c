"""The example package of losses, installed apart from the environment: its losses by name, and its own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swquant import registry

PACKAGE = Path(__file__).parents[1] / "examples" / "plugin-losses"
SOURCE = Path(registry.__file__).parents[1]
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
LOSSES = {
    "channel_mse",
    "energy_sliced",
    "error_sliced",
    "gaussian_wasserstein",
    "hadamard_sliced",
    "max_sliced",
    "orthogonal_sliced",
    "pair_sliced",
    "pooled_sliced",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugin") / "installed"
    run(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", place, PACKAGE)
    return place


def run(*command: str | Path, path: Path | None = None) -> str:
    """Run a command beside our source, with ``path`` to import from, too."""
    places = os.pathsep.join(str(place) for place in (SOURCE, path) if place is not None)
    settings = os.environ | {"PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run([*map(str, command)], env=settings, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_a_run_trains_with_its_losses_by_name(
    installed: Path, make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    assert not LOSSES & set(registry.names("swquant.losses"))
    out, loss = tmp_path / "out", "0.25*max_sliced(starts=2) + 0.75*mse"
    written = "max_sliced(power=1, starts=2)*0.25 + 0.75*mse"
    settings = {"bits": 2, "group-size": 32, "method": "omniquant", "loss": written, "calibration": text}
    settings |= {"samples": 4, "seq-len": 32, "epochs": 1, "evaluation-samples": 0, "device": "cpu"}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    code = "import sys; from swquant.cli import main; main(['list', 'losses']); main(sys.argv[1:])"
    said = run(sys.executable, "-c", code, "quantize", make_model("llama", 1), "--out", out, *options, path=installed)
    listed = {line.split()[0] for line in said.splitlines() if line.strip()}
    assert listed >= {*LOSSES, "mse"}
    assert "Wasserstein distance along the direction in which it is largest" in " ".join(said.split())
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["loss"] == loss
    (trained,) = report["blocks"][0]["phases"]
    assert set(trained["shares"]["start"]) == {"max_sliced(starts=2)", "mse"}
    assert trained["curve"][0] > 0


@pytest.mark.slow
def test_its_own_tests_pass(installed: Path) -> None:
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", PACKAGE, path=installed)
    passed = int(said.rpartition(" passed")[0].split()[-1])
    assert passed > 300
    assert "skipped" not in said
