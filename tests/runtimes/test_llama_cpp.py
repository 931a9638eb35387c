"""Whole models in a real llama.cpp: every architecture, every type of blocks, the demo model end to end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import swquant
from swquant.calibration import eval_windows
from swquant.checkpoint.reader import read_config
from swquant.corpus import tokenize
from swquant.formats.gguf import Gguf
from swquant.formats.gguf_blocks import block_type
from swquant.quant.qtensor import QTensor
from swquant.recipe import Recipe
from swquant.run import quantize
from swquant.tokenizer import load_tokenizer
from tiny_models import save_tiny

pytestmark = pytest.mark.slow

MakeModel = Callable[..., Path]
ASSETS = Path(swquant.__file__).parent / "demo_assets"
WINDOWS, LENGTH = 6, 128
TOLERANCE = 0.02
"""Of a log probability: llama.cpp's cache keeps keys and values in half precision."""

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama all heads": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 0.1}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn attention": ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


LONG_YARN = {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 32}
GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
FACTORS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {
            "layers": 7,
            "query_pre_attn_scalar": 32,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        },
    ),
    "gemma3 in turns": ("gemma3_text", {"layers": 4, "query_pre_attn_scalar": 32}),
    "gemma3 untied": ("gemma3_text", {"query_pre_attn_scalar": 32, "tie_word_embeddings": False}),
    "gemma3 linear": (
        "gemma3_text",
        {"query_pre_attn_scalar": 32, "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
    ),
    "gemma2": ("gemma2", {"layers": 4, "query_pre_attn_scalar": 32}),
    "granite": ("granite", FACTORS),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"layers": 4}),
    "olmo3 yarn": (
        "olmo3",
        {"rope_parameters": {"full_attention": LONG_YARN, "sliding_attention": {**LOCAL, "rope_theta": 5e5}}},
    ),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
}


