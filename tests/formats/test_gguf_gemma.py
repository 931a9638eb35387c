"""Norms of 1 + w in a file: stored with the 1, read back without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from outlines import tensors_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.formats.gguf import Gguf
from swquant.quant.spec import QuantSpec
from swquant.verification import verify

SPEC = QuantSpec(4, 32, True)


def test_gemmas_norms_are_stored_with_their_one(quantized: Callable[..., QuantizedModel], tmp_path: Path) -> None:
    model = quantized(SPEC, "gemma3", tie_word_embeddings=True)
    Gguf().write(tmp_path / "out", model)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors, ours = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}, tensors_of(model)
    names = {
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.post_attention_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_norm": "model.layers.1.pre_feedforward_layernorm",
        "blk.1.post_ffw_norm": "model.layers.1.post_feedforward_layernorm",
        "blk.1.attn_q_norm": "model.layers.1.self_attn.q_norm",
        "blk.1.attn_k_norm": "model.layers.1.self_attn.k_norm",
        "output_norm": "model.norm",
    }
    for name, module in names.items():
        norm = ours[f"{module}.weight"]
        assert isinstance(norm, Tensor)
        assert torch.equal(tensors[f"{name}.weight"], 1 + norm.float())
    assert "output.weight" not in tensors
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": 3,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }
    assert {name: fields[f"gemma3.{name}"] for name in expected} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_one_is_taken_off_again(
    dtype: torch.dtype, quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    """Weights too small to change 1 + w come back as ones that do not change it either."""
    model = quantized(SPEC, "gemma3", tie_word_embeddings=True)
    name = "model.layers.0.input_layernorm.weight"
    given = torch.cat((torch.logspace(-9, 1, 32), -torch.logspace(-9, 1, 32))).to(dtype)
    parts = [{key: given if key == name else value for key, value in part.items()} for part in model.parts()]
    config = {**model.outline.config, "dtype": str(dtype).removeprefix("torch.")}
    outline = replace(model.outline, config=config, dtype=dtype)
    Gguf().write(tmp_path / "out", QuantizedModel(outline, lambda: iter(parts), model.sidecars))
    assert verify(Gguf(), tmp_path / "out", QuantizedModel(outline, lambda: iter(parts)), None).weights == 14
    back = Gguf().read(tmp_path / "out", read_config(tmp_path / "out"))
    assert back is not None
    found = tensors_of(back)[name]
    assert isinstance(found, Tensor)
    assert found.dtype == dtype
    assert torch.equal(1 + found.float(), 1 + given.float())
    if dtype != torch.float32:
        assert torch.equal(found[given.abs() > 2e-4], given[given.abs() > 2e-4])
