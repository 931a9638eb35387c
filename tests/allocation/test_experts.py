"""Experts get one grid, as runtimes and readers take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from swquant import Recipe
from swquant.allocation.choices import units_of
from swquant.plan import make_plan
from tiny_models import tiny_model


@pytest.mark.parametrize(("form", "expected"), [("compressed_tensors", 1), ("gptq", 2)])
def test_experts_are_chosen_together(form: str, expected: int, text: Path, tmp_path: Path) -> None:
    tiny_model("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    recipe = Recipe(
        method="rtn", group_size=32, calibration=str(text), samples=2, seq_len=16, format=form, device="cpu"
    )
    plan = make_plan(recipe, tmp_path / "model")
    experts = [unit for unit in units_of(plan) if "experts" in unit.name]
    assert len(experts) == expected  # some readers of compressed-tensors take those of all layers on one grid
    every = [site for block in plan.layout.blocks for site in block if ".experts." in site.name]
    assert sum(len(unit.sites) for unit in experts) == len(every) > 8
