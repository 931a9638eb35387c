"""Every method on an accelerator: it runs, and ends near what the CPU makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swquant import Recipe, quantize

MakeModel = Callable[..., Path]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator"),
]

METHODS = (
    "rtn",
    "rotate + awq + gptq(act_order=True)",
    "omniquant(epochs=2, transform=True)",
    "tesseraq(rounds=3, iterations=2)",
    "gptq + block_ap(epochs=2) + end_to_end(epochs=2)",
    "signround(steps=20)",
    "norm_tweaking",
)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_the_accelerator_ends_near_the_cpus(
    make_model: MakeModel, text: Path, tmp_path: Path, method: str
) -> None:
    source = make_model("llama", 2, torch.bfloat16)
    recipe = Recipe(
        group_size=32, method=method, calibration=str(text), samples=8, seq_len=32, evaluation_samples=8, device="cpu"
    )
    here, there = (quantize(replace(recipe, device=name), source, tmp_path / name) for name in ("cpu", "auto"))
    assert here.quality is not None
    assert there.quality is not None
    assert there.quality.perplexity == pytest.approx(here.quality.perplexity, rel=0.05)
