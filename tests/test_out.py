"""Where an output may go: links to another disk, and places that no finished directory can be renamed to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swquant import Recipe, SwquantError, quantize
from swquant.convert import convert
from swquant.places import require_unused


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        group_size=32,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=16,
        evaluation_samples=0,
        device="cpu",
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than that of ``tmp_path``."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_link_to_another_disk(llama: Path, recipe: Recipe, tmp_path: Path, elsewhere: Path) -> None:
    for name in ("quantized", "converted"):
        (elsewhere / name).mkdir()
        (tmp_path / name).symlink_to(elsewhere / name)
    quantize(recipe, llama, tmp_path / "quantized")
    convert(tmp_path / "quantized", tmp_path / "converted", format="mlx")
    assert (tmp_path / "quantized" / "report.json").is_file()
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["converted", "quantized"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "quantized"]


def test_the_directory_that_one_is_in_is_refused_before_the_run(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        with pytest.raises(SwquantError, match="is in use: it is the directory that you are in; choose another --out"):
            quantize(recipe, llama, out)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("out", ["/", "/dev/shm"])
def test_a_mount_point_is_refused(out: str) -> None:
    if not os.path.ismount(out):
        pytest.skip(f"{out} is none")
    with pytest.raises(SwquantError, match=f"the output directory {out} is in use: it is a mount point"):
        require_unused(Path(out))
