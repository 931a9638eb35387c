"""What each block's report says of its outputs and codes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swquant import Recipe, Report, quantize, sliced_wasserstein_loss
from swquant.engine.drift import BINS, DIRECTIONS, TOKENS, measured_samples, outputs_of
from swquant.engine.memory import peak_bytes
from swquant.losses.transport import gaussian_directions
from swquant.report import Measured
from swquant.seeds import generator

TARGET = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def report(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    recipe = Recipe(
        group_size=32,
        symmetric=False,
        calibration=str(text),
        samples=8,
        seq_len=32,
        epochs=4,
        evaluation_samples=4,
        device="cpu",
    )
    return quantize(recipe, llama, tmp_path_factory.mktemp("drift") / "out")


def measured(report: Report) -> list[Measured]:
    found = [block.measured for block in report.block_reports]
    return [value for value in found if value is not None]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (TARGET.clone(), (0, 0, 1, 0, 0, 0)),
        (2 * TARGET, (float(TARGET.square().mean()), 1, 1, None, None, 3)),
        (-TARGET, (None, 4, -1, None, None, 0)),
        (TARGET + 3, (9, None, None, None, 3 * 4 / float(TARGET.flatten(0, 1).var(0, correction=0).sum().sqrt()), 0)),
    ],
)
def test_closed_forms(outputs: Tensor, expected: tuple[float | None, ...]) -> None:
    _, before, after, _ = outputs_of(TARGET, TARGET, outputs)
    for value, known in zip(asdict(after).values(), expected, strict=True):
        assert known is None or value == pytest.approx(known, rel=1e-4, abs=1e-6)
    assert before.mse == 0


def test_the_sliced_wasserstein_distance_is_that_of_the_loss() -> None:
    _, before, after, slices = outputs_of(TARGET, TARGET + NOISE, TARGET + 0.1 * NOISE)
    directions = gaussian_directions(16, DIRECTIONS, generator(0, "drift"), like=TARGET)
    for shift, factor in ((before, 1), (after, 0.1)):
        expected = sliced_wasserstein_loss(TARGET + factor * NOISE, TARGET, directions=directions)
        assert shift.sliced_wasserstein == pytest.approx(float(expected), rel=1e-4)
    assert before.sliced_wasserstein > after.sliced_wasserstein
    worst = directions[:, [slices[-1].direction]]
    alone = sliced_wasserstein_loss(TARGET + 0.1 * NOISE, TARGET, directions=worst)
    assert slices[-1].distance_after == pytest.approx(float(alone), rel=1e-4)
    assert all(slices[-1].distance_after >= other.distance_after for other in slices)


def test_bins_hold_nearly_every_token_and_are_those_of_the_projections() -> None:
    _, _, _, slices = outputs_of(TARGET, TARGET + NOISE, TARGET + 0.1 * NOISE)
    directions = gaussian_directions(16, DIRECTIONS, generator(0, "drift"), like=TARGET)
    for found in slices:
        values = (TARGET @ directions)[..., found.direction].flatten()
        inside = int(((values >= found.low) & (values <= found.high)).sum())
        for counts in (found.original, found.before, found.after):
            assert len(counts) == BINS
        assert abs(sum(found.original) - inside) <= 1
        assert inside >= 0.99 * len(values)


def test_outputs_that_are_all_the_same_have_distributions_too() -> None:
    zeros = torch.zeros(1, 8, 4)
    _, _, after, slices = outputs_of(zeros, zeros, zeros)
    assert set(asdict(after).values()) == {0}
    assert all(sum(found.original) == 8 for found in slices)


def test_outputs_that_are_not_finite_have_no_distributions() -> None:
    broken = TARGET.clone()
    broken[0, 0, 0] = torch.inf
    rms, _, after, slices = outputs_of(TARGET, TARGET, broken)
    assert slices == ()
    assert after.mse == torch.inf
    assert rms == pytest.approx(1, rel=0.1)


@given(
    validation=st.lists(st.integers(0, 99), max_size=9, unique=True),
    evaluation=st.lists(st.integers(100, 199), max_size=9, unique=True),
    tokens=st.integers(1, 4000),
)
def test_samples_are_bounded_and_of_both_kinds(validation: list[int], evaluation: list[int], tokens: int) -> None:
    chosen = measured_samples(validation, evaluation, tokens)
    assert len(chosen) == min(len(validation) + len(evaluation), max(1, TOKENS // tokens))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= {*validation, *evaluation}
    if validation and evaluation and chosen:
        assert chosen[-1] >= 100
        assert len(chosen) < 2 or chosen[0] < 100


def test_training_brings_outputs_nearer_and_the_report_says_so(report: Report) -> None:
    blocks = measured(report)
    assert len(blocks) == 2
    for block in blocks:
        assert block.tokens == 5 * 32, "one validation sample and four to evaluate"
        assert block.after.relative_error < block.before.relative_error
        assert -1 <= block.after.cosine <= 1
        assert len(block.codes) == 7
        for use in block.codes.values():
            assert 0 < use.entropy_after <= 2
            assert 0 < use.saturated_after < 1
            assert use.bits == use.shape[0] * use.shape[1] * (2 + (16 + 2) / 32)
    drifts = [block.drift for block in report.block_reports]
    assert drifts == pytest.approx([block.after.relative_error for block in blocks], rel=0.5)


def test_it_repeats_bit_for_bit_and_survives_json(report: Report, llama: Path, tmp_path: Path) -> None:
    again = quantize(Recipe.from_mapping(dict(report.recipe)), llama, tmp_path / "out")
    assert measured(again) == measured(report)
    assert measured(Report.from_json(report.to_json())) == measured(report)
    assert json.loads(report.to_json())["blocks"][0]["measured"]["slices"][0]["low"] < 0


def test_a_method_that_only_rounds_changes_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", calibration=str(text), samples=2, seq_len=32, evaluation_samples=0, device="cpu")
    for block in measured(quantize(recipe, llama, tmp_path / "out")):
        assert block.before == block.after
        assert block.tokens == 32


def test_numbers_in_a_list_share_a_line(report: Report) -> None:
    lines = report.to_json().splitlines()
    assert any(line.count(",") > BINS - 2 for line in lines)
    assert len(lines) < 1000
    assert json.loads(report.to_json())["recipe"] == report.recipe


def test_reports_of_older_versions_are_read(report: Report) -> None:
    blocks = [{key: block[key] for key in ("phases", "drift", "seconds")} for block in report.blocks]
    old = Report.from_json(json.dumps(json.loads(report.to_json()) | {"blocks": blocks}))
    assert [block.measured for block in old.block_reports] == [None, None]


def test_memory_is_a_plausible_number_of_bytes(report: Report) -> None:
    assert 2**26 < peak_bytes() < 2**40
    assert all(block.peak_bytes and block.peak_bytes <= peak_bytes() for block in report.block_reports)
