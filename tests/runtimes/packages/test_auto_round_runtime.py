"""auto-round's kernels in torch, through transformers, on the lines that swquant prints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swquant.formats.base import weights_are_exact
from swquant.quant.spec import QuantSpec

pytestmark = pytest.mark.slow

REQUIREMENTS = ("auto-round==0.16.1",)
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4), (64, None), (True, False))]
MODELS = [
    *((grid, "llama", torch.float32) for grid in GRIDS),
    (QuantSpec(2, 64, True), "opt", torch.float32),
    (QuantSpec(2, 64, False), "qwen2", torch.float32),
    (QuantSpec(2, 64, False), "llama", torch.bfloat16),
    (QuantSpec(8, 128, True), "llama", torch.float32),
]


@pytest.fixture(scope="module")
def found(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("auto-round", REQUIREMENTS)
    cases = [quantized("auto_round", *model) for model in MODELS]
    return list(zip(cases, computed(python, "with_transformers.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(MODELS)))
def test_weights_logits_and_perplexity_are_those_of_the_codes(index: int, found: Any) -> None:
    """auto-round runs float32 models in float16."""
    case, theirs = found[index]
    spec, _, dtype = MODELS[index]
    assert theirs.keys() - {"logits"} == case.weights.keys()
    for name, weight in case.weights.items():
        if weights_are_exact(spec, torch.float16):
            assert torch.equal(theirs[name], weight), name
        else:
            torch.testing.assert_close(theirs[name], weight, rtol=2**-11, atol=0)
    half = dtype == torch.bfloat16
    assert case.divergence(theirs["logits"]) < (1e-3 if half else 2e-5)
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=1e-2 if half else 2e-3)


@pytest.fixture(scope="module")
def mixed(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    """Grids by pattern, and a matrix that is kept."""
    python = environment("auto-round", REQUIREMENTS)
    attention = dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj"), QuantSpec(3, 32, True))
    also = {"grids": {**attention, "*.o_proj": QuantSpec(2, 128, True), "*.layers.0.mlp.down_proj": None}}
    case = quantized("auto_round", QuantSpec(2, 64, True), "llama", torch.float32, also)
    return case, *computed(python, "with_transformers.py", [case])


def test_each_weight_is_read_on_its_own_grid(mixed: Any) -> None:
    case, theirs = mixed
    assert len(case.weights) == 13
    assert theirs.keys() - {"logits"} == case.weights.keys()
    for name, weight in case.weights.items():
        assert torch.equal(theirs[name], weight), name
    assert case.divergence(theirs["logits"]) < 2e-5
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=2e-3)
