"""``from_pretrained`` in the context: packed for every format, as before for all else, and as before after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from swquant import Recipe, SwquantError, load, quantize
from swquant.integrations.transformers import packed_transformers
from swquant.runtime.linear import PackedLinear

MakeModel = Callable[..., Path]
FORMATS = ("compressed_tensors", "gptq", "auto_round", "mlx")
TOKENS = torch.arange(3, 35).unsqueeze(0)


@pytest.fixture(scope="module")
def source(make_model: MakeModel) -> Path:
    return make_model("llama", 2, torch.float32)


@pytest.fixture(scope="module")
def outputs(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("outputs") / "out"
    recipe = Recipe(
        bits=2, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=32, evaluation=None,
        format=",".join(FORMATS), device="cpu",
    )  # fmt: skip
    quantize(recipe, source, out)
    return out


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


def packed(model: torch.nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_stays_packed_and_predicts_what_load_does(outputs: Path, form: str) -> None:
    before = vars(PreTrainedModel)["from_pretrained"]
    with packed_transformers():
        model = AutoModelForCausalLM.from_pretrained(outputs / form)
    assert vars(PreTrainedModel)["from_pretrained"] is before
    assert packed(model) == 14
    assert not model.training
    assert torch.equal(logits(model), logits(load(outputs / form, device="cpu")))


def test_a_plain_model_is_loaded_as_before_and_an_error_leaves_the_context(source: Path) -> None:
    before = vars(PreTrainedModel)["from_pretrained"]
    with packed_transformers():
        assert packed(AutoModelForCausalLM.from_pretrained(source)) == 0
    with pytest.raises(OSError, match="nowhere"), packed_transformers():
        AutoModelForCausalLM.from_pretrained(source.parent / "nowhere")
    assert vars(PreTrainedModel)["from_pretrained"] is before


def test_usual_arguments_are_followed(outputs: Path) -> None:
    with packed_transformers("plain"):
        model = AutoModelForCausalLM.from_pretrained(
            str(outputs),
            subfolder="gptq",
            dtype="bfloat16",
            device_map={"": "cpu"},
            attn_implementation="eager",
            low_cpu_mem_usage=True,
        )
        same = type(model).from_pretrained(
            outputs / "compressed_tensors", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {module.kernel for module in model.modules() if isinstance(module, PackedLinear)} == {"plain"}
    assert packed(same) == 14


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, "one device"),
        ({"device_map": 99}, "is not available"),
        ({"max_memory": {0: "1GB"}}, "max_memory of from_pretrained cannot be followed"),
        ({"output_loading_info": True}, "output_loading_info of from_pretrained cannot be followed"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "quantized already"),
        ({"num_hidden_layers": 1}, "differs in"),
    ],
)
def test_what_cannot_be_followed_is_refused(outputs: Path, options: dict[str, object], said: str) -> None:
    with packed_transformers(), pytest.raises(SwquantError, match=said):
        AutoModelForCausalLM.from_pretrained(outputs / "gptq", **options)


def test_a_dtype_that_is_none_is_refused(outputs: Path) -> None:
    with packed_transformers(), pytest.raises(SwquantError, match="no dtype 'float31'"):
        LlamaForCausalLM.from_pretrained(outputs / "mlx", dtype="float31")


def test_another_class_than_the_models_is_refused(outputs: Path) -> None:
    with packed_transformers(), pytest.raises(SwquantError, match="LlamaForCausalLM, which is no LlamaModel"):
        AutoModel.from_pretrained(outputs / "mlx")


def test_a_damaged_model_is_refused_as_load_refuses_it(outputs: Path, tmp_path: Path) -> None:
    for file in (outputs / "gptq").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with packed_transformers(), pytest.raises(SwquantError, match="bits"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
