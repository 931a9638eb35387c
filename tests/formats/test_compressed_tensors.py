"""Against the compressed-tensors package itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from hypothesis import given, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())


def config_of(spec: QuantSpec, *ignored: str) -> QuantizationConfig:
    outline = outline_of(Path(), {}, spec, torch.float32, {}, ignored)
    return QuantizationConfig.model_validate(CompressedTensors().config(outline))


def scheme_of(spec: QuantSpec) -> QuantizationScheme:
    config = config_of(spec, "lm_head")
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("proj."): tensor for name, tensor in tensors.items()}


@settings(deadline=None, max_examples=100)
@given(spec=SPECS, out=st.integers(1, 70), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_packages_own_compressor_writes_the_same_tensors_and_reads_the_same_weight(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make_qtensor(spec, out, 37 * width if spec.group_size is None else width, seed)
    ours = local(CompressedTensors().encode("proj", q, torch.float32))
    state = {"weight": q.dequantize(), "weight_scale": q.scale}
    if not spec.symmetric:
        state["weight_zero_point"] = (q.zero.int() - spec.mid_code).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme_of(spec))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].dtype == theirs[name].dtype
    read = PackedQuantizationCompressor.decompress(ours, scheme_of(spec))
    assert torch.equal(read["weight"], q.dequantize())


@pytest.mark.parametrize(("bits", "group", "symmetric"), [*itertools.product(BITS, (None, 32, 64, 128), (True, False))])
def test_the_config_says_what_was_packed(bits: int, group: int | None, symmetric: bool) -> None:
    spec = QuantSpec(bits, group, symmetric)
    config = config_of(spec, "lm_head", "model.extra")
    weights = scheme_of(spec).weights
    assert weights is not None
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (bits, group, symmetric)
    assert weights.strategy == ("channel" if group is None else "group")
    assert weights.dynamic is False
    assert config.ignore == ["lm_head", "model.extra"]
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"


def test_each_module_of_several_grids_is_a_target_of_its_own_group_alone() -> None:
    """By the package's own matching. A name may end as another does, and be inside of a wrapper."""
    grids = {
        "model.layers.1.mlp.up_proj": QuantSpec(2, 32, True),
        "model.layers.11.mlp.up_proj": QuantSpec(4, 64, False),
        "model.layers.1.mlp.down_proj": QuantSpec(4, 64, False),
        "model.layers.1.mlp.gate_proj": QuantSpec(8, None, True),
    }
    outline = Outline(Path(), {}, torch.float32, dict.fromkeys(grids, (64, 64)), grids, ("lm_head",))
    config = QuantizationConfig.model_validate(CompressedTensors().config(outline))
    assert len(config.config_groups) == 3
    for name, spec in grids.items():
        for prefix in ("", "language_model."):
            (group,) = (
                group
                for group in config.config_groups.values()
                if isinstance(group, QuantizationScheme)
                and any(match_name(prefix + name, target) for target in group.targets)
            )
            assert group.weights is not None
            found = (group.weights.num_bits, group.weights.group_size, group.weights.symmetric)
            assert found == (spec.bits, spec.group_size, spec.symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_stored_in_the_models_dtype(dtype: torch.dtype, make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(2, 64, True), 64, 2, 0)
    stored = CompressedTensors().encode("proj", q, dtype)["proj.weight_scale"]
    assert stored.dtype == dtype
    assert torch.equal(stored.float(), q.scale)
    assert (stored < 0).any()


def test_notes_are_about_asymmetric_loads_and_rounding() -> None:
    def check(spec: QuantSpec, dtype: torch.dtype) -> tuple[str, ...]:
        return CompressedTensors().check(outline_of(Path(), {}, spec, dtype, {}, ()))

    assert check(QuantSpec(2, 64, True), torch.bfloat16) == ()
    assert [note.split(":")[0] for note in check(QuantSpec(3, 64, False), torch.float16)] == ["asymmetric"]
    assert "round each weight" in check(QuantSpec(3, 64, True), torch.bfloat16)[0]


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_damaged_tensors_are_refused_by_name(suffix: str, make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(3, 32, False), 8, 2, 0)
    tensors = CompressedTensors().encode("proj", q, torch.float32)
    with pytest.raises(SwquantError, match=suffix):
        CompressedTensors().decode("proj", {**tensors, f"proj.{suffix}": torch.zeros(7, 7, dtype=torch.int8)}, q.spec)
    if suffix != "weight_shape":
        grown = torch.cat([tensors[f"proj.{suffix}"]] * 2)
        with pytest.raises(SwquantError, match=suffix):
            CompressedTensors().decode("proj", {**tensors, f"proj.{suffix}": grown}, q.spec)


@pytest.mark.parametrize("shape", [[4], [4, 64, 1], [0, 64], [4, -64], [4, 65]])
def test_sizes_that_are_none_are_refused(shape: list[int], make_qtensor: Make) -> None:
    spec = QuantSpec(2, 64, True)
    tensors = CompressedTensors().encode("proj", make_qtensor(spec, 4, 1, 0), torch.float32)
    with pytest.raises(SwquantError, match=r"proj.*(two sizes|does not divide)"):
        CompressedTensors().decode("proj", tensors | {"proj.weight_shape": torch.tensor(shape)}, spec)
