"""The main job from end to end, on tiny real checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swquant import Recipe, SwquantError, evaluate, load, quantize
from swquant.cli import main
from swquant.evaluation.models import load_model
from swquant.formats import read_quantized
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

MakeModel = Callable[..., Path]

KILLS = 4


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=2,
        group_size=32,
        calibration=str(text),
        samples=8,
        seq_len=32,
        epochs=2,
        evaluation_samples=8,
        device="cpu",
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt", "gemma3"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_transformers_loads_the_output_and_finds_the_reported_numbers(
    make_model: MakeModel,
    family: str,
    symmetric: bool,
    dtype: torch.dtype,
    exact: float,
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    """Readers round 3-bit weights to the scales' dtype: nothing is lost in float32, little in bfloat16."""
    source = make_model(family, 2, dtype)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(Path(recipe.calibration).read_text()[-4000:])
    recipe = replace(recipe, symmetric=symmetric, bits=3, evaluation=str(held_out))
    report = quantize(recipe, source, tmp_path / "out")
    measured = evaluate(tmp_path / "out", str(held_out), reference=source, context=32, windows=8, device="cpu")
    assert report.quality is not None
    assert report.quality.perplexity == pytest.approx(measured.perplexity, rel=exact)
    assert report.quality.perplexity_reference == pytest.approx(measured.reference_perplexity, rel=1e-5)
    assert report.quality.kl == pytest.approx(measured.kl, rel=10 * exact)
    assert report.quality.top1 == pytest.approx(measured.top1, abs=10 * exact)
    assert report.outputs[0].bytes < report.bytes_source


