"""What programs, TensorBoard and W&B hear of a run."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swquant import run
from swquant.checkpoint import hub
from swquant.cli import main
from swquant.errors import LeaderStoppedError, RankLostError
from swquant.observers.json_lines import JsonLines
from swquant.observers.stopping import Stop, following, handled


@pytest.fixture
def command(llama: Path, text: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(*more: str) -> list[str]:
        few = ["--samples", "4", "--seq-len", "32", "--evaluation-samples", "2", "--epochs", "2", "--device", "cpu"]
        method = ["--method", "omniquant + end_to_end", "--calibration", str(text)]
        return ["quantize", str(llama), "--out", str(tmp_path / "out"), *few, *method, *more]

    return make


def events(content: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in content.splitlines()]
    assert all(line["schema"] == 1 and line["time"] > 1.7e9 for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    return lines


def test_json_lines_tell_a_whole_run(command: Callable[..., list[str]], tmp_path: Path) -> None:
    main(command("--log-json", str(tmp_path / "log.jsonl")))
    told = events((tmp_path / "log.jsonl").read_text())
    names = [line["event"] for line in told]
    assert names[0] == "stage"
    assert names[-1] == "done"
    assert names.count("begin") == 1
    blocks = [line for line in told if line["event"] == "block"]
    assert [line["block"] for line in blocks] == [0, 1]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for line, block in zip(blocks, report["blocks"], strict=True):
        assert line["drift"] == block["drift"]
        assert [phase["after"] for phase in line["phases"]] == [phase["after"] for phase in block["phases"]]
        assert line["seconds_left"] >= 0
    last_steps = [line for line in told if line["event"] == "step" and line["done"] == line["total"]]
    assert [line["block"] for line in last_steps] == [0, 1, None]
    assert told[-1]["quality"] == report["quality"]


def test_on_standard_error_there_is_nothing_else(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(command("--log-json", "-"))
    assert events(capsys.readouterr().err)[-1]["event"] == "done"


def test_a_failure_and_a_stop_are_the_last_line(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    for error, code, event in ((OSError(28, "full"), 1, "error"), (KeyboardInterrupt(), 130, "stopped")):
        with monkeypatch.context() as patch:
            patch.setattr("swquant.run.write_output", lambda *_, error=error: raise_(error))
            with pytest.raises(SystemExit) as exit:
                main(command("--log-json", str(log)))
        assert exit.value.code == code
        assert events(log.read_text())[-1]["event"] == event
    assert "full" in next(line for line in events(log.read_text()) if line["event"] == "error")["message"]
    main(command("--log-json", str(log)))
    assert events(log.read_text())[-1]["event"] == "done"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_anywhere_is_one_sentence(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    monkeypatch.setattr("swquant.run.publish", lambda *_: raise_(error))
    with pytest.raises(SystemExit) as exit:
        main(command("--log-json", str(tmp_path / "log.jsonl")))
    assert exit.value.code == 1
    assert "swquant: memory ran out (" in capsys.readouterr().err
    assert events((tmp_path / "log.jsonl").read_text())[-1]["kind"] == type(error).__name__
    monkeypatch.setattr("swquant.run.publish", lambda *_: raise_(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(command())


def raise_(error: BaseException) -> None:
    raise error


def test_steps_are_throttled() -> None:
    now = [0.0]
    lines = JsonLines(io.StringIO(), now=lambda: now[0])
    lines.begin(1, 0)
    for step in range(100):
        now[0] += 0.1
        lines.step(step + 1, 100)
    told = [json.loads(line) for line in lines.file.getvalue().splitlines()]
    steps = [line["done"] for line in told if line["event"] == "step"]
    assert len(steps) <= 12
    assert steps[-1] == 100


def test_a_number_that_is_not_finite_is_null() -> None:
    lines = JsonLines(io.StringIO())
    phase = {"phase": "Train", "before": math.inf, "after": 0.5, "curve": (math.nan, 0.5)}
    lines.block(0, {"phases": [phase], "drift": math.nan, "seconds": 1.0})
    (line,) = lines.file.getvalue().splitlines()
    told = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["drift"] is None
    assert told["phases"] == [{**phase, "before": None, "curve": [None, 0.5]}]


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--log-json", "give --log-json another file"), ("--tensorboard", "give --tensorboard another directory")],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_run(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, said: str
) -> None:
    if flag == "--tensorboard":
        pytest.importorskip("tensorboard")
    place = tmp_path if flag == "--log-json" else tmp_path / "file"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        main(command(flag, str(place)))
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "out.swquant-work").exists()


@pytest.mark.parametrize(
    ("flags", "module", "extra"),
    [
        (["--tensorboard", "logs"], "torch.utils.tensorboard", "swquant[tensorboard]"),
        (["--wandb", "project"], "wandb", "swquant[wandb]"),
    ],
)
def test_what_is_not_installed_is_named(
    command: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit:
        main(command(*flags))
    assert exit.value.code == 2
    assert f"pip install '{extra}'" in capsys.readouterr().err


def test_tensorboard_reads_the_curves(command: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(command("--tensorboard", str(tmp_path / "curves")))
    found = EventAccumulator(str(tmp_path / "curves"))
    found.Reload()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    drifts = [point.value for point in found.Scalars("blocks/drift")]
    assert drifts == pytest.approx([block["drift"] for block in report["blocks"]])
    curve = [point.value for point in found.Scalars("end to end/validation KL")]
    assert curve == pytest.approx([report["finish"]["before"], *report["finish"]["curve"]])
    assert found.Scalars("quality/kl")[0].value == pytest.approx(report["quality"]["kl"])


class StandIn:
    """The part of W&B's interface that is used."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}
        self.code: int | None = None

    def init(self, **settings: Any) -> StandIn:
        self.started = settings
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.code = exit_code


