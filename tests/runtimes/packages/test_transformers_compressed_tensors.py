"""transformers with the compressed-tensors package, on the lines that swquant prints."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant.quant.spec import QuantSpec

GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4), (64, None), (True, False))]
SLOWER = [pytest.param(spec, marks=() if spec.group_size else pytest.mark.slow) for spec in GRIDS]


MIXED = {
    "grids": {
        "*.down_proj": QuantSpec(4, 32, True),
        "*.self_attn.*": QuantSpec(3, None, True),
        "*.layers.0.mlp.*": None,
    }
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("spec", SLOWER, ids=lambda spec: f"{spec.label}-{'sym' if spec.symmetric else 'asym'}")
def test_weights_logits_and_perplexity_are_those_of_the_codes(
    spec: QuantSpec, quantized: Callable[..., Any], tmp_path: Path
) -> None:
    _compare(quantized("compressed_tensors", spec, "llama", torch.float32), tmp_path)


def test_each_weight_is_read_on_its_own_grid(quantized: Callable[..., Any], tmp_path: Path) -> None:
    case = quantized("compressed_tensors", QuantSpec(2, 64, True), "llama", torch.float32, MIXED)
    assert len(case.weights) == 11
    _compare(case, tmp_path)


def _compare(case: Any, tmp_path: Path) -> None:
    (tmp_path / "loading.py").write_text(f"path = {str(case.path)!r}\n{case.loading}\n")
    model = runpy.run_path(str(tmp_path / "loading.py"))["model"].eval()
    with torch.no_grad():
        logits = model(input_ids=case.tokens).logits
        weights = {name: model.get_submodule(name).weight for name in case.weights}
    assert all(torch.equal(weights[name], weight) for name, weight in case.weights.items())
    torch.testing.assert_close(logits, case.logits, rtol=1e-5, atol=1e-5)
    assert case.measured(logits) == pytest.approx(case.perplexity, rel=1e-5)
