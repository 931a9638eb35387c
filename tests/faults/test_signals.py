"""SIGINT and SIGTERM end a run after its step, with one sentence and code 130; two runs never share an output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swquant.engine.run_state import RunState
from swquant.observers.stopping import Stop, handled
from swquant.phases import rounds

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_block_is_saved(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    finish = RunState.finish_block

    def signalled(run_state: RunState, *arguments: object) -> None:
        os.kill(os.getpid(), number)
        finish(run_state, *arguments)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "finish_block", signalled)
        said = run.fails(capsys, tmp_path / "out", 130)
    assert said == "swquant: stopped; the same command goes on from the last finished block"
    assert (tmp_path / "out.swquant-work" / "block-00000.safetensors").exists()
    assert not (tmp_path / "out.swquant-work" / "block-00001.safetensors").exists()
    assert signal.getsignal(number) == handler
    run.finish(tmp_path / "out")


def test_a_signal_within_a_step_lets_it_finish(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    rate = rounds.set_rate

    def signalled(*arguments: object) -> None:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "set_rate", signalled)
        run.fails(capsys, tmp_path / "out", 130)
    assert len(steps) == 2
    run.finish(tmp_path / "out")


def test_the_second_signal_does_not_wait() -> None:
    stop = Stop()
    with handled(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def start(run, out: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", "swquant", *run.command(out)], stdout=file, stderr=file)


def wait_for(process: subprocess.Popen[bytes], log: Path, word: str) -> None:
    while word not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_a_process(run, tmp_path: Path, number: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log.txt"
    process = start(run, out, log)
    wait_for(process, log, "block 1/2")
    process.send_signal(number)
    assert process.wait() == 130, log.read_text()
    assert log.read_text().splitlines()[-1].startswith("swquant: stopped; the same command goes on")
    assert not out.exists()
    run.finish(out)


@pytest.mark.slow
def test_two_processes_on_one_output(run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log.txt"
    first = start(run, out, log)
    wait_for(first, log, "block 1/2")
    first.send_signal(signal.SIGSTOP)
    try:
        said = run.fails(capsys, out, 2)
    finally:
        first.send_signal(signal.SIGCONT)
    assert "another process is writing to" in said
    assert first.wait() == 0, log.read_text()
    run.require_equal(out)
