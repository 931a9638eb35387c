"""Memory that runs out where no smaller batch helps: a sentence that names the place, and the run goes on later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant.engine import block, bound, end_to_end
from swquant.model import skeleton
from swquant.phases import gptq, train

MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


def failing(work: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """``work`` but for its call number ``at``."""
    calls: list[int] = []

    def run(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return work(*arguments, **named)

    return run


HOST, DEVICE, PYTHON = RuntimeError(MESSAGE), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()


@pytest.mark.parametrize(
    ("owner", "name", "at", "place", "error"),
    [
        (skeleton.Block, "forward", 1, "in making the samples and their way to the first block", HOST),
        (bound.BoundBlock, "advance", 1, "in the original model's block 0", HOST),
        (block, "open_draft", 2, "in rounding block 1 to the nearest", PYTHON),
        (gptq, "input_moments", 6, "in Gptq on block 1", DEVICE),
        (gptq, "_inverse_factor", 1, "in Gptq on block 0", HOST),
        (block, "commit", 3, "in turning block 1 into codes", DEVICE),
        (block, "measure_block", 1, "in measuring and saving block 0", PYTHON),
        (bound.BoundBlock, "advance", 2, "in the quantized block 0", HOST),
        (end_to_end.Heads, "load", 1, "in the end-to-end training", DEVICE),
        (end_to_end.TrainedModel, "advance", 1, "in the end-to-end training", HOST),
    ],
)
def test_a_sentence_names_the_place(
    run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    at: int,
    place: str,
    error: Exception,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        said = run.fails(capsys, tmp_path / "out", 1)
    assert said.startswith(f"swquant: {place}, memory ran out (")
    assert "what is finished is kept, and with more memory the same command goes on" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")


def test_one_sample_that_is_too_large_is_named_with_its_block(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(train, "realize", full)
        said = run.fails(capsys, tmp_path / "out", 1)
    assert said.startswith("swquant: in Train on block 0, memory ran out")
    run.finish(tmp_path / "out")
