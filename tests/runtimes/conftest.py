"""A real llama.cpp, downloaded once into pytest's cache."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from outlines import outline_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.checkpoint.reader import open_checkpoint
from swquant.formats.gguf import Gguf
from swquant.quant.spec import QuantSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass(frozen=True)
class LlamaCpp:
    """The driver, and where it has installed its package."""

    driver: ModuleType
    folder: Path

    def tokens(self, model: Path, texts: list[str]) -> list[list[int]]:
        return self.driver.ask(self.folder, model, texts=texts)["tokens"]

    def log_probabilities(self, model: Path, windows: Tensor) -> Tensor:
        return torch.tensor(self.driver.ask(self.folder, model, windows=windows.tolist())["logProbabilities"])

    def library_log_probabilities(self, model: Path, windows: Tensor) -> Tensor:
        return self.driver.log_probabilities(self.folder, model, windows)

    def dequantize(self, name: str, blocks: Tensor, columns: int) -> Tensor:
        return self.driver.dequantize(self.folder, name, blocks, columns)


@pytest.fixture(scope="session")
def llama_cpp(request: pytest.FixtureRequest) -> LlamaCpp:
    spec = importlib.util.spec_from_file_location("node_llama_cpp", BENCHMARKS / "node_llama_cpp.py")
    assert spec is not None
    assert spec.loader is not None
    driver: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = driver
    spec.loader.exec_module(driver)
    try:
        return LlamaCpp(driver, driver.install(Path(request.config.cache.mkdir(f"node-llama-cpp-{driver.VERSION}"))))
    except driver.UnavailableError as error:
        pytest.skip(f"no llama.cpp: {error}")


@pytest.fixture(scope="session")
def write_plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function from a model directory to a GGUF file of its weights as they are."""

    def write(directory: Path) -> Path:
        checkpoint = open_checkpoint(directory)
        outline = outline_of(directory, checkpoint.config, QuantSpec(8, 32, True), checkpoint.dtype, {}, ("lm_head",))
        out = tmp_path_factory.mktemp("plain") / "out"
        Gguf().write(
            out, QuantizedModel(outline, lambda: ({name: checkpoint.read(name)} for name in checkpoint.tensors))
        )
        return out / "model.gguf"

    return write
