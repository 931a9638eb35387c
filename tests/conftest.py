"""Tiny real checkpoints: random weights, a trained tokenizer, written by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = "the model reads a long text and writes short codes for each weight of every block in turn"
WORDS = TEXT.split(" ")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")

MakeModel = Callable[..., Path]


def prose(words: int, seed: int = 0) -> str:
    draws = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in draws.tolist()) + ".\n"


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([prose(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


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
    return shared | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function from a family, a number of layers, a dtype and settings to a model directory."""

    def make(family: str = "llama", layers: int = 2, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        config = AutoConfig.for_model(family, **_settings(family, layers) | settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for value in model.parameters():
                    value.normal_(0, 0.1) if value.dim() == 2 else value.add_(torch.randn_like(value) * 0.1)
        model.to(dtype).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        (folder / "LICENSE.txt").write_text("Anyone may use this model.\n")
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    return make_model("llama", 2, torch.bfloat16)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text("".join(prose(60, seed) for seed in range(60)))
    return path
