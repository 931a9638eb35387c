"""llm-compressor with our modifier in its recipe: the codes of a run of ours, in files that transformers loads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swquant import Recipe, quantize
from swquant.calibration import sample_windows
from swquant.corpus import read_text, tokenize
from swquant.formats import read_quantized
from swquant.quant.qtensor import QTensor
from swquant.tokenizer import open_reading

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 8, 32
METHOD, LOSS = "gptq + block_ap(epochs=2)", "0.9*mse + 0.1*sliced_wasserstein"
SCRIPT = Path(__file__).parents[3] / "examples" / "llm_compressor_modifier.py"
RUN = """
import json, sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from swquant import SwquantError
import swquant.integrations.llm_compressor as ours
source, tokens, out, dtype, recipe = sys.argv[1:]
rows = load_file(tokens)["tokens"]
masks = (rows >= 0).long()
rows = rows.clamp(0).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": masks.tolist()})
model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
recipe = json.loads(recipe) if recipe.startswith("{") else recipe
try:
    oneshot(model=model, dataset=data, recipe=ours.SwquantModifier(**recipe) if isinstance(recipe, dict) else recipe,
            output_dir=out, num_calibration_samples=len(rows), max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False, log_dir=None)
except (SwquantError, RuntimeError) as error:
    print(f"REFUSED {error}")
"""
YAML = """
quantization_stage:
  quantization_modifiers:
    SwquantModifier:
      ignore: ["lm_head", "re:.*down_proj"]
      method: rtn
      config_groups:
        group_0:
          targets: ["Linear"]
          weights: {num_bits: 3, type: int, symmetric: false, strategy: group, group_size: 32}
