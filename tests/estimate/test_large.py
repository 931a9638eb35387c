"""A model that no test machine holds, by its headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from swquant.estimate import Estimate, estimate
from swquant.estimate.budget import Budget
from swquant.recipe import Recipe

pytestmark = pytest.mark.slow

Hollow = Callable[[LlamaConfig], Path]

GIB = 1 << 30
LARGE = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
RECIPE = Recipe(method="omniquant", group_size=128, samples=128, seq_len=2048, evaluation_samples=0, device="cpu")


@pytest.fixture(scope="module")
def large(hollow: Hollow) -> Path:
    return hollow(LARGE)


def look(source: Path, budget: Budget, text: Path, recipe: Recipe = RECIPE) -> Estimate:
    return estimate(recipe.override({"calibration": str(text)}), source, source / "out", budget, measure=False)


def test_a_block_of_70b_with_its_state_and_batch_fits_in_24_gb(large: Path, text: Path) -> None:
    found = look(large, Budget(device=24 * GIB, host=64 * GIB), text)
    assert found.blocks == 80
    assert 68e9 < found.parameters < 70e9
    block = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert 2 * block < found.device < 24e9
    assert found.bits_per_weight == 2 + 16 / 128
    assert not [problem for problem in found.problems if "memory" in problem]


def test_the_recipe_for_two_bits_fits_in_24_gib_at_70b(large: Path, text: Path) -> None:
    values = {"group_size": 128, "samples": 128, "seq_len": 2048, "evaluation_samples": 0, "device": "cpu"}
    found = look(large, Budget(device=24 * GIB, host=64 * GIB), text, Recipe.load("w2g128").override(values))
    assert 20e9 < found.device < 24e9
    assert not [problem for problem in found.problems if "memory" in problem]


def test_what_does_not_fit_is_said_with_what_would(large: Path, text: Path) -> None:
    found = look(large, Budget(device=4 * GIB, host=64 * GIB), text)
    (problem,) = [problem for problem in found.problems if "memory" in problem]
    there = re.search(r" with one sample at a time, and (\S+) GB are there for it", problem)
    assert there is not None
    assert 3 < float(there[1]) < 4 * GIB / 1e9
    assert "--seq-len 1024" in problem


def test_drawing_from_a_model_that_memory_does_not_hold_is_said(large: Path) -> None:
    budget, recipe = Budget(device=24 * GIB, host=64 * GIB), RECIPE.override({"calibration": "self"})
    found = estimate(recipe, large, large / "out", budget, measure=False)
    assert any("give --calibration bundled" in problem for problem in found.problems)
    chosen = estimate(RECIPE, large, large / "out", budget, measure=False)
    assert chosen.recipe["calibration"] == "bundled"
    assert not [problem for problem in chosen.problems if "drawing" in problem]
