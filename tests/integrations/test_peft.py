"""LoRA on packed layers: it trains, is saved beside the model, merges into plain layers and comes apart again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swquant import Recipe, SwquantError, load, quantize
from swquant.integrations.peft import packed_lora
from swquant.runtime.linear import PackedLinear

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install 'swquant[peft]'")

# peft asks transformers by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeModel = Callable[..., Path]
TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.arange(3, 35).unsqueeze(0)


@pytest.fixture(scope="module")
def quantized(make_model: MakeModel, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "out"
    recipe = Recipe(
        bits=2, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=32, evaluation=None, device="cpu"
    )
    quantize(recipe, make_model("llama", 2, torch.float32), out)
    return out


def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def adapted(directory: Path) -> torch.nn.Module:
    """A packed model whose adapters have been trained for a few steps on one sample."""
    model = load(directory, device="cpu")
    torch.manual_seed(0)
    lora = peft.get_peft_model(model, packed_lora(model, peft.LoraConfig(r=4, target_modules=TARGETS)))
    optimizer = torch.optim.Adam([value for value in lora.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = lora(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return lora.eval()


def test_adapters_alone_train_and_the_rest_stays_packed(quantized: Path) -> None:
    lora, fresh = adapted(quantized), load(quantized, device="cpu")
    assert all("lora_" in name for name, value in lora.named_parameters() if value.requires_grad)
    layers = [module for module in lora.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    for ours, theirs in zip(layers, (m for m in fresh.modules() if isinstance(m, PackedLinear)), strict=True):
        assert torch.equal(ours.weight_packed, theirs.weight_packed)
        assert torch.equal(ours.weight_scale, theirs.weight_scale)


def test_adapters_are_saved_beside_the_model_and_read_again(quantized: Path, tmp_path: Path) -> None:
    lora = adapted(quantized)
    with torch.no_grad():
        expected = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    assert not any("weight_packed" in file.name for file in (tmp_path / "adapter").iterdir())
    model = load(quantized, device="cpu")
    config = packed_lora(model, peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", config=config)
    with torch.no_grad():
        torch.testing.assert_close(logits(again.eval()), expected)


def test_merging_makes_plain_layers_and_unmerging_packed_ones(quantized: Path) -> None:
    lora = adapted(quantized)
    with torch.no_grad():
        expected = logits(lora)
        lora.merge_adapter()
        assert sum(isinstance(module, PackedLinear) for module in lora.modules()) == 10
        torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)
        lora.unmerge_adapter()
        assert sum(isinstance(module, PackedLinear) for module in lora.modules()) == 14
        torch.testing.assert_close(logits(lora), expected)


@pytest.mark.parametrize(
    "targets", [TARGETS, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]]
)
def test_a_merged_model_is_saved_as_what_it_is(quantized: Path, tmp_path: Path, targets: list[str]) -> None:
    model = load(quantized, device="cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    lora = peft.get_peft_model(model, packed_lora(model, config)).eval()
    with torch.no_grad():
        expected = logits(lora)
        merged = lora.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        if len(targets) == 7:
            assert not hasattr(merged.config, "quantization_config")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        else:
            again = load(tmp_path / "merged", device="cpu")
            assert sum(isinstance(module, PackedLinear) for module in again.modules()) == 10
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": "all-linear"}, "finds no packed layer"),
        ({"target_modules": TARGETS, "init_lora_weights": "pissa"}, "needs a plain weight"),
    ],
)
def test_what_needs_a_plain_weight_is_refused(quantized: Path, options: dict[str, object], said: str) -> None:
    model = load(quantized, device="cpu")
    with pytest.raises(SwquantError, match=said):
        packed_lora(model, peft.LoraConfig(**options))
