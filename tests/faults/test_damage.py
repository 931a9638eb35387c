"""Bits that flip and files that go while a run is stopped, or under one that works."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swquant import SwquantError, quantize
from swquant.engine.run_state import open_run_state

BEHIND_BLOCK_0 = ("manifest.json", "tokens.safetensors", "block-00000.safetensors", "reference-00001.stream")
FLIPS = 12


def flip(path: Path, moment: random.Random) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[moment.randrange(len(content))] ^= 1 << moment.randrange(8)
    path.write_bytes(content)


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def emptied(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def removed(path: Path, _: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        (name, harm)
        for name in (*BEHIND_BLOCK_0, "quantized-00001.stream")
        for harm in (flip, emptied, removed)
        if (name, harm) != ("manifest.json", removed)
    ],
)
def test_what_cannot_be_made_again_is_refused_and_left_alone(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, harm: Callable[[Path, random.Random], object]
) -> None:
    work = run.stop(tmp_path / "out", block=0)
    whole = (work / name).read_bytes()
    harm(work / name, random.Random(3))
    before = tree(work)
    said = run.fails(capsys, tmp_path / "out", 2)
    assert name in said
    assert f"delete {work} to start over" in said or "delete it to start over" in said
    assert tree(work) == before
    (work / name).write_bytes(whole)
    run.finish(tmp_path / "out")


def test_without_its_manifest_a_run_begins_again(run, tmp_path: Path) -> None:
    (run.stop(tmp_path / "out", block=0) / "manifest.json").unlink()
    run.finish(tmp_path / "out")


@pytest.mark.parametrize("name", [*BEHIND_BLOCK_0, "quantized-00001.stream"])
def test_no_bit_flips_unseen(run, tmp_path: Path, name: str) -> None:
    work = run.stop(tmp_path / "out", block=0)
    key, whole, moment = open_key(work), (work / name).read_bytes(), random.Random(name)
    for _ in range(FLIPS):
        flip(work / name, moment)
        with pytest.raises(SwquantError, match=f"{name}|differs in"):
            open_run_state(work, key).verify()
        (work / name).write_bytes(whole)
    open_run_state(work, key).verify()


def open_key(work: Path) -> Mapping[str, Any]:
    return json.loads((work / "manifest.json").read_text())["key"]


def test_a_damaged_state_of_the_end_to_end_stage_is_trained_again(run, tmp_path: Path) -> None:
    work = run.stop(tmp_path / "out", stage="End to end, epoch 1/2")
    (state,) = work.glob("training-*.safetensors")
    flip(state, random.Random(0))
    run.finish(tmp_path / "out")


def test_a_damaged_result_of_the_end_to_end_stage_is_refused(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    work = run.stop(tmp_path / "out", stage="Measuring")
    whole = tree(work)
    flip(work / "final.safetensors", random.Random(0))
    assert "final.safetensors" in run.fails(capsys, tmp_path / "out", 2)
    (work / "final.safetensors").write_bytes(whole["final.safetensors"])
    flip(work / "trained-00002.stream", random.Random(0))
    assert "trained-00002.stream" in run.fails(capsys, tmp_path / "out", 2)
    (work / "trained-00002.stream").write_bytes(whole["trained-00002.stream"])
    run.finish(tmp_path / "out")


class Meddle:
    """Does something to the source after block 0."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def stage(self, what: str) -> None: ...

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        if index == 0:
            self.what()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: flip(path, random.Random(1)), "has changed since it was opened; put the original back"),
        (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "has changed since it was opened"),
        (lambda path: shutil.rmtree(path.parent), "cannot be read"),
    ],
    ids=["bit", "removed", "cut", "model removed"],
)
def test_the_source_under_a_run(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    source = shutil.copytree(run.source, tmp_path / "model")
    shard, mine = source / "model.safetensors", replace(run, source=source)
    with pytest.raises(SwquantError) as caught:
        quantize(run.recipe, source, tmp_path / "out", observer=Meddle(lambda: harm(shard)))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    if shard.exists():
        again = mine.fails(capsys, tmp_path / "out", 2)
        assert "differs in source" in again or "is damaged" in again
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(run.source, source)
    mine.finish(tmp_path / "out")