"""


@pytest.fixture(scope="module")
def python(environment: Callable[[str, Sequence[str]], Path]) -> Path:
    return environment("llmcompressor", ("llmcompressor==0.14.0.1",))


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path]) -> Callable[[str, torch.dtype], Path]:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return lambda family, dtype: make_model(family, 2, dtype, **shape)


@pytest.fixture(scope="module")
def theirs(
    python: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """What llm-compressor says, and the codes that it writes."""

    def make(
        model: Path, recipe: dict[str, Any] | str, *, dtype: str = "float32", padded: bool = False
    ) -> tuple[str, dict[str, Any]]:
        place = tmp_path_factory.mktemp("llmcompressor")
        reading = open_reading(model)
        rows = sample_windows(tokenize(reading.tokenizer, read_text(str(text))), SAMPLES, LENGTH, 0, reading.begin)
        if padded:
            rows[0, -1] = -1
        save_file({"tokens": rows}, place / "tokens.safetensors")
        said = recipe if isinstance(recipe, str) else json.dumps(recipe)
        command = [
            str(python),
            "-c",
            RUN,
            str(model),
            str(place / "tokens.safetensors"),
            str(place / "out"),
            dtype,
            said,
        ]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
        if not (place / "out").exists():
            return finished.stdout, {}
        _, quantized = read_quantized(place / "out")
        return finished.stdout, {name: value for part in quantized.parts() for name, value in part.items()}

    return make


def asked(bits: int, *, symmetric: bool = True, **others: Any) -> dict[str, Any]:
    grid = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
    return {"config_groups": groups, "ignore": ["lm_head"], "method": METHOD, "loss": LOSS, **others}


def ours(model: Path, text: Path, out: Path, bits: int, *, symmetric: bool = True, **others: Any) -> dict[str, Any]:
    recipe = Recipe(
        bits=bits, group_size=32, symmetric=symmetric, method=METHOD, loss=LOSS, calibration=str(text),
        samples=SAMPLES, seq_len=LENGTH, evaluation_samples=0, device="cpu", precision="float32", **others,
    )  # fmt: skip
    quantize(recipe, model, out)
    _, quantized = read_quantized(out)
    return {name: value for part in quantized.parts() for name, value in part.items()}


@pytest.mark.parametrize(
    ("family", "bits", "symmetric"), [("llama", 2, True), ("llama", 3, False), ("qwen3", 2, True), ("gemma3", 2, True)]
)
def test_it_trains_to_the_codes_of_a_run_of_ours(
    family: str,
    bits: int,
    symmetric: bool,
    models: Callable[[str, torch.dtype], Path],
    theirs: Callable[..., tuple[str, dict[str, Any]]],
    text: Path,
    tmp_path: Path,
) -> None:
    model = models(family, torch.float32)
    own = ours(model, text, tmp_path / "out", bits, symmetric=symmetric)
    _, found = theirs(model, asked(bits, symmetric=symmetric))
    assert sum(isinstance(value, QTensor) for value in own.values()) == 14
    for name, value in own.items():
        other = found[name]
        if isinstance(value, QTensor):
            assert isinstance(other, QTensor)
            same = (value.codes == other.codes).double().mean()
            # llm-compressor holds 1 + w of Gemma's norms in between, which rounds it
            assert same == 1 if family != "gemma3" else same > 0.999, name


def test_sixteen_bits_are_read_back_by_transformers_code_for_code(
    models: Callable[[str, torch.dtype], Path],
    theirs: Callable[..., tuple[str, dict[str, Any]]],
    text: Path,
    tmp_path: Path,
) -> None:
    model = models("llama", torch.bfloat16)
    own = ours(model, text, tmp_path / "out", 4)
    _, found = theirs(model, asked(4), dtype="bfloat16")
    for name, value in own.items():
        if isinstance(value, QTensor):
            other = found[name]
            assert isinstance(other, QTensor)
            assert torch.equal(value.codes, other.codes), name
            assert torch.equal(value.scale, other.scale), name


def test_a_recipe_in_yaml_keeps_what_it_ignores(
    models: Callable[[str, torch.dtype], Path], theirs: Callable[..., tuple[str, dict[str, Any]]]
) -> None:
    _, found = theirs(models("llama", torch.float32), YAML)
    quantized = {name for name, value in found.items() if isinstance(value, QTensor)}
    assert len(quantized) == 12
    assert not any("down_proj" in name for name in quantized)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (asked(2, ignore=[]), "lm_head lies outside of the blocks"),
        (asked(2, method="gptq + end_to_end"), "works on the whole model"),
        (asked(2, config_groups=None, scheme="W8A8"), "quantizes activations"),
        (asked(2, config_groups=None, scheme="FP8_DYNAMIC"), "quantizes activations"),
        (asked(2, method="gptqq"), "gptqq"),
    ],
)
def test_what_it_cannot_do_is_a_sentence_before_the_work(
    recipe: dict[str, Any],
    sentence: str,
    models: Callable[[str, torch.dtype], Path],
    theirs: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    said, found = theirs(models("llama", torch.float32), recipe)
    assert not found
    (refused,) = [line for line in said.splitlines() if line.startswith("REFUSED")]
    assert sentence in refused


def test_a_mixture_of_experts_is_refused_before_the_work(
    make_model: Callable[..., Path], theirs: Callable[..., tuple[str, dict[str, Any]]]
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    model = make_model("qwen3_moe", 2, torch.float32, hidden_size=128, head_dim=32, **experts)
    said, found = theirs(model, asked(2, ignore=["lm_head", "re:.*mlp.gate$"]))
    assert not found
    (refused,) = [line for line in said.splitlines() if line.startswith("REFUSED")]
    assert "the model is a mixture of experts (model.layers.0.mlp.experts.0." in refused


def test_padded_samples_are_refused(
    models: Callable[[str, torch.dtype], Path], theirs: Callable[..., tuple[str, dict[str, Any]]]
) -> None:
    said, found = theirs(models("llama", torch.float32), asked(2), padded=True)
    assert not found
    assert "samples are padded" in said


def test_the_example_shows_it_beside_their_own_modifier(python: Path, tmp_path: Path) -> None:
    command = [str(python), str(SCRIPT), "--samples", "16", "--length", "64", "--method", "gptq + block_ap(epochs=2)"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line.rpartition(": ") for line in finished.stdout.splitlines() if ": " in line]
    found = {name: float(value) for name, _, value in lines if value.replace(".", "").isdigit()}
    assert list(found) == ["original", "GPTQModifier", "GPTQModifier, memoryless_mse", "mse", LOSS]
    assert found["original"] < found["mse"] < min(found[name] for name in found if name.startswith("GPTQModifier"))
    assert found["mse"] != found[LOSS]
