"""A budget of memory against what a process that was given it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process is read from /proc"),
]

MakeModel = Callable[..., Path]

SHARE = 0.8
"""Of what a whole batch takes: four samples at a time take 0.7 of it."""


def command(what: str, source: Path, text: Path, *more: str) -> list[str]:
    method = "--method=block_ap(epochs=1, batch_size=8)"
    sizes = ["--samples=9", "--seq-len=512", "--evaluation-samples=0", "--device=cpu"]
    return [sys.executable, "-m", "swquant", what, str(source), method, *sizes, f"--calibration={text}", *more]


def planned(source: Path, text: Path, *more: str) -> dict[str, Any]:
    ended = subprocess.run(
        command("plan", source, text, "--no-time", "--json", *more), check=True, stdout=subprocess.PIPE
    )
    return json.loads(ended.stdout)


def peak_of(given: list[str]) -> int:
    """The most bytes that a process has held, ``VmHWM`` as it was shortly before the end."""
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = 0
    while process.poll() is None:
        found = [line.split()[1] for line in _status(process.pid) if line.startswith("VmHWM:")]
        peak = max(peak, *(int(kilobytes) * 1024 for kilobytes in found), 0)
        time.sleep(0.01)
    assert process.returncode == 0
    return peak


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_a_run_holds_no_more_than_its_budget_and_the_streams(make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    source = make_model("llama", 1, torch.bfloat16, head_dim=64, max_position_embeddings=512, **sizes)
    whole = planned(source, text)
    budget = whole["parts"]["interpreter"] + int(SHARE * whole["device"])
    cut = planned(source, text, f"--host-memory={budget}")
    assert (whole["micro_batch"], cut["micro_batch"]) == (8, 4)
    assert whole["host"] - whole["parts"]["hidden_states"] > budget
    kept = peak_of(command("quantize", source, text, f"--out={tmp_path / 'kept'}", f"--host-memory={budget}"))
    assert 0.8 * budget < kept - cut["parts"]["hidden_states"] <= budget
    assert peak_of(command("quantize", source, text, f"--out={tmp_path / 'free'}")) > kept + whole["device"] / 4
