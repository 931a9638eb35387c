"""Training in bfloat16 products: what is learned and what is written stays what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import swquant.run as run
from swquant import Recipe, SwquantError, quantize
from swquant.engine.precision import at_precision
from swquant.report import Report


def test_float32_is_the_function_itself() -> None:
    def forward(params: object, hidden: Tensor) -> Tensor:
        return hidden

    assert at_precision(forward, torch.float32) is forward


def test_products_are_short_and_the_output_is_not() -> None:
    seen: list[torch.dtype] = []

    def forward(params: object, hidden: Tensor, samples: Tensor) -> Tensor:
        product = hidden @ hidden.mT
        seen.append(product.dtype)
        return product

    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    out = at_precision(forward, torch.bfloat16)({}, hidden, torch.arange(2))
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.float32
    assert torch.equal(out, (hidden.bfloat16() @ hidden.bfloat16().mT).float())


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("omniquant(epochs=2)", "signround(steps=10)")]


def in_both(method: str, model: Path, text: Path, out: Path) -> tuple[Report, Report]:
    recipe = Recipe(
        method=method,
        calibration=str(text),
        samples=8,
        seq_len=16,
        evaluation_samples=0,
        device="cpu",
        group_size=32,
    )
    exact = quantize(recipe, model, out / "float32")
    return exact, quantize(replace(recipe, precision="bfloat16"), model, out / "bfloat16")


@pytest.mark.parametrize("method", ["block_ap(epochs=2)", *SLOW])
def test_a_run_differs_by_rounding_alone(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    exact, short = (report.blocks[-1]["drift"] for report in in_both(method, llama, text, tmp_path))
    assert exact != short
    assert short == pytest.approx(exact, rel=0.1)


def test_end_to_end_trains_in_it_and_measures_in_float32(llama: Path, text: Path, tmp_path: Path) -> None:
    both = in_both("rtn + end_to_end(epochs=2)", llama, text, tmp_path)
    exact, short = (report.finish_report for report in both)
    assert exact is not None
    assert short is not None
    assert short.before == exact.before
    assert short.training != exact.training
    assert short.training == pytest.approx(exact.training, rel=0.05)


def test_it_is_left_out_of_recipes_that_do_not_ask_for_it() -> None:
    assert "precision" not in Recipe().to_mapping()
    assert Recipe(precision="bfloat16").digest() != Recipe().digest()
    with pytest.raises(SwquantError, match="precision"):
        Recipe.from_mapping({"precision": "float16"})


def test_it_is_a_function_of_the_recipe_alone(llama: Path) -> None:
    job = run.make_plan(Recipe(precision="bfloat16", samples=2, seq_len=16, device="cpu"), llama).job()
    assert job.precision == torch.bfloat16
