"""The table of installations: which cases it has, and that it never claims what was only resolved."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix_tool", ROOT / "tools" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_lower_ends_are_those_that_are_claimed(tool: ModuleType) -> None:
    claimed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    torch, transformers = tool.lower_ends()
    assert re.fullmatch(r"torch==\d+\.\d+\.\*", torch)
    assert f'"{torch.replace("==", ">=").removesuffix(".*")},' in claimed
    assert f'"{transformers.replace("==", ">=").removesuffix(".*")},' in claimed


def test_every_python_has_both_ends_and_what_is_not_here_is_not_installed(tool: ModuleType) -> None:
    here = {"3.10": "/a", "3.12": "/b"}
    found = list(tool.cases(here))
    wheels = [(case.python, case.end) for case, _ in found if case.package == "wheel"]
    assert sorted(wheels) == sorted((version, end) for version in tool.PYTHONS for end in ("newest", "oldest"))
    installed = {(case.python, case.end, case.package) for case, real in found if real}
    assert installed == {
        ("3.10", "newest", "wheel"),
        ("3.10", "oldest", "wheel"),
        ("3.12", "newest", "wheel"),
        ("3.12", "newest", "sdist"),
    }
