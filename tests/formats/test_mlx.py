"""By MLX's documented formula; tests/runtimes has MLX itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.errors import SwquantError
from swquant.formats.base import weights_are_exact
from swquant.formats.mlx import Mlx
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.booleans())
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
NAME = "model.layers.0.self_attn.q_proj"


def value(tensors: dict[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
    """``scale * code + bias`` in float64, codes from each row read as one large number."""
    rows: list[list[int]] = []
    for row in tensors["proj.weight"].view(torch.int32).tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([number >> (spec.bits * k) & spec.max_code for k in range(len(row) * 32 // spec.bits)])
    codes = torch.tensor(rows, dtype=torch.float64)
    wide = (
        tensors[f"proj.{name}"].double().repeat_interleave(spec.group_size or 0, 1) for name in ("scales", "biases")
    )
    scales, biases = wide
    return scales * codes + biases


def model_of(q: QTensor, directory: Path) -> QuantizedModel:
    shape = (q.codes.shape[0], q.codes.shape[1])
    outline = outline_of(directory, CONFIG, q.spec, torch.bfloat16, {NAME: shape}, ("lm_head",))
    parts = [{"model.embed_tokens.weight": torch.ones(8, 2, dtype=torch.bfloat16)}, {f"{NAME}.weight": q}]
    return QuantizedModel(outline, lambda: iter(parts))


@settings(deadline=None, max_examples=80)
@given(spec=SPECS, dtype=DTYPES, out=st.integers(1, 20), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_formula_gives_the_weight_or_one_shifted_by_the_biases_rounding(
    spec: QuantSpec, dtype: torch.dtype, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    if (spec.bits, spec.symmetric, dtype) == (8, False, torch.bfloat16):
        reject()
    q = make_qtensor(spec, out, width, seed)
    tensors = Mlx().encode("proj", q, dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint32, dtype}
    shift = (value(tensors, spec) - q.dequantize().double()).abs()
    if spec.symmetric or weights_are_exact(spec, dtype):
        assert not shift.any()
    else:
        step = q.scale.double().repeat_interleave(spec.group_size or 0, 1)
        assert (shift <= spec.max_code * torch.finfo(dtype).eps / 2 * step).all()


def test_bfloat16_does_shift_asymmetric_groups(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(2, 32, False), 16, 4, 0)
    assert not torch.equal(value(Mlx().encode("proj", q, torch.bfloat16), q.spec), q.dequantize().double())


@pytest.mark.parametrize("spec", [QuantSpec(2, 64, True), QuantSpec(3, 32, False), QuantSpec(8, 128, True)])
def test_what_is_written_is_read(spec: QuantSpec, make_qtensor: Make, tmp_path: Path) -> None:
    q = make_qtensor(spec, 24, 2, 0)
    written = model_of(q, tmp_path)
    Mlx().write(tmp_path / "out", written)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    mine = {"group_size": spec.group_size, "bits": spec.bits, "mode": "affine", "symmetric": spec.symmetric}
    assert config["quantization"] == config["quantization_config"] == mine
    read = Mlx().read(tmp_path / "out", config)
    assert read is not None
    assert (read.outline.spec, read.outline.config, read.outline.dtype) == (spec, CONFIG, torch.bfloat16)
    assert read.outline.linears == written.outline.linears
    tensors = {name: tensor for part in read.parts() for name, tensor in part.items()}
    assert set(tensors) == {"model.embed_tokens.weight", f"{NAME}.weight"}
    found = tensors[f"{NAME}.weight"]
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), q.dequantize())


def test_one_scale_per_channel_is_refused_before_the_run() -> None:
    with pytest.raises(SwquantError, match="--group-size"):
        Mlx().check(outline_of(Path(), {}, QuantSpec(2, None, True), torch.bfloat16, {"layers.0.up": (64, 64)}, ()))


def test_8_bit_zero_points_are_refused_in_bfloat16_which_loses_them(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(8, 64, False), 4, 1, 0)
    with pytest.raises(SwquantError, match="asymmetric w8g64 in bfloat16"):
        Mlx().check(outline_of(Path(), {}, q.spec, torch.bfloat16, {"layers.0.up": (64, 64)}, ()))
    with pytest.raises(SwquantError, match="asymmetric w8g64 in bfloat16"):
        Mlx().encode("proj", q, torch.bfloat16)
    assert torch.equal(Mlx().decode("proj", Mlx().encode("proj", q, torch.float16), q.spec).zero, q.zero)


def test_notes_are_about_rounding_and_families() -> None:
    def check(spec: QuantSpec, dtype: torch.dtype, family: str = "llama") -> tuple[str, ...]:
        return Mlx().check(outline_of(Path(), {"model_type": family}, spec, dtype, {"layers.0.up": (64, 64)}, ()))

    assert check(QuantSpec(2, 64, True), torch.bfloat16) == ()
    assert check(QuantSpec(3, 64, False), torch.float16) == ()
    assert ["rounds each weight to bfloat16" in note for note in check(QuantSpec(3, 64, True), torch.bfloat16)] == [
        True
    ]
    assert ["up to 0.012 of a step" in note for note in check(QuantSpec(2, 64, False), torch.bfloat16)] == [True]
    assert ["opt" in note for note in check(QuantSpec(2, 64, True), torch.bfloat16, "opt")] == [True]


def test_biases_beyond_float16_are_refused(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(8, 32, True), 1, 1, 0)
    large = uniform(q.codes, torch.full_like(q.scale, 1024.0), q.zero, q.spec)
    with pytest.raises(SwquantError, match=r"proj\.biases exceeds the range of float16"):
        Mlx().encode("proj", large, torch.float16)


@pytest.mark.parametrize("suffix", ["weight", "scales", "biases"])
def test_damaged_tensors_are_refused_by_name(suffix: str, make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(3, 32, False), 8, 2, 0)
    tensors = Mlx().encode("proj", q, torch.float32)
    with pytest.raises(SwquantError, match=suffix):
        Mlx().decode("proj", {**tensors, f"proj.{suffix}": torch.zeros(7, 7, 1, dtype=torch.int8)}, q.spec)
    with pytest.raises(SwquantError, match=r"proj\.(weight|biases|scales)"):
        Mlx().decode("proj", {**tensors, f"proj.{suffix}": tensors[f"proj.{suffix}"][:-1]}, q.spec)


@pytest.mark.parametrize(
    ("symmetric", "scale", "bias", "message"),
    [
        (False, 1.0, -0.5, "biases are not"),
        (False, 1.0, 1.0, "biases are not"),
        (False, 1.0, -4.0, "biases are not"),
        (True, 1.0, -1.0, "zero point of 2"),
        (False, -1.0, 1.0, "zero or negative"),
        (True, 0.0, 0.0, "scales holds zero"),
    ],
)
def test_grids_that_are_not_ours_are_refused(symmetric: bool, scale: float, bias: float, message: str) -> None:
    tensors = {
        "proj.weight": torch.zeros(1, 2, dtype=torch.uint32),
        "proj.scales": torch.full((1, 1), scale),
        "proj.biases": torch.full((1, 1), bias),
    }
    with pytest.raises(SwquantError, match=message):
        Mlx().decode("proj", tensors, QuantSpec(2, 32, symmetric))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"group_size": None}, "group size None"),
        ({"group_size": 16}, "group size is 16"),
        ({"bits": 6}, "bits is 6"),
        ({"symmetric": 1}, "true or false"),
        ({"other_symmetry": 5}, "'other_symmetry'"),
        ({"lm_head": {"bits": 8, "group_size": 64}}, "'lm_head'"),
    ],
)
def test_what_swquant_does_not_read_is_refused_in_a_sentence(
    change: dict[str, object], message: str, make_qtensor: Make, tmp_path: Path
) -> None:
    Mlx().write(tmp_path / "out", model_of(make_qtensor(QuantSpec(2, 64, True), 32, 1, 0), tmp_path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization"].update(change)
    with pytest.raises(SwquantError, match=message):
        Mlx().read(tmp_path / "out", config)


@pytest.mark.parametrize(("name", "beside"), [("model.embed_tokens", False), ("model.side", True)])
def test_quantized_weights_outside_of_the_blocks_are_refused(
    name: str, beside: bool, make_qtensor: Make, tmp_path: Path
) -> None:
    """But for the embedding and the head beside the linears of the blocks."""
    q = make_qtensor(QuantSpec(2, 64, True), 32, 1, 0)
    model = model_of(q, tmp_path)
    parts = [{"model.norm.weight": torch.ones(8)}, {f"{name}.weight": q}]
    if beside:
        parts += [{f"{NAME}.weight": q}]
    Mlx().write(tmp_path / "out", QuantizedModel(model.outline, lambda: iter(parts)))
    with pytest.raises(SwquantError, match=rf"quantized weights outside of its blocks, such as {name},"):
        Mlx().read(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))


def test_other_models_are_not_read(tmp_path: Path) -> None:
    assert Mlx().read(tmp_path, {}) is None
    assert Mlx().read(tmp_path, {"quantization_config": {"quant_method": "gptq"}}) is None
