"""Quantized sources from the command line to the output: the run is that of the plain model they stand for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from swquant import Recipe, quantize
from swquant.checkpoint import hub
from swquant.checkpoint.opening import SourceOptions, open_source
from swquant.checkpoint.reader import open_checkpoint
from swquant.cli import app, main
from swquant.errors import SwquantError
from swquant.evaluation import What, measure
from swquant.model.opening import open_model
from swquant.model.whole import model_of

BLOCK = 16
RTN = Recipe(method="rtn", bits=4, group_size=32, samples=2, seq_len=16, evaluation_samples=2, device="cpu")


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and a scale for each ``BLOCK x BLOCK``."""
    blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448
    return (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn), scale


def rewrite(source: Path, place: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], settings: Any) -> Path:
    shutil.copytree(source, place)
    config = json.loads((place / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (place / "config.json").write_text(json.dumps(config))
    save_file(change(load_file(place / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
    return place


def quantized_linears(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if "_proj." in name:
            out[name], out[f"{name}_scale_inv"] = in_fp8(value)
        else:
            out[name] = value
    return out


@pytest.fixture(scope="module")
def fp8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return rewrite(llama, tmp_path_factory.mktemp("fp8") / "model", quantized_linears, settings)


@pytest.fixture(scope="module")
def plain(llama: Path, fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bfloat16 checkpoint of the widened weights."""
    source = open_source(fp8)
    widened = lambda _: {name: source.read(name) for name in source.tensors}  # noqa: E731
    return rewrite(llama, tmp_path_factory.mktemp("plain") / "model", widened, None)


def test_the_skeleton_is_that_of_the_plain_model(fp8: Path, plain: Path) -> None:
    ours, theirs = (open_model(open_source(source)).skeleton for source in (fp8, plain))
    assert [type(module) for module in ours.model.modules()] == [type(module) for module in theirs.model.modules()]
    assert ours.names.pieces == theirs.names.pieces
    assert ours.names.carried == theirs.names.carried == ()


def test_weights_are_those_that_transformers_loads(fp8: Path) -> None:
    config = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16, quantization_config=config)
    source = open_source(fp8)
    for name, value in model.named_parameters():
        if source.has(name):
            assert torch.equal(source.read(name), value), name


@pytest.mark.parametrize("calibration", ["text", "self"])
@pytest.mark.parametrize("method", ["rtn", "rotate + rtn"])
def test_an_fp8_source_gives_the_codes_of_its_widened_weights(
    fp8: Path, plain: Path, text: Path, tmp_path: Path, calibration: str, method: str
) -> None:
    recipe = Recipe(
        method=method,
        bits=4,
        group_size=32,
        samples=2,
        seq_len=16,
        evaluation_samples=2,
        device="cpu",
        calibration=str(text) if calibration == "text" else "self",
    )
    ours, theirs = (quantize(recipe, source, tmp_path / source.parent.name) for source in (fp8, plain))
    written, expected = (load_file(tmp_path / source.parent.name / "model.safetensors") for source in (fp8, plain))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert ours.quality == theirs.quality
    assert ours.key["source"] != theirs.key["source"]
    config = json.loads((tmp_path / fp8.parent.name / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_an_output_of_our_own_is_a_source_when_asked(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method="rtn",
        bits=4,
        group_size=32,
        samples=2,
        seq_len=16,
        device="cpu",
        calibration=str(text),
        format="compressed_tensors,gptq,dequantized",
    )
    quantize(recipe, llama, tmp_path / "out")
    plain = open_checkpoint(tmp_path / "out" / "dequantized")
    for form in ("compressed_tensors", "gptq"):
        place = tmp_path / "out" / form
        method = "compressed-tensors" if form == "compressed_tensors" else form
        with pytest.raises(SwquantError, match=f"is already quantized, by '{method}'; give .* --dequantize-source"):
            open_source(place)
        source = open_source(place, SourceOptions(dequantize=True))
        assert source.tensors.keys() == plain.tensors.keys()
        for name in plain.tensors:
            assert torch.allclose(source.read(name).float(), plain.read(name).float(), rtol=2**-8, atol=0), name


def test_a_missing_tensor_is_named_before_any_work(fp8: Path, text: Path, tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in tensors.items() if name != "model.layers.1.mlp.up_proj.weight_scale_inv"}

    broken = rewrite(
        fp8, tmp_path / "broken", without, json.loads((fp8 / "config.json").read_text())["quantization_config"]
    )
    with pytest.raises(SwquantError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' in .* has 8 bits and no scale"):
        quantize(RTN, broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_scale_that_nothing_reads_is_refused_before_any_work(llama: Path, tmp_path: Path) -> None:
    """Weights widened without their scales, say, and settings that no longer tell of any."""
    key = "model.layers.1.mlp.up_proj.weight_scale"
    left = rewrite(llama, tmp_path / "left", lambda tensors: tensors | {key: torch.ones(1)}, None)
    with pytest.raises(SwquantError, match=rf"'{re.escape(key)}' in .* says something of the weight beside it"):
        quantize(RTN, left, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left"]


def test_an_infinite_scale_is_named_before_any_work(fp8: Path, text: Path, tmp_path: Path) -> None:
    def spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"][1, 1] = torch.inf
        return tensors

    settings = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    broken = rewrite(fp8, tmp_path / "broken", spoilt, settings)
    with pytest.raises(SwquantError, match=r"up_proj\.weight_scale_inv' in .* holds NaN or infinite values"):
        quantize(RTN, broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_whole_model_computes_what_the_plain_one_does(fp8: Path, plain: Path) -> None:
    tokens = torch.arange(12).view(1, 12)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model_of(open_source(fp8))(tokens).logits, theirs.eval()(tokens).logits)


def test_an_fp8_model_is_measured_and_is_a_reference(fp8: Path, plain: Path, text: Path) -> None:
    what = What(str(text), context=16, windows=2, device="cpu")
    ours, theirs = (measure(model, what, reference=fp8).text for model in (fp8, plain))
    assert ours is not None
    assert theirs is not None
    assert ours.perplexity == theirs.perplexity
    assert theirs.kl == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def packed(make_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where reading weights into the model's dtype rounds none of them."""
    out = tmp_path_factory.mktemp("packed") / "top" / "inner"
    out.parent.mkdir()
    quantize(
        Recipe(method="rtn", bits=4, group_size=32, samples=2, seq_len=16, device="cpu", calibration=str(text)),
        make_model("llama"),
        out,
    )
    return out


class TestCommand:
    def test_plan_and_quantize_take_the_flags(
        self, packed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--samples", "2", "--seq-len", "16"]
        given += ["--calibration", str(text), "--device", "cpu"]
        source = [str(packed.parent), "--subfolder", "inner"]
        with pytest.raises(SystemExit):
            main(["quantize", *source, "--out", str(tmp_path / "out"), *given])
        assert "--dequantize-source" in capsys.readouterr().err
        flags = [*source, "--dequantize-source", *given]
        planned = CliRunner().invoke(app, ["plan", *flags, "--no-time", "--json"], catch_exceptions=False)
        assert planned.exit_code == 0, planned.output
        done = CliRunner().invoke(app, ["quantize", *flags, "--out", str(tmp_path / "out")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        # rounding the points of a grid to the same grid changes no code
        ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "out", packed))
        assert ours.keys() == theirs.keys()
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["source"].endswith("top/inner")

    def test_eval_takes_them_for_its_reference(self, packed: Path, llama: Path, text: Path) -> None:
        given = [
            "eval",
            str(packed),
            "--text",
            str(text),
            "--context",
            "16",
            "--windows",
            "2",
            "--device",
            "cpu",
            "--json",
        ]
        reference = ["--reference", str(packed.parent), "--subfolder", "inner", "--dequantize-source"]
        done = CliRunner().invoke(app, [*given, *reference], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["kl"] == pytest.approx(0, abs=1e-6)
        with pytest.raises(SwquantError, match="are of the original: give --reference"):
            CliRunner().invoke(app, [*given, "--subfolder", "inner"], catch_exceptions=False)


class TestHub:
    """The hub's client replaced by one that notes what it is asked for."""

    @pytest.fixture
    def asked(self, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        shutil.copytree(fp8, tmp_path / "snapshot" / "variants" / "small")
        shutil.copytree(fp8, tmp_path / "snapshot", dirs_exist_ok=True)

        def stand_in(name: str, **given: Any) -> str:
            calls.append({"name": name, **given})
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(hub, "snapshot_download", stand_in)
        return calls

    @pytest.mark.parametrize(
        ("source", "options", "revision"),
        [
            ("owner/name", None, None),
            ("owner/name@v2", None, "v2"),
            ("owner/name@refs/pr/1", None, "refs/pr/1"),
            ("owner/name", SourceOptions(revision="v2"), "v2"),
            ("owner/name@v2", SourceOptions(revision="v2"), "v2"),
        ],
    )
    def test_a_revision(
        self,
        asked: list[dict[str, Any]],
        source: str,
        options: SourceOptions | None,
        revision: str | None,
        tmp_path: Path,
    ) -> None:
        assert open_source(source, options).directory == tmp_path / "snapshot"
        assert asked[0]["name"] == "owner/name"
        assert asked[0]["revision"] == revision
        assert "*.safetensors" in asked[0]["allow_patterns"]
        assert "*/*" in asked[0]["ignore_patterns"]
        assert not any(pattern.endswith(".py") for pattern in asked[0]["allow_patterns"])

    def test_templates_with_names_and_trusted_code(self, asked: list[dict[str, Any]], tmp_path: Path) -> None:
        open_source("owner/name", SourceOptions(trust_remote_code=True))
        assert "*.py" in asked[0]["allow_patterns"]
        assert asked[1]["allow_patterns"] == ["additional_chat_templates/*.jinja"]
        assert asked[1]["revision"] == "snapshot"  # the folder's name, which is the commit's
        assert "ignore_patterns" not in asked[1]
        open_source("owner/name", SourceOptions(subfolder="variants/small"))
        assert asked[3]["allow_patterns"] == ["variants/small/additional_chat_templates/*.jinja"]

    def test_a_subfolder(self, asked: list[dict[str, Any]], tmp_path: Path) -> None:
        source = open_source("owner/name", SourceOptions(subfolder="variants/small"))
        assert source.directory == tmp_path / "snapshot" / "variants" / "small"
        assert "variants/small/*.safetensors" in asked[0]["allow_patterns"]
        assert all(pattern.startswith("variants/small/") for pattern in asked[0]["allow_patterns"])
        assert "variants/small/*/*" in asked[0]["ignore_patterns"]
        with pytest.raises(SwquantError, match="the hub model 'owner/name' has no folder 'other'"):
            open_source("owner/name", SourceOptions(subfolder="other"))

    @pytest.mark.parametrize(
        ("source", "options", "said"),
        [
            ("owner/name@", None, "ends in '@'; give a branch"),
            ("owner/name@v1", SourceOptions(revision="v2"), "names the revision 'v1' and --revision says 'v2'"),
            ("owner/name", SourceOptions(subfolder="../other"), "--subfolder is '../other', expected a folder inside"),
            ("owner/name", SourceOptions(subfolder="/etc"), "--subfolder is '/etc'"),
            ("owner/name", SourceOptions(subfolder="*"), r"--subfolder is '\*'"),
            ("owner/name", SourceOptions(subfolder=""), "--subfolder is ''"),
        ],
    )
    def test_refusals(self, asked: list[dict[str, Any]], source: str, options: SourceOptions | None, said: str) -> None:
        with pytest.raises(SwquantError, match=said):
            open_source(source, options)
        assert asked == []

    def test_a_directory_has_folders_and_no_revision(self, fp8: Path) -> None:
        with pytest.raises(SwquantError, match="is a directory and has no revision 'v1'; leave --revision out"):
            open_source(fp8, SourceOptions(revision="v1"))
        with pytest.raises(SwquantError, match="has no folder 'none'; check --subfolder"):
            open_source(fp8, SourceOptions(subfolder="none"))
        assert open_source(fp8.parent, SourceOptions(subfolder="model")).directory == fp8

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            (
                RevisionNotFoundError,
                "the hub model 'owner/name' has no revision 'v9'; give a branch, a tag or a commit",
            ),
            (
                GatedRepoError,
                "the hub model 'owner/name' is gated; accept its terms at https://huggingface.co/owner/name ",
            ),
        ],
    )
    def test_what_the_hub_refuses(self, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> str:
            raise kind.__new__(kind)

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        with pytest.raises(SwquantError, match=said):
            open_source("owner/name@v9")


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "auto-round", "fbgemm_fp8", "x\x1b[2J"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_other_methods_are_refused_by_name(llama: Path, tmp_path: Path, method: str, dequantize: bool) -> None:
    place = rewrite(llama, tmp_path / "m", dict, {"quant_method": method})
    with pytest.raises(SwquantError, match=r"is already quantized, by .*; give the original model$") as caught:
        open_source(place, SourceOptions(dequantize=dequantize))
    assert repr(method) in str(caught.value)
    assert str(caught.value).isprintable()
