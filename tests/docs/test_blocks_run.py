"""Every block of commands or of Python in the documentation, run as it stands, page by page."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from docs.pages import PAGES, blocks
from swquant import Recipe, SwquantError, quantize
from swquant.cli import main

FOREIGN = (
    *("llama_cpp", "onnxruntime_genai", "auto_round", "gptqmodel", "optimum"),
    *("peft", "lm_eval", "torchao", "llmcompressor"),
)
"""Packages of runtimes and of integrations, which few environments have; each integration has a test with its own."""

SIZES = {"900MB": "3MB"}
"""What a page asks of a model of the usual size, and what the small one can be asked."""

PATH = {"formats.md": ("compressed_tensors", "gptq"), "onnx.md": ("onnx", "onnx")}
"""Pages whose Python blocks load an output in ``path``, as the lines that a run prints do; the format for each."""

RUN = [page for page in PAGES if blocks(page, "bash", "python")]

RTN = Recipe(method="rtn", calibration="wiki.txt", samples=2, seq_len=16, evaluation_samples=2, device="cpu")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # other libraries'


@pytest.fixture
def place(make_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what pages take for granted: a model, a text."""
    model = make_model("llama", 2, hidden_size=256, intermediate_size=256, head_dim=64)
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(text, tmp_path / "wiki.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, place: Path) -> None:
    content = "".join(code for _, code in blocks(page, "bash", "python"))
    made = set(re.findall(r"--out (?:\./)?(\S+)", content))
    for name in set(re.findall(r'"(?:\./)?((?:model|out)[\w-]*)"', content)) - made - {"model"}:
        quantize(RTN, place / "model", place / name)
    names: dict[str, object] = {}
    formats = iter(PATH.get(page, ()))
    ran = 0
    for kind, block in blocks(page, "bash", "python"):
        if kind == "bash":
            ran += sum(_shell(line) for line in block.splitlines() if line)
            continue
        if (form := next(formats, None)) is not None:
            names["path"] = str(place / form)
            quantize(replace(RTN, format=form), place / "model", place / form)
        ran += _python(block, names)
    if not ran:
        pytest.skip(f"{page} has nothing that runs without other software")


def _shell(line: str) -> bool:
    """Run a command; whether it could be run here."""
    command, *arguments = (SIZES.get(word, word) for word in shlex.split(line, comments=True))
    if command == "swquant":
        main(arguments)
        return True
    if shutil.which(command) is None:
        return False
    subprocess.run([command, *arguments], check=True)
    return True


def _python(block: str, names: dict[str, object]) -> bool:
    """Run a block; whether what it imports is here."""
    try:
        exec(block, names)
    except (ImportError, SwquantError) as missing:  # transformers names the package in the sentence alone, as we do
        if not any(name in str(missing) for name in FOREIGN):
            raise
        return False
    return True
