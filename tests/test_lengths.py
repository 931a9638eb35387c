"""The lint of lengths: what it counts, and that src/ holds to it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "lengths.py"
SHORT = '''\
"""A module,
of three lines."""

# a comment
LIMIT = 3
"""What it
limits."""


def one(a: int) -> int:
    """Says
    much."""
    # why
    text = """
    counts"""

    return a + len(text)
'''


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lengths", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_counts_and_words_about_it_do_not(tool: ModuleType) -> None:
    assert len(tool.counted(SHORT)) == 5
    assert list(tool.too_long(SHORT, "short.py")) == []


@pytest.mark.parametrize("over", [False, True])
def test_a_function_and_a_file_over_the_limit_are_named(tool: ModuleType, over: bool) -> None:
    body = "    a += 1\n" * (tool.FUNCTION - 1 + over)
    function = f"class A:\n    pass\n\n\ndef long(a: int) -> None:\n{body}"
    found = list(tool.too_long(function, "a.py"))
    assert found == ([f"a.py:5: long has 61 lines of code, at most {tool.FUNCTION}; split it"] if over else [])
    file = "a = 1\n" * (tool.FILE + over)
    assert list(tool.too_long(file, "a.py")) == (
        [f"a.py: 401 lines of code, at most {tool.FILE}; split it"] if over else []
    )


def test_src_holds_to_it() -> None:
    ended = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