def test_plain_loading_of_a_symmetric_model(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(recipe, llama, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = model.generate(**tokenizer("the model", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 2
    assert "CompressedTensorsConfig" not in report.outputs[0].loading


def test_the_dequantized_output_is_the_same_model(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    packed = quantize(recipe, llama, tmp_path / "packed")
    plain = quantize(replace(recipe, format="dequantized"), llama, tmp_path / "plain")
    assert packed.quality == plain.quality
    assert not (json.loads((tmp_path / "plain" / "config.json").read_text())).get("quantization_config")
    one = evaluate(tmp_path / "plain", recipe.calibration, context=32, windows=4, device="cpu")
    other = evaluate(tmp_path / "packed", recipe.calibration, context=32, windows=4, device="cpu")
    assert one.perplexity == pytest.approx(other.perplexity, rel=1e-5)


def test_what_comes_along(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(recipe, llama, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "LICENSE.txt", "report.json"} <= names
    assert Recipe.load(tmp_path / "out" / "swquant.yaml").to_mapping() == report.recipe
    assert not (tmp_path / "out.swquant-work").exists()


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_a_rotated_model_is_loaded_with_the_reported_numbers(
    make_model: MakeModel, family: str, tied: bool, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model(family, 2, torch.bfloat16, tie_word_embeddings=tied)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(Path(recipe.calibration).read_text()[-4000:])
    recipe = replace(recipe, method="rotate + rtn", epochs=None, evaluation=str(held_out))
    report = quantize(recipe, source, tmp_path / "out")
    measured = evaluate(tmp_path / "out", str(held_out), reference=source, context=32, windows=8, device="cpu")
    assert report.quality is not None
    assert report.quality.perplexity == pytest.approx(measured.perplexity, rel=2e-3)
    assert report.quality.perplexity_reference == pytest.approx(measured.reference_perplexity, rel=1e-5)


def test_a_model_without_a_last_norm_is_read_as_transformers_reads_it(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    """The norm is still in the file, and nothing of the model."""
    source = make_model("opt", 1, fresh=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_remove_final_layer_norm": True}))
    recipe = replace(recipe, method="rtn", epochs=None, runtime="transformers")
    report = quantize(recipe, source, tmp_path / "out")
    assert report.outputs[0].verification["kl"] < 1e-6


@pytest.mark.parametrize("name", ["w2g64", pytest.param("w2g64-asym", marks=pytest.mark.slow)])
def test_the_recommended_recipe_lowers_what_rounding_lost(
    llama: Path, recipe: Recipe, tmp_path: Path, name: str
) -> None:
    shared = {"calibration": recipe.calibration, "samples": 8, "seq_len": 32, "evaluation_samples": 8, "device": "cpu"}
    best = quantize(Recipe.load(name).override(shared), llama, tmp_path / "out")
    plain = quantize(Recipe.load(name).override({**shared, "method": "rtn"}), llama, tmp_path / "rtn")
    assert best.quality is not None
    assert plain.quality is not None
    assert best.quality.kl < plain.quality.kl
    assert best.finish is not None
    assert [phase["phase"] for phase in best.blocks[0]["phases"]] == ["Gptq", "Weights+GridParams+NormWeights"]


def test_what_is_not_quantized_is_unchanged(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "out"))
    kept = before.keys() & after.keys()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_training_lowers_the_loss_of_every_block(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(replace(recipe, epochs=8), llama, tmp_path / "out")
    phases = [phase for block in report.blocks for phase in block["phases"]]
    assert len(phases) == 2
    assert all(phase["after"] < phase["before"] for phase in phases)
    assert all(len(phase["curve"]) == 8 for phase in phases)


def test_a_finished_output_is_returned_and_not_made_again(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    first = quantize(recipe, llama, tmp_path / "out")
    stamp = (tmp_path / "out" / "report.json").stat().st_mtime_ns
    assert quantize(recipe, llama, tmp_path / "out").to_json() == first.to_json()
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns == stamp


def test_a_run_killed_between_publishing_and_clearing_is_cleared(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("swquant.engine.run_state.RunState.clear", lambda self: None)
        first = quantize(recipe, llama, tmp_path / "out")
    assert (tmp_path / "out.swquant-work").exists()
    assert quantize(recipe, llama, tmp_path / "out").to_json() == first.to_json()
    assert not (tmp_path / "out.swquant-work").exists()


def test_an_output_of_another_recipe_is_left_alone(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "out")
    with pytest.raises(SwquantError, match="is in use"):
        quantize(replace(recipe, seed=1), llama, tmp_path / "out")


def test_samples_drawn_from_the_model_repeat(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, calibration="self", samples=4, evaluation_samples=2)
    one, other = (quantize(recipe, llama, tmp_path / name) for name in ("one", "other"))
    assert one.quality == other.quality
    assert one.quality.tokens == 2 * 31


def test_a_full_disk_is_noticed_before_the_work(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(SwquantError, match="GB are available"):
        quantize(recipe, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    """Processes are forked from one that has torch loaded, so that kills meet work and not imports."""
    source = make_model("llama", 4, torch.bfloat16)
    path = tmp_path / "recipe.yaml"
    path.write_text(replace(recipe, epochs=5).to_yaml())
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["swquant.run"])

    def start(name: str) -> Any:
        command = ["quantize", str(source), "--out", str(tmp_path / name), "--recipe", str(path)]
        process = processes.Process(target=main, args=(command,))
        process.start()
        return process

    def ended(name: str) -> int:
        process = start(name)
        process.join()
        return process.exitcode

    def require_whole(name: str) -> None:
        for file in ("model.safetensors", "config.json", "swquant.yaml"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        whole, found = (json.loads((tmp_path / one / "report.json").read_text()) for one in ("whole", name))
        assert whole["quality"] == found["quality"]

    assert ended("first") == 0
    began = time.monotonic()
    assert ended("whole") == 0
    took = time.monotonic() - began
    moments, inside = random.Random(7), 0
    for _ in range(KILLS):
        process = start("killed")
        process.join(moments.uniform(0.2, 1.0) * took)
        process.kill()
        process.join()
        if (tmp_path / "killed").exists():
            require_whole("killed")
        else:
            inside += (tmp_path / "killed.swquant-work").exists()
    assert inside
    assert ended("killed") == 0
    require_whole("killed")
    assert not (tmp_path / "killed.swquant-work").exists()


def test_a_run_stopped_behind_any_block_goes_on_to_the_same_bits(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("opt", 3)
    expected = quantize(recipe, source, tmp_path / "whole")

    class Stop:
        stage = begin = step = staticmethod(lambda *_: None)

        def block(self, index: int, report: object) -> None:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, source, tmp_path / "stopped", observer=Stop())
        assert not (tmp_path / "stopped").exists()
    resumed = quantize(recipe, source, tmp_path / "stopped")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other
    assert resumed.quality == expected.quality


def test_an_unfinished_run_of_another_recipe_is_kept(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    class Stop:
        stage = begin = step = staticmethod(lambda *_: None)

        def block(self, index: int, report: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, llama, tmp_path / "out", observer=Stop())
    with pytest.raises(SwquantError, match="unfinished run that differs in recipe"):
        quantize(replace(recipe, seed=5), llama, tmp_path / "out")
    assert quantize(recipe, llama, tmp_path / "out").quality is not None


def finer(symmetric: bool = True, bits: int = 4) -> dict[str, QuantSpec | None]:
    """A grid of their own for the matrices that runtimes fuse into one."""
    return dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj"), QuantSpec(bits, 32, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_on_two_grids_reads_back_to_the_same_codes_and_predictions(
    make_model: MakeModel, recipe: Recipe, symmetric: bool, tmp_path: Path
) -> None:
    """transformers loads several grids without ``dequantize=True``, and so no asymmetric ones."""
    source, grids = make_model("llama", 2, torch.float32), finer(symmetric)
    runtime = "transformers" if symmetric else None
    recipe = replace(recipe, symmetric=symmetric, format="compressed_tensors,dequantized", runtime=runtime)
    report = quantize(recipe, source, tmp_path / "out", grids=grids)
    packed, plain = tmp_path / "out" / "compressed_tensors", tmp_path / "out" / "dequantized"
    first = report.outputs[0]
    assert first.verification["weights"] == 14
    assert first.verification["reader"] is not None
    assert not symmetric or first.verification["kl"] < 1e-6
    assert ("swquant.load(path)" in first.loading) is not symmetric
    _, model = read_quantized(packed)
    weights = load_file(plain / "model.safetensors")
    found = {name: value for part in model.parts() for name, value in part.items() if isinstance(value, QTensor)}
    assert len(found) == 14
    for name, value in found.items():
        fine = "self_attn" in name and "o_proj" not in name
        assert value.spec == (grids["*.q_proj"] if fine else recipe.spec)
        assert len(value.codes.unique()) == 2**value.spec.bits
        assert torch.equal(value.dequantize(), weights[name])
    tokens = torch.arange(24).view(1, 24)
    others = [load(packed, device="cpu"), load_model(packed, torch.device("cpu"))]
    if symmetric:
        others.append(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(tokens).logits
        for other in others:
            assert torch.allclose(other(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_kept_is_the_source_s(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    source, grids = make_model("llama", 2, torch.float32), {"*.1.mlp.down_proj": None}
    report = quantize(replace(recipe, runtime="transformers"), source, tmp_path / "out", grids=grids)
    assert report.outputs[0].verification["weights"] == 13
    assert report.outputs[0].verification["kl"] < 1e-6
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("grids", "form", "said"),
    [
        (
            {"*.v_proj": QuantSpec(4, 32, True)},
            None,
            r"q_proj and .*v_proj have different grids \(w2g32, w4g32\), .*fuse",
        ),
        ({"*.up_proj": None}, None, r"gate_proj and .*up_proj have .* \(w2g32, kept\)"),
        ({"*.w_proj": QuantSpec(4, 32, True)}, None, r"no matrix is called '\*\.w_proj'; the nearest names: \*\.\w+"),
        (
            {"*.o_proj": QuantSpec(4, 128, True)},
            None,
            r"o_proj has 64 inputs, which the group size 128 does not divide",
        ),
        ({"*": None}, None, r"keeping '\*' leaves no matrix to quantize"),
        ({"model.layers.0.mlp.upproj": None}, None, r"the nearest names: model.layers.0.mlp.up_proj, "),
        ({"lm_hea*": QuantSpec(4, 32, True)}, None, r"the nearest names: \*\.down_proj, \*\.gate_proj, "),
    ],
)
def test_grids_that_cannot_be_are_refused_before_the_work(
    llama: Path, recipe: Recipe, tmp_path: Path, grids: dict[str, QuantSpec | None], form: str | None, said: str
) -> None:
    with pytest.raises(SwquantError, match=said):
        quantize(replace(recipe, format=form), llama, tmp_path / "out", grids=grids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("runtime", "grids", "said"),
    [
        ("transformers", finer(False), r"cannot load compressed_tensors on several grids \(w2g32, w4g32 asymmetric\)"),
        (
            "vllm",
            finer(False, 3),
            r"vllm cannot load --bits 3 .*: its .* the nearest that works is --bits 3 .*--symmetric",
        ),
        ("sglang", finer(bits=3), r"sglang cannot load .*--bits 3.* no kernel of it is known to compute 3-bit"),
    ],
)
def test_grids_that_the_runtime_does_not_load_are_refused_before_the_work(
    llama: Path, recipe: Recipe, tmp_path: Path, runtime: str, grids: dict[str, QuantSpec | None], said: str
) -> None:
    bits = 4 if runtime == "sglang" else 2
    with pytest.raises(SwquantError, match=said):
        quantize(replace(recipe, runtime=runtime, bits=bits), llama, tmp_path / "out", grids=grids)
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_of_an_output_has_its_grids_and_repeats_the_run(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe, grids = replace(recipe, method="rtn", epochs=None), finer() | {"*.0.*.o_proj": None}
    report = quantize(recipe, llama, tmp_path / "out", grids=grids)
    own = {"bits": 4, "group_size": 32, "symmetric": True, "grid": "uniform"}
    held = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["grids"]
    assert held == report.recipe["grids"] == {**dict.fromkeys(finer(), own), "*.0.*.o_proj": None}
    again = Recipe.load(tmp_path / "out" / "swquant.yaml")
    assert again.grids == grids
    assert again.digest() == report.recipe_hash != recipe.digest()
    assert quantize(again, llama, tmp_path / "out").to_json() == report.to_json()
    quantize(again, llama, tmp_path / "again")
    one, other = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("out", "again"))
    assert one == other
    assert "other grids: *.q_proj" in (tmp_path / "out" / "report.html").read_text()


def test_other_grids_of_a_recipe_are_over_its_own() -> None:
    written = "bits: 3\ngroup_size: channel\ngrids: {'*.v_proj': {bits: 4}, '*.o_proj': null, a: {grid: q2_k}}"
    recipe = Recipe.from_text(written, "it")
    grids = {"*.v_proj": QuantSpec(4, None, True), "*.o_proj": None, "a": QuantSpec.named("q2_k")}
    assert recipe.grids == grids
    assert Recipe.from_text(recipe.to_yaml(), "it") == recipe
    assert recipe.override({"seed": 1}).grids == grids
    assert "grids" not in Recipe().to_mapping()
    for given, said in (
        ("[1]", r"grids is \[1\]"),
        ("{a: 4}", "grids: a is 4, expected null or a mapping"),
        ("{a: {bit: 4}}", "grids: a has no key 'bit'"),
        ("{a: {bits: four}}", "grids: a: bits is 'four'"),
        ("{a: {bits: 5}}", "bits is 5, expected one of"),
        ("{a: {grid: q4_k, bits: 2}}", "the grid q4_k has 4 bits"),
        ("{1: {bits: 4}}", "grids"),
    ):
        with pytest.raises(SwquantError, match=said):
            Recipe.from_text(f"grids: {given}", "it")


def test_grids_are_a_part_of_what_a_run_depends_on(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    class Stop:
        stage = begin = step = staticmethod(lambda *_: None)

        def block(self, index: int, report: object) -> None:
            raise KeyboardInterrupt

    recipe, others = replace(recipe, method="rtn", epochs=None), [None, finer(False), finer(bits=3), {"*": None}]
    others[-1] = finer() | {"*.o_proj": None}
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, llama, tmp_path / "out", observer=Stop(), grids=finer())
    for other in others:
        with pytest.raises(SwquantError, match="unfinished run that differs in grids"):
            quantize(recipe, llama, tmp_path / "out", grids=other)
    resumed = quantize(recipe, llama, tmp_path / "out", grids=finer())
    expected = quantize(recipe, llama, tmp_path / "whole", grids=finer())
    one, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == whole
    assert resumed.quality == expected.quality
    for other in others:
        with pytest.raises(SwquantError, match="is in use"):
            quantize(recipe, llama, tmp_path / "out", grids=other)
