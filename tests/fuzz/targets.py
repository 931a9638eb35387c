"""What a stranger's bytes reach: each target takes some, and raises nothing but what a user is told in one sentence.

A target is made once, with a directory of its own that holds a sound model, and then called with bytes that take the
place of one file, or are one text. Hypothesis (``test_hostile.py``) and atheris (``fuzz.py``) drive the same targets.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from swquant import Recipe, SwquantError, quantize
from swquant.card import licence_of
from swquant.checkpoint.reader import open_checkpoint
from swquant.compare import read_report
from swquant.convert import convert
from swquant.corpus import tokenize
from swquant.formats import read_quantized
from swquant.formats.gguf import Gguf
from swquant.formats.gguf_model import describe_model
from swquant.formats.gguf_tokenizer import read_vocabulary
from swquant.formats.gguf_writer import _add_model, _add_vocabulary
from swquant.inspection import inspect
from swquant.losses import parse_loss
from swquant.methods import parse_methods
from swquant.plan import make_plan
from swquant.tokenizer import load_tokenizer

Target = Callable[[bytes], None]
INDEX = "model.safetensors.index.json"
FORMATS = {"compressed_tensors": "model.safetensors", "gptq": "model.safetensors", "mlx": "model.safetensors"}
FORMATS |= {"auto_round": "model.safetensors", "gguf": "model.gguf", "onnx": "model.onnx"}


@contextlib.contextmanager
def sentence() -> Iterator[None]:
    """Take what a user may be told: one line that a terminal can show."""
    try:
        yield
    except SwquantError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 3000


@dataclass(frozen=True)
class FileTarget:
    """Bytes take the place of the file ``name`` in ``directory``, and ``use`` looks at the directory."""

    directory: Path
    name: str
    use: Callable[[Path], object]

    @property
    def seed(self) -> bytes:
        """The sound content."""
        return (self.directory.parent / "sound" / self.name).read_bytes()

    def __call__(self, content: bytes) -> None:
        (self.directory / self.name).write_bytes(content)
        with sentence():
            self.use(self.directory)


@dataclass(frozen=True)
class TextTarget:
    """Bytes are a text that ``use`` reads."""

    seed: bytes
    use: Callable[[str], object]

    def __call__(self, content: bytes) -> None:
        with sentence():
            self.use(content.decode("utf-8", "surrogateescape"))


def file_target(sound: Path, folder: Path, name: str, use: Callable[[Path], object]) -> FileTarget:
    """A target on copies of the directory ``sound`` in ``folder``."""
    for copy in ("sound", "mine"):
        shutil.copytree(sound, folder / copy)
    return FileTarget(folder / "mine", name, use)


def read_all(directory: Path) -> None:
    """Every tensor, as a run reads it."""
    checkpoint = open_checkpoint(directory)
    for name, stored in checkpoint.tensors.items():
        assert checkpoint.read(name).nbytes == stored.nbytes
        if len(stored.shape) == 2:
            checkpoint.rows(name, torch.tensor([0]))
    checkpoint.sidecars()
    checkpoint.fingerprint()


def read_codes(directory: Path) -> None:
    """Every code, as ``inspect`` and ``convert`` read them."""
    _, model = read_quantized(directory)
    for part in model.parts():
        for value in part.values():
            weight = value if isinstance(value, Tensor) else value.dequantize()
            assert weight.numel() < 1 << 24


def plan(directory: Path) -> None:
    """All that is done with a configuration before a weight is read."""
    make_plan(Recipe(group_size=32, method="rtn", device="cpu"), directory)


def vocabulary(directory: Path) -> None:
    """All that is done with a tokenizer."""
    tokens = tokenize(load_tokenizer(directory), "the model reads a long text")
    assert tokens.dtype == torch.long


def gguf_outline(directory: Path) -> None:
    """What the GGUF writer takes from a model: its configuration and its tokenizer."""
    recipe = Recipe(group_size=32, method="rtn", device="cpu", format="gguf")
    outline = make_plan(recipe, directory).outline
    Gguf().check(outline)
    model = describe_model(outline.config)
    writer = gguf.GGUFWriter(directory.parent / "metadata.gguf", model.architecture.name)
    try:
        _add_model(writer, gguf, model)
        _add_vocabulary(writer, read_vocabulary(directory, outline.config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    finally:
        writer.close()


def report(directory: Path) -> None:
    """Those who read a finished run's report."""
    read_report(directory)


def converted(directory: Path) -> None:
    """A report on its way into a new output."""
    out = directory.parent / "converted"
    shutil.rmtree(out, ignore_errors=True)
    convert(directory, out, format="mlx")
    inspect(out)


def recipe(path: Path, text: str) -> None:
    """A recipe from a file."""
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found = Recipe.load(path)
    found.spec  # noqa: B018
    found.to_yaml()


def make_targets(plain: Path, quantized: dict[str, Path], folder: Path) -> dict[str, Any]:
    """All of them by name.

    Args:
        plain: A sound model.
        quantized: Outputs by format.
        folder: Where copies go.
    """
    sharded = folder / "sharded-model"
    shutil.copytree(plain, sharded)
    names = list(open_checkpoint(plain).tensors)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    loss, method = b"0.9*mse + 0.1*sliced_wasserstein(slices=256, power=1)", b"awq + block_ap(epochs = 4) + tesseraq"
    found: dict[str, Any] = {
        "shard": file_target(plain, folder / "shard", "model.safetensors", read_all),
        "index": file_target(sharded, folder / "index", INDEX, read_all),
        "config": file_target(plain, folder / "config", "config.json", plan),
        "generation": file_target(plain, folder / "generation", "generation_config.json", plan),
        "tokenizer": file_target(plain, folder / "tokenizer", "tokenizer.json", vocabulary),
        "tokenizer_config": file_target(plain, folder / "tokenizer-config", "tokenizer_config.json", vocabulary),
        "writer_config": file_target(plain, folder / "writer-config", "config.json", gguf_outline),
        "writer_tokenizer": file_target(plain, folder / "writer-tokenizer", "tokenizer.json", gguf_outline),
        "report": file_target(quantized["gptq"], folder / "report", "report.json", report),
        "converted_report": file_target(quantized["gptq"], folder / "converted-report", "report.json", converted),
        "card": file_target(quantized["gptq"], folder / "card", "README.md", licence_of),
        "recipe": TextTarget(Recipe().to_yaml().encode(), partial(recipe, folder / "recipe.yaml")),
        "loss": TextTarget(loss, parse_loss),
        "methods": TextTarget(method, parse_methods),
    }
    for name, file in FORMATS.items():
        found[name] = file_target(quantized[name], folder / name, file, read_codes)
        found[f"{name}_config"] = file_target(quantized[name], folder / f"{name}-config", "config.json", read_codes)
    return found


def make_outputs(plain: Path, text: Path, folder: Path) -> dict[str, Path]:
    """The model ``plain`` in every format."""
    names = ",".join(FORMATS)
    kind = Recipe(bits=4, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=16, format=names)
    quantize(kind.override({"evaluation_samples": 2, "device": "cpu"}), plain, folder / "out")
    for name in FORMATS:
        for file in ("report.json", "README.md"):
            shutil.copy(folder / "out" / file, folder / "out" / name)
    return {name: folder / "out" / name for name in FORMATS}


def small_model(folder: Path) -> Path:
    """A LLaMA of one block and random weights with the demo's tokenizer, for those who have no fixtures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from swquant.demo import ASSETS

    assets = Path(str(ASSETS / "model"))
    config = LlamaConfig(
        vocab_size=json.loads((assets / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in assets.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
