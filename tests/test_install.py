"""A wheel, installed apart from the source tree, brings everything that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from swquant import __version__
from swquant.cli import KINDS, main
from swquant.recipe import recipe_names

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, **settings: str) -> str:
    finished = subprocess.run(
        list(map(str, command)), env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without an index and with what the test environment has."""
    place = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", place, ROOT)
    (built,) = place.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", *offline, "--target", place / "installed", built)
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"swquant-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "swquant").rglob("*") if path.is_file()}
    metadata = f"swquant-{__version__}.dist-info/"
    assert {name for name in held if not name.startswith(metadata)} == {
        file for file in files if "__pycache__" not in file
    }
    assert {f"{metadata}licenses/{name}" for name in ("LICENSE", "NOTICE")} <= held
    papers = [name for name in recipe_names() if name.startswith("paper-")]
    assert len(papers) == 4
    assert {"swquant/py.typed", *(f"swquant/recipes/{name}.yaml" for name in papers)} <= held
    demo = ("calibration.txt", "evaluation.txt", "model/config.json", "model/model.safetensors", "model/tokenizer.json")
    assert {f"swquant/demo_assets/{name}" for name in demo} <= held
    assert "swquant/texts/calibration.jsonl.gz" in held


def test_the_installed_command_lists_what_the_source_does(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed = wheel.parent / "installed"
    where = run(sys.executable, "-c", "import swquant; print(swquant.__file__)", PYTHONPATH=str(installed))
    assert Path(where.strip()) == installed / "swquant" / "__init__.py"
    for kind in KINDS:
        main(["list", kind])
        listed = run(installed / "bin" / "swquant", "list", kind, PYTHONPATH=str(installed))
        assert listed == capsys.readouterr().out
        assert listed