def log_probabilities(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, windows[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_predicts_what_transformers_predicts(
    name: str, make_model: MakeModel, write_plain: Callable[[Path], Path], llama_cpp: Any
) -> None:
    family, settings = MODELS[name]
    folder = make_model(family, 2, torch.float32, **settings)
    windows = torch.randint(2, 320, (2, 60), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = log_probabilities(model, windows)
    found = llama_cpp.log_probabilities(write_plain(folder), windows)
    assert (found - expected).abs().max() < TOLERANCE
    reversed_order = log_probabilities(model, windows.flip(1))
    assert (reversed_order.flip(1) - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_other_architectures_predict_what_transformers_predicts(
    name: str, write_plain: Callable[[Path], Path], llama_cpp: Any, tmp_path: Path
) -> None:
    """Windows of 60 tokens: longer than those of sliding attention."""
    model_type, settings = TINY[name]
    folder = save_tiny(tmp_path / "model", model_type, **settings)
    windows = torch.randint(2, 320, (2, 60), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = log_probabilities(model, windows)
    found = llama_cpp.library_log_probabilities(write_plain(folder), windows)
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 20 * TOLERANCE


@pytest.mark.parametrize("name", [name for name, (_, settings) in MODELS.items() if "rope_parameters" in settings])
def test_rotary_settings_matter_to_these_models(name: str, make_model: MakeModel) -> None:
    family, settings = MODELS[name]
    windows = torch.randint(2, 320, (2, 60), generator=torch.Generator().manual_seed(0))
    with_them, without = (
        log_probabilities(AutoModelForCausalLM.from_pretrained(make_model(family, 2, **given)), windows)
        for given in (settings, {})
    )
    assert (with_them - without).abs().max() > 5 * TOLERANCE


@pytest.fixture(scope="module")
def wide_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, its MLPs widened by channels of zeros to a multiple of 256, which changes nothing."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(ASSETS / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    more = -config["intermediate_size"] % 256
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = pad(tensor, (0, 0, 0, more)).contiguous()
        elif name.endswith("down_proj.weight"):
            tensors[name] = pad(tensor, (0, more)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["intermediate_size"] += more
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GRIDS: dict[str, dict[str, Any]] = {
    "q2_0": {"bits": 2, "group_size": 64, "symmetric": True},
    "q2_0 of 128": {"bits": 2, "group_size": 128, "symmetric": True},
    "q4_0": {"bits": 4, "group_size": 64, "symmetric": True},
    "q4_0 of channels": {"bits": 4, "group_size": "channel", "symmetric": True},
    "q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "q8_0": {"bits": 8, "group_size": 128, "symmetric": True},
    "q2_K": {"grid": "q2_k"},
    "q3_K": {"grid": "q3_k"},
    "q4_K": {"grid": "q4_k"},
}


MIXED = {
    "bits": 2,
    "group_size": 64,
    "grids": {
        "*.down_proj": {"bits": 4, "group_size": 32, "symmetric": False},
        "*.v_proj": {"bits": 8, "group_size": 64, "symmetric": True},
        "*.layers.0.mlp.gate_proj": {"grid": "q3_k"},
        "*.layers.0.mlp.up_proj": {"grid": "q3_k"},
        "*.layers.5.*": None,
    },
    "allow_split": True,
    "embedding_bits": 8,
}


@pytest.mark.parametrize("grid", [*GRIDS, "mixed"])
def test_the_demo_model_on_every_grid(grid: str, wide_demo: Path, llama_cpp: Any, tmp_path: Path) -> None:
    evaluation = ASSETS / "evaluation.txt"
    recipe = Recipe.from_mapping(
        {
            **(MIXED if grid == "mixed" else GRIDS[grid]),
            "method": "rtn",
            "format": "gguf",
            "calibration": str(ASSETS / "calibration.txt"),
            "evaluation": str(evaluation),
            "samples": 1,
            "evaluation_samples": WINDOWS,
            "seq_len": LENGTH,
            "device": "cpu",
        }
    )
    source = wide_demo if "K" in grid or grid == "mixed" else ASSETS / "model"
    report = quantize(recipe, source, tmp_path / "out")
    assert report.quality is not None
    text = evaluation.read_text(encoding="utf-8")
    tokenizer = load_tokenizer(source)
    windows = eval_windows(tokenize(tokenizer, text), LENGTH, WINDOWS)
    found = llama_cpp.log_probabilities(tmp_path / "out" / "model.gguf", windows)
    assert float(torch.exp(-found.mean())) == pytest.approx(report.quality.perplexity, rel=5e-3)
    expected = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    assert llama_cpp.tokens(tmp_path / "out" / "model.gguf", [text[:20_000]]) == [expected]
    blocks = read_config(source)["num_hidden_layers"]
    counts = {grid.split()[0]: 7 * blocks}
    if grid == "mixed":  # all but the last block; the embedding, which is the head
        counts = {"q4_1": blocks - 1, "q8_0": blocks - 1 + 1, "q3_K": 2, "q2_0": 5 * (blocks - 1) - 2}
    assert _compare_blocks(tmp_path / "out", llama_cpp) == counts


def _compare_blocks(out: Path, llama_cpp: Any) -> Counter[str]:
    """llama.cpp's own dequantization gives our weights, exactly but where ``m`` rounds; how many of each type."""
    model = Gguf().read(out, read_config(out))
    assert model is not None
    checked = Counter[str]()
    for part in model.parts():
        for full, weight in part.items():
            if not isinstance(weight, QTensor):
                continue
            kind = block_type(weight.spec)
            assert kind is not None
            blocks = Gguf().encode("proj", weight, torch.bfloat16)["proj.weight"]
            name = kind.name.lower().replace("_k", "_K")
            found, expected = llama_cpp.dequantize(name, blocks, weight.codes.shape[1]), weight.dequantize()
            if name == "q4_1":
                assert (found - expected).abs().max() <= expected.abs().max() * 2.0**-10, full
            else:
                assert torch.equal(found, expected), full
            checked[name] += 1
    return checked
