"""A hundred SIGKILLs at random moments; `tests/test_run.py` has a few for every day."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_a_hundred_kills_change_no_bit() -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCH), "--kills", "100", "--seed", "1"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("100 kills")
