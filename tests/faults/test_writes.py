"""Disks that are full, writes that fail: one sentence, nothing half-written in the output's place, and it goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")


def count_flushes(monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> list[int]:
    """Make the write numbered ``fail_at`` fail when it is flushed; the numbers of those that were."""
    seen: list[int] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(len(seen))
        if len(seen) - 1 == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


@pytest.fixture(scope="module")
def flushes(run, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many there are in a run."""
    with pytest.MonkeyPatch.context() as patch:
        seen = count_flushes(patch, None)
        run.finish(tmp_path_factory.mktemp("counted") / "out")
    return len(seen)


def fails_and_goes_on(run, capsys: pytest.CaptureFixture[str], out: Path, fail_at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = count_flushes(patch, fail_at)
        said = run.fails(capsys, out, 1)
    assert fail_at < len(seen) <= fail_at + 3  # two caches of hidden states may be flushed in threads meanwhile
    assert "No space left on device" in said
    assert "the same command goes on from there" in said
    if out.exists():
        assert (out / "report.json").exists()
    run.finish(out)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.5, 0.7, 0.99])
def test_a_write_that_fails(
    run, flushes: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, share: float
) -> None:
    fails_and_goes_on(run, capsys, tmp_path / "out", int(share * flushes))


@pytest.mark.slow
def test_any_write_that_fails(run, flushes: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for fail_at in range(flushes):
        fails_and_goes_on(run, capsys, tmp_path / str(fail_at), fail_at)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_may_not_grow_stop_a_run_before_it_begins(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with largest_file(20_000):
        said = run.fails(capsys, tmp_path / "out", 1)
    assert "File too large" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.swquant-work").exists()


def test_files_that_may_not_grow_stop_a_run_that_writes_its_output(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Safetensors' own writer meets the limit there."""
    with largest_file(80_000):
        said = run.fails(capsys, tmp_path / "out", 1)
    assert "cannot be written" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


FILLING = """
import shutil, sys
from pathlib import Path
from swquant import run
from swquant.cli import main
place, whole = Path(sys.argv[1]), run.quantize_block
def filling(*given):
    (place / "ballast").write_bytes(bytes(shutil.disk_usage(place).free - 20_000))
    return whole(*given)
run.quantize_block = filling
main(sys.argv[2:])
"""
"""The command line, under which the disk is full when the next block begins."""


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run(run, small_disk: Path) -> None:
    """What is mapped has its room beforehand, so that no write to it ends the process by a signal."""
    out, ballast = small_disk / "out", small_disk / "ballast"
    run.stop(out, block=0)

    def ends(*code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *code, *run.command(out)], capture_output=True, text=True, check=False)

    ended = ends("-c", FILLING, str(small_disk))
    again = ends("-m", "swquant")
    assert again.returncode == 2, again.stderr
    assert "GB are available" in again.stderr.splitlines()[-1]
    assert ended.returncode == 1, ended.stderr
    assert "No space left on device" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    ballast.unlink()
    run.finish(out)
