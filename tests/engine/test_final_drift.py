"""What the report says of each block after the training of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from swquant import Recipe, Report, quantize
from swquant.engine.drift import shift_of
from swquant.engine.final_drift import final_blocks
from swquant.formats import read_quantized
from swquant.html.page import report_page
from swquant.phases.scale_training import ScaleTraining
from swquant.quant.codes import code_entropy, share_at_ends
from swquant.sweep.trial import drift_of

from .stage import behind_the_last_block, calls_of

MakeModel = Callable[..., Path]
SHOWN = [7, 8, 9, 10, 11]
"""The validation sample of eight, and four to evaluate on."""


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=2,
        group_size=32,
        method="rtn + end_to_end(epochs=2, batch_size=2, learning_rate=0.01)",
        calibration=str(text),
        samples=8,
        seq_len=32,
        evaluation_samples=4,
        device="cpu",
    )


def outputs_of_blocks(model: torch.nn.Module, params: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """What each block of transformers' model puts out."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, out: found.append(out if isinstance(out, Tensor) else out[0])
        )
        for layer in model.get_submodule("model.layers")
    ]
    with torch.no_grad():
        functional_call(model, params, kwargs={"input_ids": tokens, "use_cache": False})
    for hook in hooks:
        hook.remove()
    return found


def test_it_compares_what_the_blocks_of_whole_models_put_out(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 3, torch.float32)
    work = ScaleTraining(1, 1, 0.01, norms=True, weights=True, weight_rate=0.01)
    model, job, run_state = behind_the_last_block(recipe, source, tmp_path / "work", work)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (value for theta in model.thetas for value in theta.values()):
            value += 0.3 * torch.randn(value.shape, generator=rng)
    tokens = run_state.tokens()["tokens"]
    found = final_blocks(job, run_state, model, calls_of(job, run_state))

    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    params = {
        f"{block.prefix}.{name}": value.detach()
        for index, block in enumerate(job.skeleton.blocks)
        for name, value in model.floats(index).items()
    }
    original, trained = (outputs_of_blocks(whole, values, tokens[SHOWN]) for values in ({}, params))
    assert len(found) == len(original) == 3
    for block, reference, outputs in zip(found, original, trained, strict=True):
        expected = shift_of(reference, outputs)
        assert asdict(block.shift) == pytest.approx(asdict(expected), rel=1e-3)
        assert block.shift.relative_error > 0.01


@pytest.mark.parametrize("method", ["rtn", "rotate + rtn"])
def test_a_training_that_changes_nothing_leaves_each_block_as_it_was_measured(
    llama: Path, recipe: Recipe, tmp_path: Path, method: str
) -> None:
    recipe = replace(recipe, method=f"{method} + end_to_end(epochs=1, learning_rate=2.0)")
    report = quantize(recipe, llama, tmp_path / "out")
    assert report.finish["kept_epoch"] == 0
    assert len(report.final_blocks) == len(report.measured_blocks) == 2
    for (_, measured), final in zip(report.measured_blocks, report.final_blocks, strict=True):
        assert asdict(final.shift) == pytest.approx(asdict(measured.after), rel=1e-3)
        assert final.codes == {}


def test_the_use_of_codes_is_that_of_the_written_ones(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    method = "rtn + end_to_end(epochs=3, batch_size=2, learning_rate=0.01, weights=True, weight_rate=0.03)"
    report = quantize(replace(recipe, method=method), llama, tmp_path / "out")
    parts = {name: value for part in read_quantized(tmp_path / "out")[1].parts() for name, value in part.items()}
    left = 0
    for (index, own), uses in zip(report.measured_blocks, report.code_uses, strict=True):
        assert uses.keys() == own.codes.keys()
        for name, use in uses.items():
            codes = parts[f"model.layers.{index}.{name}.weight"].codes
            assert use.entropy_after == pytest.approx(code_entropy(codes, 2), rel=1e-5)
            assert use.saturated_after == pytest.approx(share_at_ends(codes, 2), rel=1e-5)
            assert use.entropy_before == own.codes[name].entropy_before
            left += use.entropy_after != own.codes[name].entropy_after
    assert left > 0
    page = report_page(report)
    assert page.count('class="line final"') == 6 + 2 + 1, "charts of shifts and of codes, and the key"


def test_pages_and_tables_show_it_and_older_reports_do_without(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(recipe, llama, tmp_path / "out")
    errors = [block.shift.relative_error for block in report.final_blocks]
    assert drift_of(report)["final_relative_error"] == pytest.approx(sum(errors) / len(errors))
    page = report_page(report)
    assert page.count('class="line final"') == 6 + 1, "a chart for each number of a shift, and the key"
    assert "trained end to end, with what the blocks in front put out then" in page
    values = json.loads(report.to_json())
    del values["finish"]["blocks"]
    old = Report.from_json(json.dumps(values))
    assert old.final_blocks == ()
    assert drift_of(old) == {key: value for key, value in drift_of(report).items() if key.startswith("block_")}
    assert old.code_uses == report.code_uses == tuple(measured.codes for _, measured in report.measured_blocks)
    assert 'class="line final"' not in report_page(old)
    assert "before the end-to-end training" in report_page(old)


def test_a_model_that_was_not_trained_as_a_whole_has_none(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(replace(recipe, method="rtn"), llama, tmp_path / "out")
    assert report.final_blocks == ()
    assert len(report.measured_blocks) == 2
