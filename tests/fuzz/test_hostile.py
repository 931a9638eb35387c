"""Hypothesis on every target: no traceback, no path left, no memory by a number in a file, no code run."""

from __future__ import annotations

import resource
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .mutations import damaged_bytes, damaged_front, damaged_json, damaged_safetensors
from .targets import FORMATS, make_outputs, make_targets

MEGABYTES = 200
EVERY_DAY = ("index", "config", "tokenizer", "report", "shard", "gptq_config", "gguf", "recipe", "loss", "methods")
JSON = ("index", "config", "generation", "tokenizer", "tokenizer_config", "writer_config", "writer_tokenizer", "report")
JSON = (*JSON, "converted_report", *(f"{name}_config" for name in FORMATS))
SAFETENSORS = ("shard", "compressed_tensors", "gptq", "mlx", "auto_round")
FRONT = ("gguf", "onnx")
TEXTS = ("recipe", "loss", "methods", "card")
WORDS = (
    "mse",
    "l2",
    "0.9",
    "*",
    "+",
    "(",
    ")",
    "=",
    ",",
    "slices",
    "-",
    "1e400",
    "'x'",
    "[",
    "{",
    "!!python/name:os.system",
)
WORDS = (
    *WORDS,
    "awq",
    "epochs",
    ":",
    "\n",
    "&a",
    "*a",
    "\0",
    "lambda: 0",
    "__import__('os')",
    "bits",
    "'",
    '"',
    "\\x",
    "#",
)


@pytest.fixture(scope="session")
def targets(make_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    plain = make_model("llama", 1)
    return make_targets(plain, make_outputs(plain, text, folder), folder)


@contextmanager
def little_memory() -> Iterator[None]:
    """The most memory that the process has held grows by little, whatever numbers stand in files.

    Of one file and not of a test: hypothesis keeps the examples.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB"


class Content(bytes):
    """Bytes that are not printed whole; those of the last failure lie in the target's directory."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, {zlib.crc32(self):08x}>"


def damage(name: str, seed: bytes) -> st.SearchStrategy[bytes]:
    if name in JSON:
        return damaged_json(seed)
    if name in SAFETENSORS:
        return damaged_safetensors(seed)
    if name in FRONT:
        return st.one_of(damaged_front(seed), damaged_bytes(seed))
    words = st.lists(st.sampled_from(WORDS), max_size=12).map(lambda some: " ".join(some).encode())
    return st.one_of(damaged_bytes(seed), words, st.binary(max_size=64))


def attack(targets: dict[str, Any], name: str, examples: int) -> None:
    target = targets[name]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damage(name, target.seed).map(Content))
    def hit(content: bytes) -> None:
        with little_memory():
            target(content)

    target(target.seed)
    hit()


@pytest.mark.parametrize("name", EVERY_DAY)
def test_a_strangers_files(targets: dict[str, Any], name: str) -> None:
    attack(targets, name, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON, *SAFETENSORS, *FRONT, *TEXTS])
def test_many_of_a_strangers_files(targets: dict[str, Any], name: str) -> None:
    attack(targets, name, 1500)
