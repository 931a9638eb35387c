"""Quantized sources, widened: equal to the bit to what transformers and compressed-tensors make of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from swquant.checkpoint import widened as widened_module
from swquant.checkpoint.opening import SourceOptions, note_of, open_source
from swquant.checkpoint.reader import Checkpoint, open_checkpoint
from swquant.checkpoint.widened import Widened
from swquant.errors import SwquantError
from swquant.quant.bits import pack

Make = Callable[..., Path]
ASKED = SourceOptions(dequantize=True)
FP8 = torch.float8_e4m3fn
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FOUR = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lay(place: Path, tensors: dict[str, Tensor], quantization: object, **config: object) -> Path:
    place.mkdir(exist_ok=True)
    values = {"model_type": "llama", "quantization_config": quantization, **config}
    (place / "config.json").write_text(json.dumps(values))
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        place / "model.safetensors",
    )
    return place


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (tensor.flatten().clone(memory_format=torch.contiguous_format) for tensor in (a, b))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def check_access(source: Checkpoint | Widened, name: str, expected: Tensor, seed: int) -> None:
    """Whole, in part and by rows, it is ``expected``."""
    stored = source.tensors[name]
    assert (stored.shape, stored.dtype, stored.nbytes) == (tuple(expected.shape), expected.dtype, expected.nbytes)
    assert same(source.read(name), expected)
    count = len(expected)
    start, stop = sorted(torch.randint(count + 1, (2,), generator=rng(seed)).tolist())
    assert same(source.part(name, start, stop), expected[start:stop])
    for wrong in ((-1, 1), (0, count + 1), (count, count - 1)):
        with pytest.raises(ValueError, match="no range"):
            source.part(name, *wrong)
    if expected.dim() == 2:
        rows = torch.randint(count, (5,), generator=rng(seed + 1))
        assert same(source.rows(name, rows), expected[rows])
        assert source.rows(name, rows[:0]).shape == (0, expected.shape[1])
        with pytest.raises(SwquantError, match=f"row {count} of"):
            source.rows(name, torch.tensor([count]))
    source.require_finite([name])


def fp8_codes(shape: tuple[int, ...], seed: int, dtype: torch.dtype = FP8) -> Tensor:
    return (torch.randn(shape, generator=rng(seed)) * 40).to(dtype)


def fp8_config(block: object = (128, 128), **more: object) -> dict[str, object]:
    return {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", **more}


class TestFp8:
    @given(
        blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        experts=st.sampled_from([0, 1, 3]),
        codes=st.sampled_from([FP8, torch.float8_e5m2]),
        scales=st.sampled_from(["float32", "bfloat16", "e8m0", "uint8"]),
        dtype=st.sampled_from(["bfloat16", "float16", "float32", None]),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=60, deadline=None)
    def test_whole_blocks_as_transformers(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        blocks: tuple[int, int],
        sides: tuple[int, int],
        experts: int,
        codes: torch.dtype,
        scales: str,
        dtype: str | None,
        seed: int,
    ) -> None:
        front = (experts,) if experts else ()
        weight = fp8_codes((*front, blocks[0] * sides[0], blocks[1] * sides[1]), seed, codes)
        scale: Tensor = torch.rand((*front, *blocks), generator=rng(seed + 1)) * 0.01 + 1e-4
        scale = {
            "float32": lambda: scale,
            "bfloat16": scale.bfloat16,
            "e8m0": lambda: scale.to(torch.float8_e8m0fnu),
            "uint8": lambda: torch.randint(110, 130, scale.shape, generator=rng(seed), dtype=torch.uint8),
        }[scales]()
        name = "w.gate_up_proj" if experts else "w.weight"
        tensors = {name: weight, f"{name}_scale_inv": scale, "w.activation_scale": torch.ones(())}
        given_dtype = {} if dtype is None else {"dtype": dtype}
        place = lay(tmp_path_factory.getbasetemp() / "fp8", tensors, fp8_config(list(sides)), **given_dtype)
        expected = Fp8Dequantize(None)._dequantize_one(weight, scale, getattr(torch, dtype or "bfloat16"))
        source = open_source(place)
        assert list(source.tensors) == [name]
        assert "quantization_config" not in source.config
        check_access(source, name, expected, seed)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    @pytest.mark.parametrize("block", [None, [128, 128]])
    def test_one_scale_for_the_tensor(self, tmp_path: Path, shape: tuple[int, ...], block: object) -> None:
        weight, scale = fp8_codes((300, 140), 0), torch.full(shape, 0.0123)
        source = open_source(lay(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale}, fp8_config(block)))
        check_access(source, "w.weight", Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16), 3)

    @pytest.mark.parametrize("down", [(6, 1), (3, 5)])
    def test_without_a_block_size_the_scales_tell_it(self, tmp_path: Path, down: tuple[int, int]) -> None:
        weight, scale = fp8_codes((6, 10), 0), torch.rand(down, generator=rng(1))
        source = open_source(lay(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale}, fp8_config(None)))
        check_access(source, "w.weight", Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16), 3)

    def test_blocks_cut_short_at_the_edges_as_deepseek(self, tmp_path: Path) -> None:
        weight, scale = fp8_codes((192, 150), 0), torch.rand(2, 2, generator=rng(1))
        source = open_source(lay(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale}, fp8_config()))
        expected = torch.empty(192, 150)
        for row in range(192):
            for column in range(150):
                expected[row, column] = weight[row, column].float() * scale[row // 128, column // 128]
        check_access(source, "w.weight", expected.bfloat16(), 5)

    def test_what_is_not_quantized_stays_and_the_note_counts(self, tmp_path: Path) -> None:
        norm, embedding = torch.randn(8, generator=rng(0)), torch.randn(7, 8, generator=rng(1)).bfloat16()
        tensors = {
            "w.weight": fp8_codes((8, 8), 0),
            "w.weight_scale_inv": torch.ones(1, 1),
            "norm": norm,
            "e": embedding,
        }
        source = open_source(lay(tmp_path / "m", tensors, fp8_config()))
        assert same(source.read("norm"), norm)
        assert same(source.part("norm", 2, 5), norm[2:5])
        check_access(source, "e", embedding, 1)
        assert note_of(source) == "the source's 1 fp8 weights are widened to bfloat16"
        assert source.dtype == torch.bfloat16
        assert not source.has("w.weight_scale_inv")
        with pytest.raises(SwquantError, match=r"has no tensor 'w\.weight_scale_inv'"):
            source.read("w.weight_scale_inv")

    def test_full_names(self, tmp_path: Path) -> None:
        weight = fp8_codes((8, 8), 0)
        tensors = {"a.weight": weight, "a.weight_scale_inv": torch.ones(1, 1) * 0.5, "b.weight": torch.ones(3)}
        source = open_source(lay(tmp_path / "m", tensors, fp8_config())).prefixed(
            "model.", "model.b.weight", "lm_head."
        )
        assert list(source.tensors) == ["model.a.weight", "model.b.weight"]
        check_access(source, "model.a.weight", (weight.float() * 0.5).bfloat16(), 2)
        assert same(source.read("model.b.weight"), torch.ones(3))
        assert source.prefixed("model.", "model.b.weight", "lm_head.") is source

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"w.weight_scale_inv": None}, "'w.weight' in .* has 8 bits and no scale"),
            ({"w.weight": None}, "has no tensor 'w.weight', which its weight needs"),
            ({"w.weight": torch.ones(256, 256)}, "'w.weight' in .* is float32, expected float8_e4m3fn or float8_e5m2"),
            ({"w.weight": torch.ones(256, 256, dtype=torch.int8)}, "'w.weight' in .* is int8, expected float8"),
            ({"w.weight": fp8_codes((256,), 0)}, r"has the shape \[256\], expected two dimensions"),
            ({"w.weight_scale_inv": torch.ones(2, 3)}, r"has the shape \[2, 3\], expected \[2, 2\], a scale for each"),
            ({"w.weight_scale_inv": torch.ones(4)}, r"has the shape \[4\], expected \[2, 2\]"),
            ({"w.weight_scale_inv": torch.ones(2, 2).double().long()}, "'w.weight_scale_inv' in .* is int64"),
            ({"v.weight": fp8_codes((4, 4), 0)}, "'v.weight' in .* has 8 bits and no scale"),
        ],
    )
    def test_refusals(self, tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
        tensors = {"w.weight": fp8_codes((256, 256), 0), "w.weight_scale_inv": torch.ones(2, 2), "n": torch.ones(2)}
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(SwquantError, match=said) as caught:
            open_source(lay(tmp_path / "m", changed, fp8_config()))
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, 1.5], [True, 2], {"a": "\x1b"}])
    def test_hostile_blocks(self, tmp_path: Path, block: object) -> None:
        tensors = {"w.weight": fp8_codes((4, 4), 0), "w.weight_scale_inv": torch.ones(1, 1)}
        with pytest.raises(SwquantError, match="is quantized by 'fp8' with weight_block_size") as caught:
            open_source(lay(tmp_path / "m", tensors, fp8_config(block)))
        assert str(caught.value).isprintable()

    def test_nothing_quantized(self, tmp_path: Path) -> None:
        with pytest.raises(SwquantError, match="says that it is quantized by 'fp8' and holds no such tensor"):
            open_source(lay(tmp_path / "m", {"w.weight": torch.ones(4, 4)}, fp8_config()))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scales_that_are_not_finite(self, tmp_path: Path, value: float) -> None:
        scale = torch.ones(2, 2)
        scale[1, 0] = value
        tensors = {"w.weight": fp8_codes((256, 256), 0), "w.weight_scale_inv": scale}
        source = open_source(lay(tmp_path / "m", tensors, fp8_config()))
        assert source.part("w.weight", 0, 128).isfinite().all()
        for act in (source.require_finite, lambda: source.read("w.weight")):
            with pytest.raises(SwquantError, match=r"'w\.weight_scale_inv' in .* holds NaN or infinite values"):
                act()

    def test_products_that_are_not_finite_or_too_large(self, tmp_path: Path) -> None:
        tensors = {"w.weight": torch.full((4, 4), 448.0).to(FP8), "w.weight_scale_inv": torch.full((1, 1), 200.0)}
        source = open_source(lay(tmp_path / "m", tensors, fp8_config(), torch_dtype="float16"))
        with pytest.raises(SwquantError, match=r"'w\.weight' in .* holds NaN or infinite values"):
            source.require_finite()
        source = open_source(lay(tmp_path / "m", tensors, fp8_config(), dtype="bfloat16"))
        source.require_finite()
        with pytest.raises(SwquantError, match=r"'w\.weight' in .* holds 89600, and weights beyond 65504"):
            source.require_finite(["w.weight"])

    def test_codes_that_are_not_finite(self, tmp_path: Path) -> None:
        codes = torch.zeros(4, 4, dtype=torch.uint8)
        codes[2, 1] = 0x7F
        tensors = {"w.weight": codes.view(FP8), "w.weight_scale_inv": torch.ones(1, 1)}
        with pytest.raises(SwquantError, match=r"'w\.weight' in .* holds NaN or infinite values"):
            open_source(lay(tmp_path / "m", tensors, fp8_config())).require_finite()


class TestMxfp4:
    @given(
        experts=st.integers(1, 4),
        out=st.integers(1, 6),
        groups=st.integers(1, 3),
        dtype=st.sampled_from(["bfloat16", "float16", "float32", None]),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=40, deadline=None)
    def test_as_transformers(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        experts: int,
        out: int,
        groups: int,
        dtype: str | None,
        seed: int,
    ) -> None:
        blocks = torch.randint(256, (experts, out, groups, 16), generator=rng(seed), dtype=torch.uint8)
        scales = torch.randint(110, 134, (experts, out, groups), generator=rng(seed + 1), dtype=torch.uint8)
        bias = torch.randn(experts, out, generator=rng(seed)).bfloat16()
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}
        given_dtype = {} if dtype is None else {"torch_dtype": dtype}
        source = open_source(lay(tmp_path_factory.getbasetemp() / "mx", tensors, MXFP4, **given_dtype))
        expected = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype or "bfloat16"))
        assert expected.shape == (experts, 32 * groups, out)
        assert list(source.tensors) == [name, f"{name}_bias"]
        check_access(source, name, expected, seed)
        assert same(source.read(f"{name}_bias"), bias)

    def test_every_code_and_extreme_exponents(self, tmp_path: Path) -> None:
        blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        for exponent in (0, 1, 127, 252):
            scales = torch.full((1, 1, 16), exponent, dtype=torch.uint8)
            source = open_source(
                lay(tmp_path / "m", {"w_blocks": blocks, "w_scales": scales, "n": torch.ones(2)}, MXFP4)
            )
            assert same(source.read("w"), convert_moe_packed_tensors(blocks, scales))

    def test_an_infinite_scale(self, tmp_path: Path) -> None:
        scales = torch.full((1, 2, 1), 127, dtype=torch.uint8)
        scales[0, 1, 0] = 255
        tensors = {
            "w_blocks": torch.full((1, 2, 1, 16), 0x22, dtype=torch.uint8),
            "w_scales": scales,
            "n": torch.ones(2),
        }
        with pytest.raises(SwquantError, match=r"'w_blocks' in .* holds NaN or infinite values"):
            open_source(lay(tmp_path / "m", tensors, MXFP4)).require_finite()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"w_scales": None}, "has no tensor 'w_scales'"),
            ({"w_scales": torch.ones(2, 3, 3, dtype=torch.uint8)}, r"has the shape \[2, 3, 3\], expected \[2, 3, 2\]"),
            ({"w_scales": torch.ones(2, 3, 2)}, "'w_scales' in .* is float32, expected uint8"),
            ({"w_blocks": torch.ones(2, 3, 2, 8, dtype=torch.uint8)}, r"expected \[experts, out, in / 32, 16\]"),
            ({"w_blocks": torch.ones(3, 2, 16, dtype=torch.uint8)}, r"expected \[experts, out, in / 32, 16\]"),
            ({"w_blocks": torch.ones(2, 3, 2, 16)}, "'w_blocks' in .* is float32, expected uint8"),
            ({"w_blocks": None}, "quantized by 'mxfp4' and holds no such tensor"),
        ],
    )
    def test_refusals(self, tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
        tensors = {
            "w_blocks": torch.ones(2, 3, 2, 16, dtype=torch.uint8),
            "w_scales": torch.ones(2, 3, 2, dtype=torch.uint8),
            "n": torch.ones(2),
        }
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(SwquantError, match=said):
            open_source(lay(tmp_path / "m", changed, MXFP4))


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}


def decompressed(form: str, weights: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
    """What the compressed-tensors package itself makes of one module's tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return BaseCompressor.get_value_from_registry(form).decompress(dict(state), scheme)["weight"]


