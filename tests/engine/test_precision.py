"""Training in bfloat16 products: what is learned and what is written stays what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import swquant.run as run
from swquant import Recipe, SwquantError, device, plan, quantize
from swquant.engine import run_state
from swquant.engine.observer import Silent
from swquant.engine.precision import at_precision, fastest_precision, tensor_float32
from swquant.engine.run_state import MANIFEST
from swquant.report import Report

HAS_BFLOAT16_PRODUCTS = device._has_bfloat16_products
"""Before what holds for all tests: that no processor has it."""


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


def test_the_fastest_precision_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_bfloat16_products", HAS_BFLOAT16_PRODUCTS)
    for found, expected in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert fastest_precision(torch.device("cpu")) == expected
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert fastest_precision(torch.device("cuda")) == expected
    assert fastest_precision(torch.device("mps")) == "float32"


def test_float32_products_are_tf32_beside_bfloat16_on_cuda_alone() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for kind, products, expected in (
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, before),
    ):
        with tensor_float32(torch.device(kind), products):
            assert torch.backends.cuda.matmul.allow_tf32 == expected
        assert torch.backends.cuda.matmul.allow_tf32 == before


class StopAt(Silent):
    """Fails behind the first block."""

    def block(self, index: int, values: object) -> None:
        raise RuntimeError("stopped")


def test_a_run_goes_on_in_the_precision_in_which_it_began(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(method="block_ap(epochs=1)", calibration=str(text), samples=4, seq_len=16, group_size=32)
    monkeypatch.setattr(plan, "fastest_precision", lambda device: "bfloat16")
    whole = quantize(recipe, llama, tmp_path / "whole")
    assert (whole.recipe["precision"], whole.recipe["device"]) == ("bfloat16", "cpu")
    assert "precision: bfloat16" in (tmp_path / "whole" / "swquant.yaml").read_text()
    with pytest.raises(RuntimeError, match="stopped"):
        quantize(recipe, llama, tmp_path / "cut", observer=StopAt())
    monkeypatch.setattr(plan, "fastest_precision", lambda device: "float32")
    with pytest.raises(SwquantError, match="differs in recipe"):
        quantize(replace(recipe, precision="float32"), llama, tmp_path / "cut")
    quantize(recipe, llama, tmp_path / "cut")
    weights = [tmp_path / name / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert quantize(recipe, llama, tmp_path / "whole").recipe["precision"] == "bfloat16"


def test_a_run_does_not_go_on_where_its_device_is_missing(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", calibration=str(text), samples=4, seq_len=16, group_size=32)
    out, missing = tmp_path / "out", next(name for name in ("xpu", "mps", "cuda") if not available(name))
    with pytest.raises(RuntimeError, match="stopped"):
        quantize(recipe, llama, out, observer=StopAt())
    manifest = tmp_path / "out.swquant-work" / MANIFEST
    state = json.loads(manifest.read_text())
    state.pop("checksum")
    state["key"]["recipe"]["device"] = missing
    manifest.write_text(run_state._sealed(state))
    with pytest.raises(SwquantError, match=f"computes on {missing}, and the device '{missing}' is not available"):
        quantize(recipe, llama, out)


def available(name: str) -> bool:
    """Whether this machine has such an accelerator."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is not None and found.type == name
