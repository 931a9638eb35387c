"""Tests that are skipped where a package is missing, run where it is installed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("package", "file", "least"),
    [
        ("peft==0.21.2", "integrations/test_peft.py", 7),
        ("torchao==0.18.0", "examples/test_examples.py", 4),
        ("torchao==0.18.0", "integrations/test_torchao.py", 19),
        ("auto-round==0.16.1", "integrations/test_auto_round.py", 8),
    ],
)
def test_they_pass(environment: Callable[[str, Sequence[str]], Path], package: str, file: str, least: int) -> None:
    python = environment(package.partition("==")[0], (package,))
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert int(finished.stdout.rpartition(" passed")[0].split()[-1]) >= least