def packed_state(
    rows: int, columns: int, bits: int, groups: int, dtype: torch.dtype, *, symmetric: bool, seed: int
) -> dict[str, Tensor]:
    codes = torch.randint(1 << bits, (rows, columns), generator=rng(seed), dtype=torch.uint8)
    state = {
        "weight_packed": pack(codes, bits),
        "weight_scale": (torch.rand(rows, groups, generator=rng(seed + 1)) * 0.02 - 0.005).to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        zero = torch.randint(1 << bits, (rows, groups), generator=rng(seed + 2), dtype=torch.uint8)
        state["weight_zero_point"] = pack(zero.T, bits).T.contiguous()
    return state


class TestCompressedTensors:
    @given(
        rows=st.integers(1, 70),
        groups=st.integers(1, 3),
        size=st.sampled_from([8, 32, 40]),
        bits=st.sampled_from([4, 8, 3, 2]),
        symmetric=st.booleans(),
        channel=st.booleans(),
        scale=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        dtype=st.sampled_from(["bfloat16", "float16", None]),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=50, deadline=None)
    def test_packed_as_the_package(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        rows: int,
        groups: int,
        size: int,
        bits: int,
        symmetric: bool,
        channel: bool,
        scale: torch.dtype,
        dtype: str | None,
        seed: int,
    ) -> None:
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        weights |= {"strategy": "channel"} if channel else {"strategy": "group", "group_size": size}
        count = 1 if channel else groups
        state = packed_state(rows, groups * size, bits, count, scale, symmetric=symmetric, seed=seed)
        expected = decompressed("pack-quantized", weights, state).to(getattr(torch, dtype) if dtype else scale)
        given_dtype = {} if dtype is None else {"dtype": dtype}
        place = tmp_path_factory.getbasetemp() / "packed"
        lay(
            place,
            {f"w.{name}": value for name, value in state.items()},
            compressed("pack-quantized", weights),
            **given_dtype,
        )
        source = open_source(place, ASKED)
        assert list(source.tensors) == ["w.weight"]
        check_access(source, "w.weight", expected, seed)

    @pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
    @pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(
        ("more", "shape"),
        [
            ({"strategy": "tensor"}, (1,)),
            ({"strategy": "tensor"}, ()),
            ({"strategy": "channel"}, (24, 1)),
            ({"strategy": "group", "group_size": 8}, (24, 4)),
            ({"strategy": "block", "block_structure": [8, 16]}, (3, 2)),
            ({"strategy": "block", "block_structure": [16, 24]}, (2, 2)),
        ],
    )
    def test_fp8_as_the_package(
        self, tmp_path: Path, form: str, scale_dtype: torch.dtype, more: dict[str, Any], shape: tuple[int, ...]
    ) -> None:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **more}
        scale = (torch.rand(shape, generator=rng(1)) * 0.01 + 1e-3).to(scale_dtype)
        state = {"weight": fp8_codes((24, 32), 0), "weight_scale": scale}
        rest = {"w.input_scale": torch.ones(1), "n.weight": torch.ones(3), "attn.k_scale": torch.ones(1)}
        tensors = {f"w.{name}": value for name, value in state.items()} | rest
        source = open_source(lay(tmp_path / "m", tensors, compressed(form, weights), dtype="bfloat16"), ASKED)
        assert list(source.tensors) == ["n.weight", "w.weight"]
        check_access(source, "w.weight", decompressed(form, weights, state).bfloat16(), 7)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(("more", "shape"), [({"strategy": "channel"}, (24, 1)), ({"strategy": "tensor"}, (1,))])
    def test_int8_as_the_package(
        self, tmp_path: Path, symmetric: bool, more: dict[str, Any], shape: tuple[int, ...]
    ) -> None:
        weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "dynamic": False, **more}
        codes = torch.randint(-128, 128, (24, 32), generator=rng(0), dtype=torch.int8)
        state = {"weight": codes, "weight_scale": torch.rand(shape, generator=rng(1)).bfloat16()}
        if not symmetric:
            state["weight_zero_point"] = torch.randint(-128, 128, shape, generator=rng(2), dtype=torch.int8)
        tensors = {f"w.{name}": value for name, value in state.items()}
        source = open_source(lay(tmp_path / "m", tensors, compressed("int-quantized", weights)), ASKED)
        check_access(source, "w.weight", decompressed("int-quantized", weights, state), 7)

    def test_several_groups_of_settings(self, tmp_path: Path) -> None:
        four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        eight = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        a = packed_state(8, 64, 4, 2, torch.bfloat16, symmetric=True, seed=0)
        b = {"weight": fp8_codes((8, 64), 0), "weight_scale": torch.ones(8, 1).bfloat16() * 0.01}
        settings_ = {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {
                "a": {"targets": ["re:.*a"], "weights": four, "format": "pack-quantized"},
                "b": {"targets": ["re:.*b"], "weights": eight, "format": "float-quantized"},
            },
        }
        tensors = {f"a.{k}": v for k, v in a.items()} | {f"b.{k}": v for k, v in b.items()}
        source = open_source(lay(tmp_path / "m", tensors, settings_), ASKED)
        check_access(source, "a.weight", decompressed("pack-quantized", four, a), 1)
        check_access(source, "b.weight", decompressed("float-quantized", eight, b), 1)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"w.weight_scale": None}, "has no tensor 'w.weight_scale'"),
            ({"w.weight_zero_point": None}, "has no tensor 'w.weight_zero_point'"),
            ({"w.weight_shape": None}, "has no tensor 'w.weight_shape'"),
            (
                {"w.weight_shape": torch.tensor([8, 65])},
                r"expected \[8, 9\] for 4 bits and the \[8, 65\] of weight_shape",
            ),
            ({"w.weight_shape": torch.tensor([8, -64])}, "of weight_shape"),
            ({"w.weight_shape": torch.tensor([2**62, 64])}, "of weight_shape"),
            ({"w.weight_scale": torch.ones(8, 3)}, r"has the shape \[8, 3\], expected \[8, 2\]"),
            ({"w.weight_scale": torch.ones(8, 2).int()}, "'w.weight_scale' in .* is int32"),
            ({"w.weight_zero_point": torch.ones(2, 2).int()}, r"has the shape \[2, 2\], expected \[1, 2\]"),
            ({"w.weight_packed": torch.ones(8, 8)}, "'w.weight_packed' in .* is float32, expected int32"),
            ({"w.weight": torch.ones(8, 64)}, "holds 'w' both packed and plain"),
            ({"w.weight_g_idx": torch.ones(64).int()}, r"groups of inputs out of order \(weight_g_idx\)"),
            ({"v.weight": fp8_codes((4, 4), 0)}, "'v.weight' in .* has 8 bits and no scale"),
        ],
    )
    def test_refused_tensors(self, tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
        state = packed_state(8, 64, 4, 2, torch.bfloat16, symmetric=False, seed=0)
        tensors = {f"w.{name}": value for name, value in state.items()} | {"n": torch.ones(2)}
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(SwquantError, match=said):
            open_source(lay(tmp_path / "m", changed, compressed("pack-quantized", FOUR)), ASKED)

    @pytest.mark.parametrize(
        ("form", "weights", "more", "said"),
        [
            ("nvfp4-pack-quantized", FOUR, {}, "the format 'nvfp4-pack-quantized'"),
            ("marlin-24", FOUR, {}, "the format 'marlin-24'"),
            (None, FOUR, {}, "the format 'None'"),
            ("pack-quantized", FOUR | {"actorder": "group"}, {}, "actorder"),
            ("pack-quantized", FOUR | {"num_bits": 16}, {}, "weights of '16' bits"),
            ("pack-quantized", FOUR | {"num_bits": "4\x1b"}, {}, "weights of "),
            ("pack-quantized", FOUR | {"type": "float"}, {}, "type 'float'"),
            ("pack-quantized", FOUR | {"strategy": "block", "block_structure": [8, 8]}, {}, "the strategy 'block'"),
            ("pack-quantized", FOUR | {"group_size": 0}, {}, "the strategy 'group', group_size '0'"),
            ("pack-quantized", FOUR | {"group_size": 48}, {}, "expected whole groups of 48 inputs"),
            ("pack-quantized", FOUR | {"num_bits": 8}, {}, "for 8 bits"),
            ("int-quantized", FOUR | {"num_bits": 8}, {}, "no format of config_groups that fits 'w'"),
            ("pack-quantized", FOUR, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "the sparsity format"),
            ("pack-quantized", FOUR, {"transform_config": {"config_groups": {"R1": {}}}}, "transforms of the activ"),
            ("pack-quantized", FOUR, {"config_groups": {}}, "no scheme of weights"),
            ("pack-quantized", FOUR, {"config_groups": [1]}, "no scheme of weights"),
        ],
    )
    def test_refused_settings(
        self, tmp_path: Path, form: str, weights: dict[str, Any], more: dict[str, Any], said: str
    ) -> None:
        state = packed_state(8, 64, 4, 2, torch.bfloat16, symmetric=False, seed=0)
        tensors = {f"w.{name}": value for name, value in state.items()}
        with pytest.raises(SwquantError, match=said) as caught:
            open_source(lay(tmp_path / "m", tensors, compressed(form, weights) | more), ASKED)
        assert str(caught.value).isprintable()


def gptq_by_loops(state: dict[str, Tensor], bits: int, group: Tensor, *, first_version: bool) -> Tensor:
    """The layout read one number at a time; version 1 stores each zero point less one."""
    words, each, mask = state["qweight"].long() & 0xFFFFFFFF, 32 // bits, (1 << bits) - 1
    zeros = state["qzeros"].long() & 0xFFFFFFFF
    inputs, outputs = len(group), words.shape[1]
    weight = torch.empty(outputs, inputs, dtype=state["scales"].dtype)
    for i in range(inputs):
        g = int(group[i])
        for o in range(outputs):
            code = int(words[i // each, o]) >> bits * (i % each) & mask
            zero = (int(zeros[g, o // each]) >> bits * (o % each) & mask) + first_version
            weight[o, i] = state["scales"][g, o] * torch.tensor(code - zero, dtype=weight.dtype)
    return weight


def gptq_state(
    inputs: int, outputs: int, bits: int, groups: int, seed: int, *, first_version: bool
) -> dict[str, Tensor]:
    codes = torch.randint(1 << bits, (outputs, inputs), generator=rng(seed), dtype=torch.uint8)
    # the first version cannot tell a zero point of 0
    zero = torch.randint(int(first_version), 1 << bits, (groups, outputs), generator=rng(seed + 1), dtype=torch.uint8)
    return {
        "qweight": pack(codes, bits).T.contiguous(),
        "qzeros": pack(zero - int(first_version), bits),
        "scales": (torch.rand(groups, outputs, generator=rng(seed + 2)) * 0.02 + 1e-3).half(),
    }


def gptq_config(bits: int = 4, size: int = 32, **more: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


class TestGptq:
    @given(
        bits=st.sampled_from([4, 4, 8, 2]),
        groups=st.integers(1, 3),
        outputs=st.sampled_from([16, 32, 48]),
        version=st.sampled_from(["gptq", "gptq_v2", None]),
        order=st.sampled_from(["missing", "plain", "act-order"]),
        channel=st.booleans(),
        dtype=st.sampled_from(["float16", "bfloat16", None]),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=40, deadline=None)
    def test_as_read_one_by_one(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        bits: int,
        groups: int,
        outputs: int,
        version: str | None,
        order: str,
        channel: bool,
        dtype: str | None,
        seed: int,
    ) -> None:
        inputs, first = groups * 16, version != "gptq_v2"
        size, groups = (-1, 1) if channel else (16, groups)
        state = gptq_state(inputs, outputs, bits, groups, seed, first_version=first)
        group = torch.arange(inputs, dtype=torch.int32) // (inputs if channel else 16)
        if order == "act-order":
            group = group[torch.randperm(inputs, generator=rng(seed))]
        expected = gptq_by_loops(state, bits, group, first_version=first)
        if order != "missing":
            state["g_idx"] = group
        tensors = {f"w.{name}": value for name, value in state.items()} | {"w.bias": torch.ones(outputs).half()}
        more = {} if version is None else {"checkpoint_format": version}
        given_dtype = {} if dtype is None else {"torch_dtype": dtype}
        place = lay(tmp_path_factory.getbasetemp() / "gptq", tensors, gptq_config(bits, size, **more), **given_dtype)
        source = open_source(place, ASKED)
        assert list(source.tensors) == ["w.bias", "w.weight"]
        check_access(source, "w.weight", expected.to(getattr(torch, dtype or "float16")), seed)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("first", [True, False])
    def test_a_symmetric_zero_point_tells_the_version_whatever_the_settings_say(
        self, tmp_path: Path, bits: int, first: bool
    ) -> None:
        """vllm-project/vllm#38966: read by the settings alone, every weight is off by its scale."""
        zero = torch.full((2, 32), 1 << bits - 1, dtype=torch.uint8)
        state = gptq_state(64, 32, bits, 2, 0, first_version=first) | {"qzeros": pack(zero - int(first), bits)}
        expected = gptq_by_loops(state, bits, torch.arange(64) // 32, first_version=first)
        tensors = {f"w.{name}": value for name, value in state.items()}
        for version, sym in (("gptq", True), ("gptq_v2", True), ("gptq" if first else "gptq_v2", False)):
            config = gptq_config(bits, checkpoint_format=version) | {"sym": sym}
            source = open_source(lay(tmp_path / f"{version}{sym}", tensors, config), ASKED)
            assert isinstance(source, Widened)
            assert torch.equal(source.read("w.weight"), expected)
            assert ("though its settings name" in source.note) == ((version == "gptq") != first)

    def test_zero_points_of_0_that_borrowed_from_their_neighbours(self, tmp_path: Path) -> None:
        """GPTQModel subtracts from whole words and adds to whole words, so what was borrowed is given back."""
        zero = torch.tensor([[0, 5, 0, 0, 15, 1, 0, 9]], dtype=torch.uint8)
        state = gptq_state(16, 8, 4, 1, 0, first_version=False) | {"qzeros": pack(zero, 4)}
        expected = gptq_by_loops(state, 4, torch.zeros(16), first_version=False)
        state["qzeros"] = state["qzeros"] - 0x11111111
        tensors = {f"w.{name}": value for name, value in state.items()}
        source = open_source(lay(tmp_path / "m", tensors, gptq_config(4, -1)), ASKED)
        check_access(source, "w.weight", expected, 0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"w.scales": None}, "has no tensor 'w.scales'"),
            ({"w.qzeros": None}, "has no tensor 'w.qzeros'"),
            ({"w.scales": torch.ones(3, 32)}, r"has the shape \[3, 32\], expected \[2, 32\]"),
            ({"w.qzeros": torch.ones(2, 5).int()}, r"has the shape \[2, 5\], expected \[2, 4\]"),
            ({"w.qweight": torch.ones(8).int()}, "expected two dimensions"),
            ({"w.qweight": torch.ones(8, 32)}, "is float32, expected int32"),
            ({"w.g_idx": torch.ones(63).int()}, r"has the shape \[63\], expected \[64\]"),
            ({"w.weight": torch.ones(32, 64)}, "holds 'w' both packed and plain"),
            ({"w.qweight": None}, "quantized by 'gptq' and holds no such tensor"),
        ],
    )
    def test_refused_tensors(self, tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
        state = gptq_state(64, 32, 4, 2, 0, first_version=True)
        tensors = {f"w.{name}": value for name, value in state.items()} | {"n": torch.ones(2)}
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(SwquantError, match=said):
            open_source(lay(tmp_path / "m", changed, gptq_config()), ASKED)

    @pytest.mark.parametrize("bad", [-1, 2])
    def test_a_group_that_there_is_not(self, tmp_path: Path, bad: int) -> None:
        state = gptq_state(64, 32, 4, 2, 0, first_version=True) | {"g_idx": torch.arange(64).int() // 32}
        state["g_idx"][5] = bad
        tensors = {f"w.{name}": value for name, value in state.items()}
        source = open_source(lay(tmp_path / "m", tensors, gptq_config()), ASKED)
        with pytest.raises(SwquantError, match=r"'w\.g_idx' in .* names groups from .*, expected 0 to 1"):
            source.require_finite()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"bits": 3}, "'3' bits"),
            ({"bits": "x"}, "'x' bits"),
            ({"bits": True}, "'True' bits"),
            ({"group_size": 0}, "group_size '0'"),
            ({"group_size": None}, "group_size 'None'"),
            ({"checkpoint_format": "marlin"}, "the layout 'marlin'"),
            ({"is_marlin_format": True}, "the layout 'gptq'"),
            ({"dynamic": {"+:.*": {"bits": 8}}}, "settings of single modules"),
        ],
    )
    def test_refused_settings(self, tmp_path: Path, more: dict[str, object], said: str) -> None:
        state = gptq_state(64, 32, 4, 2, 0, first_version=True)
        tensors = {f"w.{name}": value for name, value in state.items()}
        with pytest.raises(SwquantError, match=f"is quantized by 'gptq' with {said}"):
            open_source(lay(tmp_path / "m", tensors, gptq_config() | more), ASKED)


class TestReading:
    def test_an_expert_is_read_without_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "experts.down_proj"
        tensors = {
            f"{name}_blocks": torch.ones(64, 8, 2, 16, dtype=torch.uint8),
            f"{name}_scales": torch.full((64, 8, 2), 127, dtype=torch.uint8),
            "n": torch.ones(2),
        }
        source = open_source(lay(tmp_path / "m", tensors, MXFP4))
        asked: list[tuple[int, int]] = []
        part = Checkpoint.part

        def noting(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return part(self, name, start, stop)

        monkeypatch.setattr(Checkpoint, "part", noting)
        assert source.part(name, 17, 18).shape == (1, 64, 8)
        assert asked == [(17, 18), (17, 18)]

    @pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
    def test_large_tensors_go_in_pieces(self, tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(widened_module, "AT_ONCE", at_once)
        weight, scale = fp8_codes((20, 12), 0), torch.rand(3, 2, generator=rng(1))
        place = lay(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": scale}, fp8_config([7, 8]))
        spread = scale.repeat_interleave(7, 0)[:20].repeat_interleave(8, 1)[:, :12]
        check_access(open_source(place), "w.weight", (weight.float() * spread).bfloat16(), 3)

    def test_the_fingerprint_is_of_the_contents(self, tmp_path: Path) -> None:
        tensors = {"w.weight": fp8_codes((8, 8), 0), "w.weight_scale_inv": torch.ones(1, 1)}
        first = open_source(lay(tmp_path / "a", tensors, fp8_config()))
        again = open_source(lay(tmp_path / "b", tensors, fp8_config()))
        other = open_source(
            lay(tmp_path / "c", {**tensors, "w.weight_scale_inv": torch.full((1, 1), 2.0)}, fp8_config())
        )
        assert first.fingerprint() == again.fingerprint()
        assert (
            len(
                {
                    first.fingerprint(),
                    other.fingerprint(),
                    open_checkpoint(tmp_path / "a", quantized=True).fingerprint(),
                }
            )
            == 3
        )

    def test_shards(self, lay_out: Make) -> None:
        weight = fp8_codes((8, 8), 0)
        config = {"model_type": "llama", "quantization_config": fp8_config()}
        directory = lay_out(
            {"w.weight": weight, "n": torch.ones(3)}, {"w.weight_scale_inv": torch.full((1, 1), 0.5)}, config=config
        )
        check_access(open_source(directory), "w.weight", (weight.float() * 0.5).bfloat16(), 0)

    def test_settings_of_a_text_part(self, lay_out: Make) -> None:
        weight = fp8_codes((8, 8), 0)
        text = {"hidden_size": 8, "dtype": "float32", "quantization_config": fp8_config()}
        shard = {"w.weight": weight, "w.weight_scale_inv": torch.full((1, 1), 0.5)}
        source = open_source(lay_out(shard, config={"model_type": "x", "text_config": text}))
        assert source.config == {"model_type": "x", "text_config": {"hidden_size": 8, "dtype": "float32"}}
        check_access(source, "w.weight", weight.float() * 0.5, 0)

    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_any_settings_are_read_or_refused_in_a_sentence(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        value = st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-2, 300),
            st.text(max_size=3),
            st.lists(st.integers(-1, 9), max_size=3),
            st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
        )
        kind = data.draw(st.sampled_from(["fp8", "compressed-tensors", "gptq", "mxfp4"]))
        changed = data.draw(
            st.dictionaries(
                st.sampled_from(
                    [
                        "weight_block_size",
                        "bits",
                        "group_size",
                        "checkpoint_format",
                        "dynamic",
                        "config_groups",
                        "format",
                        "sparsity_config",
                        "transform_config",
                        "pack_dtype",
                        "num_bits",
                        "strategy",
                        "symmetric",
                        "type",
                    ]
                ),
                value,
                max_size=3,
            )
        )
        base: dict[str, Any] = {
            "fp8": fp8_config(),
            "gptq": gptq_config(),
            "mxfp4": MXFP4,
            "compressed-tensors": compressed("pack-quantized", {**FOUR, **changed}),
        }[kind]
        state = packed_state(8, 64, 4, 2, torch.bfloat16, symmetric=False, seed=0) | gptq_state(
            64, 8, 4, 2, 0, first_version=True
        )
        tensors = {f"{'abc'[index % 3]}.{name}": value for index, (name, value) in enumerate(state.items())}
        tensors |= {f"w.{name}": value for name, value in state.items()}
        tensors |= {"v.weight": fp8_codes((8, 8), 0), "v.weight_scale_inv": torch.ones(1, 1)}
        keep = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, unique=True))
        place = lay(
            tmp_path_factory.getbasetemp() / "any", {k: tensors[k] for k in keep} | {"n": torch.ones(2)}, base | changed
        )
        try:
            source = open_source(place, ASKED)
            source.require_finite()
            assert all(source.read(name).shape == stored.shape for name, stored in source.tensors.items())
        except SwquantError as error:
            assert str(error).isprintable()  # noqa: PT017
