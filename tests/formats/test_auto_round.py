"""What differs from GPTQ; the tensors' fields are tested there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.errors import SwquantError
from swquant.formats.auto_round import AutoRound
from swquant.formats.gptq import Gptq
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
CONFIG = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "dtype": "float16"}
NAME = "model.decoder.layers.0.fc1"


def inputs_of(spec: QuantSpec, width: int) -> int:
    return 32 * width if spec.group_size is None else width


def model_of(q: QTensor, directory: Path) -> QuantizedModel:
    shape = (q.codes.shape[0], q.codes.shape[1])
    outline = outline_of(directory, CONFIG, q.spec, torch.float16, {NAME: shape}, ("lm_head",))
    parts = [{"model.decoder.final_layer_norm.weight": torch.ones(8)}, {f"{NAME}.weight": q}]
    return QuantizedModel(outline, lambda: iter(parts))


@settings(deadline=None, max_examples=30)
@given(spec=SPECS, out=st.integers(1, 40), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_tensors_are_those_of_gptq_without_g_idx(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make_qtensor(spec, out, inputs_of(spec, width), seed)
    ours = AutoRound().encode("proj", q, torch.bfloat16)
    gptq = Gptq().encode("proj", q, torch.bfloat16)
    assert gptq.keys() - ours.keys() == {"proj.g_idx"}
    assert all(torch.equal(ours[name], gptq[name]) for name in ours)


@pytest.mark.parametrize(("symmetric", "packing"), [(True, "auto_round:auto_gptq"), (False, "auto_round")])
@pytest.mark.parametrize(("group", "stored"), [(None, -1), (64, 64)])
def test_what_is_written_is_read(
    symmetric: bool, packing: str, group: int | None, stored: int, make_qtensor: Make, tmp_path: Path
) -> None:
    spec = QuantSpec(3, group, symmetric)
    q = make_qtensor(spec, 32, inputs_of(spec, 2), 0)
    written = model_of(q, tmp_path)
    AutoRound().write(tmp_path / "out", written)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 3,
        "group_size": stored,
        "sym": symmetric,
        "data_type": "int",
        "block_name_to_quantize": "model.decoder.layers",
    }
    assert json.loads((tmp_path / "out" / "quantization_config.json").read_text()) == config["quantization_config"]
    read = AutoRound().read(tmp_path / "out", config)
    assert read is not None
    assert (read.outline.spec, read.outline.config, read.outline.dtype) == (spec, CONFIG, torch.float16)
    assert read.outline.linears == written.outline.linears
    found = {name: value for part in read.parts() for name, value in part.items()}[f"{NAME}.weight"]
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_config": {"lm_head": {"bits": 4}}}, "extra_config"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"act_bits": 8}, "act_bits 8"),
        ({"rotation_config": {"hadamard_type": "hadamard"}}, "rotation_config"),
        ({"packing_format": "auto_round:auto_awq"}, "packing_format 'auto_round:auto_awq'"),
        ({"packing_format": "auto_round"}, "symmetric with packing_format 'auto_round'"),
        ({"sym": False}, "asymmetric with packing_format 'auto_round:auto_gptq'"),
        ({"bits": 6}, "bits is 6"),
        ({"group_size": 0}, "group size is 0"),
        ({"sym": "yes"}, "true or false"),
    ],
)
def test_what_swquant_does_not_read_is_refused_in_a_sentence(
    change: dict[str, object], message: str, make_qtensor: Make, tmp_path: Path
) -> None:
    AutoRound().write(tmp_path / "out", model_of(make_qtensor(QuantSpec(2, 64, True), 32, 1, 0), tmp_path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"].update(change)
    with pytest.raises(SwquantError, match=message):
        AutoRound().read(tmp_path / "out", config)


def test_other_models_are_not_read(tmp_path: Path) -> None:
    assert AutoRound().read(tmp_path, {}) is None
    assert AutoRound().read(tmp_path, {"quantization_config": {"quant_method": "gptq"}}) is None


def test_check_refuses_widths_and_notes_packing_and_rounding() -> None:
    def check(spec: QuantSpec, dtype: torch.dtype, rows: int = 64) -> tuple[str, ...]:
        return AutoRound().check(outline_of(Path(), {}, spec, dtype, {"layers.0.up": (rows, 64)}, ()))

    assert check(QuantSpec(2, 64, True), torch.bfloat16) == ()
    assert check(QuantSpec(4, 64, True), torch.float32) == ()
    assert ["to float16;" in note for note in check(QuantSpec(8, 64, True), torch.float32)] == [True]
    assert ["to bfloat16;" in note for note in check(QuantSpec(4, 64, True), torch.bfloat16)] == [True]
    packing, rounding = check(QuantSpec(4, 64, False), torch.bfloat16)
    assert "packing_format auto_round" in packing
    assert "to float16 and then bfloat16;" in rounding
    with pytest.raises(SwquantError, match=r"layers\.0\.up with 64 inputs and 80 outputs"):
        check(QuantSpec(2, 64, True), torch.bfloat16, rows=80)
