"""Tiny real checkpoints: random weights, a trained tokenizer, written by transformers, each made once per session."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when these are imported; without it a name of no dataset waits for the network
)

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

settings.register_profile("swquant", deadline=None)  # a machine with other work fails no test
settings.load_profile("swquant")

TEXT = "the model reads a long text and writes short codes for each weight of every block in turn"
WORDS = TEXT.split(" ")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")

MODEL_TYPES = {"gemma3": "gemma3_text"}
"""Of families that transformers calls by another name."""
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": False},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": False},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
    },
}
"""Settings of a family whose defaults fit no tiny model, or change nothing."""

MakeModel = Callable[..., Path]
Contents = frozenset[tuple[str, int, int]]


def prose(words: int, seed: int = 0) -> str:
    draws = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in draws.tolist()) + ".\n"


def _save_tokenizer(folder: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([prose(2000)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _settings(family: str, layers: int) -> dict[str, Any]:
    shared = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "opt":
        return shared | {"ffn_dim": 128, "word_embed_proj_dim": 64}
    return shared | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16} | OWN.get(family, {})


def _save_model(folder: Path, family: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(0, 0.1) if value.dim() == 2 else value.add_(torch.randn_like(value) * 0.1)
    model.to(dtype).save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("Anyone may use this model.\n")


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have ``folder`` written by the first of all workers that asks for it."""
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            unfinished.rename(folder)
    return folder


def _contents(folder: Path) -> Contents:
    found = ((path.relative_to(folder), path.stat()) for path in folder.rglob("*"))
    return frozenset((str(name), status.st_size, status.st_mtime_ns) for name, status in found)


class Shared:
    """The checkpoints that the tests of all workers share, and which of them the running test was given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[Path, Contents] = {}
        self.given: set[Path] = set()
        root.mkdir(exist_ok=True)

    def model(self, family: str, layers: int, dtype: torch.dtype, settings: dict[str, Any]) -> Path:
        given = _settings(family, layers) | settings
        words = f"{family} {dtype} {sorted(given.items())}"
        place = self.root / f"{family}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"

        def write(folder: Path) -> None:
            _save_model(folder / "model", family, dtype, given)
            shutil.copytree(_once(self.root / "tokenizer", _save_tokenizer), folder / "model", dirs_exist_ok=True)

        folder = _once(place, write) / "model"
        self.contents.setdefault(folder, _contents(folder))
        self.given.add(folder)
        return folder

    def check(self, folders: set[Path]) -> None:
        for folder in folders:
            now = _contents(folder)
            changed = {name for name, *_ in now ^ self.contents[folder]}
            # The next test is not to fail for what this one did.
            self.contents[folder] = now
            assert not changed, f"the test changed {changed} in a shared model; take make_model(..., fresh=True)"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    base = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own in the session's.
    models = Shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models")
    yield models
    models.check(set(models.contents))


@pytest.fixture(autouse=True, scope="session")
def the_same_precision_on_every_processor() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swquant.device._has_bfloat16_products", lambda: False)
        yield


@pytest.fixture(autouse=True)
def shared_models_stay_as_they_are(shared: Shared) -> Iterator[None]:
    shared.given.clear()
    yield
    shared.check(shared.given)


@pytest.fixture(scope="session")
def make_model(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function from a family, a number of layers, a dtype and settings to a model directory.

    Tests share the directory and only read it; with ``fresh=True`` it is a copy to write into.
    """

    def make(
        family: str = "llama",
        layers: int = 2,
        dtype: torch.dtype = torch.float32,
        *,
        fresh: bool = False,
        **settings: Any,
    ) -> Path:
        folder = shared.model(family, layers, dtype, settings)
        return shutil.copytree(folder, tmp_path_factory.mktemp(family) / "model") if fresh else folder

    return make


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    return make_model("llama", 2, torch.bfloat16)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text("".join(prose(60, seed) for seed in range(60)))
    return path
