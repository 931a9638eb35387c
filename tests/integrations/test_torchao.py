"""Our codes as torchao's tensors: the same weights and predictions, also compiled and exported."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant import Recipe, SwquantError, load, quantize
from swquant.formats import read_quantized
from swquant.integrations.torchao import load_torchao
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

ao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'swquant[torchao]'")

MakeModel = Callable[..., Path]
TOKENS = torch.arange(3, 35).unsqueeze(0)
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4, 8), (32, None), (True, False))]


@pytest.fixture(scope="module")
def quantized(make_model: MakeModel, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(spec: QuantSpec, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        out = tmp_path_factory.mktemp("torchao") / "out"
        recipe = Recipe(
            spec.bits, spec.group_size, spec.symmetric, method="rtn", calibration=str(text), samples=2, seq_len=32,
            evaluation=None, device="cpu",
        )  # fmt: skip
        quantize(recipe, make_model("qwen2", 2, dtype, **settings), out)
        return out

    return make


@pytest.mark.parametrize("spec", GRIDS, ids=lambda spec: f"{spec.label}-{'sym' if spec.symmetric else 'asym'}")
def test_weights_and_predictions_are_those_of_the_codes(spec: QuantSpec, quantized: Callable[..., Path]) -> None:
    out = quantized(spec)
    model = load_torchao(out, device="cpu")
    _, codes = read_quantized(out)
    weights = {name: value for part in codes.parts() for name, value in part.items() if isinstance(value, QTensor)}
    assert len(weights) == 14
    for name, value in weights.items():
        found = model.get_parameter(name)
        assert isinstance(found, ao.IntxUnpackedToInt8Tensor)
        assert found.target_dtype == getattr(torch, f"int{spec.bits}")
        assert torch.equal(found.dequantize(), value.dequantize()), name
    with torch.no_grad():
        expected = load(out, device="cpu", kernel="plain")(input_ids=TOKENS).logits
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_it_compiles_and_is_exported(quantized: Callable[..., Path]) -> None:
    model = load_torchao(quantized(QuantSpec(2, 32, False)), device="cpu")
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(model, (), {"input_ids": TOKENS, "use_cache": False})
        torch.testing.assert_close(
            program.module()(input_ids=TOKENS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5
        )


def test_half_precision_and_what_activations_rounded_to_bytes_change(quantized: Callable[..., Path]) -> None:
    out = quantized(QuantSpec(4, 32, True), torch.bfloat16)
    plain, rounded = (load_torchao(out, device="cpu", int8_activations=given) for given in (False, True))
    with torch.no_grad():
        first, second = (model(input_ids=TOKENS).logits.float() for model in (plain, rounded))
        expected = load(out, device="cpu")(input_ids=TOKENS).logits.float()
    assert first.dtype == second.dtype
    assert (first - expected).abs().max() < 0.1 * expected.std()
    assert 0 < (second - expected).abs().max() < expected.std()


def test_a_version_that_nobody_has_tried_is_refused(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.0")
    with pytest.raises(SwquantError, match=r"torchao 0\.19\.0 is installed, and swquant knows it from 0\.18 to"):
        load_torchao(quantized(QuantSpec(4, 32, True)), device="cpu")
