"""Each rule: numbers for which it speaks, and numbers for which it is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from swquant import Recipe, Report
from swquant.advice import RULES, advise
from swquant.report import Quality

PHASE = {"phase": "Weights", "before": 1.0, "after": 0.9, "curve": [0.95, 0.9], "kept_epoch": 2, "events": []}


def block(drift: float = 0.1, **phase: Any) -> dict[str, Any]:
    return {"phases": [PHASE | phase], "drift": drift, "seconds": 1.0}


def make(
    perplexity: float = 12.0, tokens: int = 50_000, blocks: Sequence[dict[str, Any]] | None = None, **recipe: Any
) -> Report:
    values = {"method": "block_ap", "evaluation": "other.txt", "samples": 128, **recipe}
    return Report(
        source="model",
        recipe=Recipe.from_mapping(values).to_mapping(),
        recipe_hash="",
        versions={},
        blocks=blocks if blocks is not None else [block(drift) for drift in (0.1, 0.2, 0.3)],
        quality=Quality(tokens, 10.0, perplexity, 0.1, 0.8),
        bits_per_weight=2.25,
        bytes_source=1,
        seconds=1.0,
        outputs=[],
    )


FLAT = [block(curve=[0.95, 0.94])] * 3
ROUNDED = [{"phases": [], "drift": 0.1, "seconds": 1.0}] * 3
FINISH = PHASE | {"curve": [0.95, 0.94], "seconds": 1.0}

SHIFT = dict.fromkeys(("mse", "relative_error", "cosine", "sliced_wasserstein", "mean_shift", "variance_shift"), 0.1)
USE = {
    "shape": [100, 1000],
    "bits": 225_000,
    **dict.fromkeys(("entropy_before", "entropy_after", "saturated_before", "saturated_after"), 0.1),
}
MEASURED = {"tokens": 9, "rms": 1.0, "before": SHIFT, "after": SHIFT, "slices": [], "codes": {"q": USE, "k": USE}}
MOVED = {"shift": SHIFT, "codes": {"q": {"entropy": 1.9, "saturated": 0.1}}}
SCALES = replace(make(blocks=[block() | {"measured": MEASURED}] * 3), finish=FINISH)

CASES = {
    "ruined": (make(51.0), make(49.0), "its perplexity is 5.1 times the original's"),
    "nothing_trained": (make(blocks=ROUNDED), make(), "Leave --method out"),
    "end_to_end_missing": (make(), replace(make(), finish=FINISH), "+ end_to_end"),
    "codes_stayed": (
        SCALES,
        replace(SCALES, finish=FINISH | {"blocks": [MOVED] * 3}),
        "9.60 MB in all",
    ),
    "asymmetric": (make(), make(symmetric=False), "--asymmetric"),
    "smaller_groups": (make(), make(group_size=32), "--group-size 32"),
    "more_bits": (make(18.0), make(12.0), "--bits 3"),
    "fewer_bits": (make(10.05, bits=4), make(11.0, bits=4), "--bits 3"),
    "more_samples": (make(blocks=[block(curve=[0.9, 0.95])] * 3), make(), "--samples 256"),
    "samples_learned_by_heart": (
        make(blocks=[block(training=[1.0, 0.8])] * 3 + [block(curve=[0.9, 0.9], training=[1.0, 0.8])] * 3),
        make(blocks=[block(training=[1.0, 0.8])] * 3 + [block(curve=[0.9, 0.9], training=[1.0, 0.95])] * 3),
        "--samples 256",
    ),
    "more_epochs": (make(), make(blocks=FLAT), "--epochs"),
    "worst_block": (make(blocks=[block(d) for d in (0.1, 0.11, 0.12, 0.9)]), make(), "Block 3"),
    "not_finite": (make(blocks=[block(curve=[None, 0.9], events=["lost"])] * 3), make(), "learning rates"),
    "not_measured": (replace(make(), quality=None), make(), "swquant eval"),
    "flattering_text": (make(evaluation=None), make(), "flatters"),
    "few_tokens": (make(tokens=100), make(), "100 tokens"),
}


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == set(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_speaks_and_is_silent(rule: Any) -> None:
    speaks, silent, words = CASES[rule.__name__]
    said = rule(speaks)
    assert words in said
    assert said.endswith(".")
    assert rule(silent) is None
    assert said in advise(speaks)


@pytest.mark.parametrize(("group", "finer", "cost"), [("channel", 128, "0.125"), (128, 64, "0.125"), (64, 32, "0.25")])
def test_what_smaller_groups_cost(group: int | str, finer: int, cost: str) -> None:
    (said,) = (text for text in advise(make(group_size=group)) if "--group-size" in text)
    assert f"--group-size {finer}" in said
    assert f"{cost} more bits" in said


def test_samples_are_advised_once() -> None:
    said = advise(make(blocks=[block(curve=[0.9, 0.95], training=[1.0, 0.5])] * 3))
    assert sum("--samples" in text for text in said) == 1


def test_what_a_k_grid_settles_is_not_advised() -> None:
    said = " ".join(advise(make(18.0, grid="q2_k")))
    assert not any(flag in said for flag in ("--bits", "--group-size", "--asymmetric"))


def test_a_loss_that_ends_not_finite_counts_neither_as_risen_nor_as_falling() -> None:
    said = " ".join(advise(make(blocks=[block(curve=[0.9, None], events=["lost"])] * 3)))
    assert "--samples" not in said
    assert "--epochs" not in said
