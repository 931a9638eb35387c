"""GPTQModel's kernels, through transformers and optimum, on the lines that swquant prints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swquant.formats.base import weights_are_exact
from swquant.quant.spec import QuantSpec

pytestmark = pytest.mark.slow

REQUIREMENTS = ("gptqmodel==7.6.0", "optimum==2.3.0", "setuptools", "wheel", "ninja")
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4), (64, None), (True, False))]
MODELS = [
    *((grid, "llama", torch.float32) for grid in GRIDS),
    (QuantSpec(2, 64, True), "opt", torch.float32),
    (QuantSpec(2, 64, False), "qwen2", torch.float32),
    (QuantSpec(2, 64, True), "llama", torch.bfloat16),
    (QuantSpec(8, 128, False), "llama", torch.float32),
]


@pytest.fixture(scope="module")
def found(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("gptqmodel", REQUIREMENTS)
    cases = [quantized("gptq", *model) for model in MODELS]
    return list(zip(cases, computed(python, "with_transformers.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(MODELS)))
def test_weights_logits_and_perplexity_are_those_of_the_codes(index: int, found: Any) -> None:
    """On a CPU, GPTQModel has kernels of its own for 4 bits, which compute in bfloat16; linears' biases are float16."""
    case, theirs = found[index]
    spec, family, dtype = MODELS[index]
    half = spec.bits == 4 or dtype == torch.bfloat16
    version = json.loads((case.path / "quantize_config.json").read_text())["checkpoint_format"]
    assert version == ("gptq" if spec.symmetric else "gptq_v2")
    assert theirs.keys() - {"logits"} == case.weights.keys()
    for name, weight in case.weights.items():
        if weights_are_exact(spec, torch.float16) and spec.bits != 4:
            assert torch.equal(theirs[name], weight), name
        else:
            torch.testing.assert_close(theirs[name], weight, rtol=2**-7, atol=float(weight.abs().max()) * 2**-8)
    assert case.divergence(theirs["logits"]) < (1e-3 if half else 1e-6)
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=1e-2 if half else 2e-4)
    if not half and spec.bits != 8:
        tolerance = 1e-4 if family == "llama" else 2e-3
        torch.testing.assert_close(theirs["logits"], case.logits, rtol=tolerance, atol=tolerance)


def test_symmetric_scales_of_either_sign_were_tried(found: Any) -> None:
    weights = [weight for case, _ in found if case.spec.symmetric for weight in case.weights.values()]
    assert any(weight.max() > -weight.min() for weight in weights)
    assert any(weight.max() < -weight.min() for weight in weights)


@pytest.fixture(scope="module")
def mixed(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    """Grids by pattern, and a matrix that is kept."""
    python = environment("gptqmodel", REQUIREMENTS)
    attention = dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj"), QuantSpec(3, 32, True))
    also = {"grids": {**attention, "*.o_proj": QuantSpec(2, 128, True), "*.layers.0.mlp.down_proj": None}}
    case = quantized("gptq", QuantSpec(2, 64, True), "llama", torch.float32, also)
    return case, *computed(python, "with_transformers.py", [case])


def test_each_weight_is_read_on_its_own_grid(mixed: Any) -> None:
    """By GPTQModel alone, which computes in half precision then."""
    case, theirs = mixed
    assert "GPTQModel.load" in case.loading
    assert len(case.weights) == 13
    assert theirs.keys() - {"logits"} == case.weights.keys()
    for name, weight in case.weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=2**-7, atol=float(weight.abs().max()) * 2**-8)
    assert case.divergence(theirs["logits"]) < 1e-3
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=1e-2)
