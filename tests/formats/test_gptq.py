"""Against a packing written apart from ours, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.errors import SwquantError
from swquant.formats.gptq import Gptq
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Each row's fields as the digits of one large number, cut into 32-bit words."""
    rows: list[list[int]] = []
    for row in fields:
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        rows.append([number >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(row) * bits // 32))])
    return np.array(rows, dtype=np.uint32)


def inputs_of(spec: QuantSpec, width: int) -> int:
    return 32 * width if spec.group_size is None else width


def model_of(q: QTensor, directory: Path) -> QuantizedModel:
    shape = (q.codes.shape[0], q.codes.shape[1])
    name = "model.layers.0.self_attn.q_proj"
    outline = outline_of(directory, CONFIG, q.spec, torch.bfloat16, {name: shape}, ("lm_head",))
    plain = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    return QuantizedModel(outline, lambda: iter([plain, {f"{name}.weight": q}]), (), {"extra.txt": "kept"})


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, out=st.integers(1, 40), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_field_is_where_the_layout_says(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make_qtensor(spec, out, inputs_of(spec, width), seed)
    tensors = Gptq().encode("proj", q, torch.bfloat16)
    stored_zero = q.zero.numpy().astype(np.int64) - (1 if spec.symmetric else 0)
    assert stored_zero.min() >= 0
    qweight, qzeros = (tensors[f"proj.{name}"].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    assert np.array_equal(qweight, words(q.codes.numpy(), spec.bits).T)
    assert np.array_equal(qzeros, words(stored_zero.T, spec.bits))
    assert tensors["proj.scales"].dtype == torch.float16
    assert torch.equal(tensors["proj.scales"].float(), q.scale.T)
    inputs = q.codes.shape[1]
    width_of_group = spec.group_size or inputs
    assert tensors["proj.g_idx"].tolist() == [place // width_of_group for place in range(inputs)]
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("scales")} == {torch.int32}


@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (False, "gptq_v2")])
@pytest.mark.parametrize(("group", "stored"), [(None, -1), (64, 64)])
def test_the_config_stands_in_both_files(
    symmetric: bool, version: str, group: int | None, stored: int, make_qtensor: Make, tmp_path: Path
) -> None:
    q = make_qtensor(QuantSpec(3, group, symmetric), 32, 64 if group is None else 1, 0)
    Gptq().write(tmp_path / "out", model_of(q, tmp_path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": stored,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
    }
    assert (tmp_path / "out" / "extra.txt").read_text() == "kept"


@pytest.mark.parametrize("spec", [QuantSpec(2, 64, True), QuantSpec(3, 32, False), QuantSpec(8, None, False)])
def test_reading_gives_back_what_was_written(spec: QuantSpec, make_qtensor: Make, tmp_path: Path) -> None:
    q = make_qtensor(spec, 64, inputs_of(spec, 2), 1)
    written = model_of(q, tmp_path)
    Gptq().write(tmp_path / "out", written)
    read = Gptq().read(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
    assert read is not None
    assert read.outline.linears == written.outline.linears
    assert (read.outline.spec, read.outline.dtype, read.outline.config) == (spec, torch.bfloat16, CONFIG)
    tensors = {name: value for part in read.parts() for name, value in part.items()}
    assert set(tensors) == {"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"}
    found = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), q.dequantize())


def test_a_config_without_the_models_dtype_is_given_it(make_qtensor: Make, tmp_path: Path) -> None:
    model = model_of(make_qtensor(QuantSpec(2, 32, True), 32, 1, 0), tmp_path)
    config = {key: value for key, value in CONFIG.items() if key != "dtype"}
    Gptq().write(tmp_path / "out", replace(model, outline=replace(model.outline, config=config)))
    read = Gptq().read(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
    assert read is not None
    assert read.outline.dtype == torch.bfloat16


def test_widths_that_fill_no_words_are_refused_by_name_before_the_run() -> None:
    def check(rows: int, columns: int) -> None:
        spec = QuantSpec(2, None, True)
        Gptq().check(outline_of(Path(), {}, spec, torch.bfloat16, {"a": (32, 64), "layers.0.up": (rows, columns)}, ()))

    check(96, 32)
    for rows, columns in ((48, 64), (64, 48)):
        with pytest.raises(SwquantError, match=rf"layers\.0\.up with {columns} inputs and {rows} outputs"):
            check(rows, columns)


def test_notes_are_about_version_2_and_rounding() -> None:
    def check(spec: QuantSpec, dtype: torch.dtype) -> tuple[str, ...]:
        return Gptq().check(outline_of(Path(), {}, spec, dtype, {}, ()))

    assert check(QuantSpec(2, 64, True), torch.bfloat16) == ()
    version, rounding = check(QuantSpec(2, 64, False), torch.bfloat16)
    assert "gptq_v2" in version
    assert "to bfloat16;" in rounding


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_damaged_tensors_are_refused_by_name(suffix: str, make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(3, 32, False), 32, 2, 0)
    tensors = Gptq().encode("proj", q, torch.float32)
    with pytest.raises(SwquantError, match=suffix):
        Gptq().decode("proj", {**tensors, f"proj.{suffix}": torch.zeros(7, 7, dtype=torch.int8)}, q.spec)
    with pytest.raises(SwquantError, match=r"proj\.(qweight|scales|qzeros|g_idx)"):
        Gptq().decode("proj", {**tensors, f"proj.{suffix}": tensors[f"proj.{suffix}"][:-1]}, q.spec)


def test_reordered_inputs_and_shifted_zero_points_are_refused(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(2, 32, True), 32, 2, 0)
    tensors = Gptq().encode("proj", q, torch.float32)
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    assert torch.equal(Gptq().decode("proj", without, q.spec).codes, q.codes)
    with pytest.raises(SwquantError, match="act-order"):
        Gptq().decode("proj", {**tensors, "proj.g_idx": tensors["proj.g_idx"].flip(0)}, q.spec)
    with pytest.raises(SwquantError, match="other than 2"):
        Gptq().decode("proj", {**tensors, "proj.qzeros": tensors["proj.qzeros"] + 1}, q.spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"desc_act": True}, "desc_act True"),
        ({"lm_head": True}, "lm_head True"),
        ({"dynamic": {"+:.*": {"bits": 4}}}, "dynamic"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": 2.0}, "two integers"),
        ({"bits": None}, "two integers"),
        ({"group_size": "64"}, "two integers"),
        ({"group_size": 48}, "group size is 48"),
        ({"sym": None}, "true or false"),
        ({"sym": False}, "checkpoint_format 'gptq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ],
)
def test_what_swquant_does_not_read_is_refused_in_a_sentence(
    change: dict[str, object], message: str, make_qtensor: Make, tmp_path: Path
) -> None:
    q = make_qtensor(QuantSpec(2, 64, True), 32, 1, 0)
    Gptq().write(tmp_path / "out", model_of(q, tmp_path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"].update(change)
    with pytest.raises(SwquantError, match=message):
        Gptq().read(tmp_path / "out", config)


def test_other_models_are_not_read(tmp_path: Path) -> None:
    assert Gptq().read(tmp_path, {}) is None
    assert Gptq().read(tmp_path, {"quantization_config": {"quant_method": "awq"}}) is None
    assert Gptq().read(tmp_path, {"quantization_config": "gptq"}) is None
