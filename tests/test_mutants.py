"""The mutation tool: which changes it makes, and that it tells a test that sees one from a test that does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "mutants.py"
CODE = '''\
def clipped(a: int | None, low: int) -> int:
    """At least ``low + 1``."""
    if a is None or a < low:
        return low + 1
    return a
'''


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The tool, on a project of one function with one test that knows half of it."""
    spec = importlib.util.spec_from_file_location("mutants_of_a_project", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    package = tmp_path / "src" / "project" / "quant"
    package.mkdir(parents=True)
    (package / "clip.py").write_text(CODE)
    (tmp_path / "tests" / "quant").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: x\n    gpu: x\n")
    test = "from project.quant.clip import clipped\n\n\ndef test_it():\n    assert clipped(None, 1) == 2\n"
    (tmp_path / "tests" / "quant" / "test_clip.py").write_text(test)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_it_changes_what_computes_and_nothing_else(tool: ModuleType) -> None:
    found = list(tool.mutants(tool.ROOT / "src" / "project" / "quant" / "clip.py"))
    changed = {(one.before.splitlines()[0], one.after.splitlines()[0]) for one in found}
    assert changed == {
        ("if a is None or a < low:", "if not (a is None or a < low):"),
        ("a is None or a < low", "a is None and a < low"),
        ("a is None", "a is not None"),
        ("a < low", "a <= low"),
        ("low + 1", "low - 1"),
        ("1", "2"),
    }
    texts = {tool.mutated(CODE, one.place) for one in found}
    assert len(texts) == len(found)


@pytest.mark.slow
def test_what_no_test_sees_survives(tool: ModuleType) -> None:
    source = tool.ROOT / "src"
    found = list(tool.mutants(source / "project" / "quant" / "clip.py"))
    came = {
        one.before.splitlines()[0]: tool.outcome(one, source, 120) for one in found if one.before in ("a < low", "1")
    }
    assert came == {"a < low": "survived", "1": "killed"}
    assert (source / "project" / "quant" / "clip.py").read_text() == CODE


@pytest.mark.slow
def test_tests_that_fail_anyway_are_refused(tool: ModuleType) -> None:
    source = tool.ROOT / "src"
    tool.require_sound(source, {"quant"}, 120)
    (tool.ROOT / "tests" / "quant" / "test_clip.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(SystemExit, match="tests/quant fails as it is"):
        tool.require_sound(source, {"quant"}, 120)
    (tool.ROOT / "tests" / "quant" / "test_clip.py").unlink()
    with pytest.raises(RuntimeError):  # pytest finds nothing to run, which kills no mutant
        tool.require_sound(source, {"quant"}, 120)
