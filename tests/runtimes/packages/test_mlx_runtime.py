"""MLX on a CPU, through mlx-lm, on the lines that swquant prints."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swquant.quant.spec import QuantSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="MLX has builds for Linux and macOS alone"),
]

REQUIREMENTS = ("mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4", "mlx-lm==0.32.2")
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4, 8), (32, 128), (True, False))]
MODELS = [
    *((grid, "llama", torch.float32) for grid in GRIDS),
    *((QuantSpec(2, 64, True), family, torch.float32) for family in ("mistral", "qwen2", "qwen3")),
    (QuantSpec(2, 64, True), "llama", torch.bfloat16),
    (QuantSpec(2, 64, False), "llama", torch.bfloat16),
    (QuantSpec(3, 64, False), "llama", torch.float16),
]
LAST = (QuantSpec(2, 64, True), "llama", torch.float32)
ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def found(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("mlx", REQUIREMENTS)
    cases = [quantized("mlx", *model) for model in MODELS]
    cases.append(quantized("mlx", *LAST, rope_parameters=ROTARY, tie_word_embeddings=True))
    return list(zip(cases, computed(python, "with_mlx.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(MODELS) + 1))
def test_weights_logits_and_perplexity_are_those_of_the_codes(index: int, found: Any) -> None:
    """In half precision MLX computes a weight in it, scale * code and the bias rounded one after the other."""
    case, theirs = found[index]
    _, _, dtype = [*MODELS, LAST][index]
    assert theirs.keys() - {"logits"} == case.weights.keys()
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, weight in case.weights.items():
        allowed = 4 * eps * float(weight.abs().max())
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=allowed)
    half = dtype != torch.float32
    assert case.divergence(theirs["logits"]) < (1e-2 if half else 1e-6)
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=2e-2 if half else 1e-4)