def test_wandb_gets_the_curves(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=client.init))
    main(command("--wandb", "quantized"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert client.started == {"project": "quantized", "name": "out"}
    drifts = [values["blocks/drift"] for values in client.logged if "blocks/drift" in values]
    assert drifts == [block["drift"] for block in report["blocks"]]
    assert all(client.axes[name] in values for values in client.logged for name in values if name in client.axes)
    assert client.code == 0


class RefusalError(Exception):
    """What W&B's own errors are."""


def test_what_wandb_refuses_is_one_sentence(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**settings: Any) -> None:
        raise RefusalError("api_key not configured (no-tty).\nCall wandb.login(key=[your_api_key])")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RefusalError))
    with pytest.raises(SystemExit) as exit:
        main(command("--wandb", "quantized"))
    assert exit.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("swquant: W&B takes no run (api_key not configured (no-tty). Call")
    assert said.endswith("leave --wandb out")


def test_a_signal_while_the_output_is_written_keeps_it_from_the_hub(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run.write_output

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(run, "write_output", signalled)
    monkeypatch.setattr(hub, "require_push", lambda name: None)
    monkeypatch.setattr(hub, "push", lambda *_, **__: pytest.fail("it was pushed"))
    with pytest.raises(SystemExit) as exit:
        main(command("--push-to-hub", "owner/name"))
    assert exit.value.code == 130
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_rank_leaves_the_first_signal_to_rank_0() -> None:
    def lose(number: int | None) -> None:
        with following():
            if number is not None:
                os.kill(os.getpid(), number)
            raise RankLostError("its connections closed")

    with pytest.raises(LeaderStoppedError):
        lose(signal.SIGTERM)
    with pytest.raises(RankLostError, match="its connections closed"):
        lose(None)
    with following():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_remembered_where_nobody_reads_the_notice() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(2)
    os.dup2(writer, 2)
    stop = Stop()
    try:
        with handled(stop):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(writer)
    assert stop.asked
