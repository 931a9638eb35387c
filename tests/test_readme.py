"""Every command and every Python block of the README, run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from swquant.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readmes_blocks_run(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(llama, tmp_path / "model")
    shutil.copy(text, tmp_path / "wiki.txt")
    monkeypatch.chdir(tmp_path)
    assert [kind for kind, _ in BLOCKS].count("bash") >= 1
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "swquant"
            main(arguments)
    assert (tmp_path / "model-w2" / "report.json").exists()
    assert (tmp_path / "model-py" / "report.json").exists()


def test_the_readmes_make_targets_are_what_ci_runs() -> None:
    targets = re.findall(r"^    make (\w+)$", README, flags=re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text()
    assert targets == ["demo", "test"]
    assert all(f"make {target}\n" in ci for target in targets)


def test_the_readmes_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(((?!https:)[^)]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
