"""What was recovered, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from swquant import SwquantError
from swquant.evaluation.recovered import Contrast, recovered, student_quantile


@given(st.integers(1, 1000), st.sampled_from([0.75, 0.9, 0.95, 0.975, 0.995]))
def test_the_quantile_is_students(freedom: int, probability: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(t.ppf(probability, freedom), rel=1e-9)


def scores(seed: int, seeds: int, units: int, tasks: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(3, 1, (seeds, units)), rng.normal(2, 1, units)) for _ in range(tasks)]


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=40)
def test_the_baseline_recovers_nothing_and_the_original_all(seed: int, seeds: int, units: int, tasks: int) -> None:
    drawn = scores(seed, seeds, units, tasks)
    nothing = recovered([Contrast(without, without, full) for without, full in drawn], resamples=50)
    every = recovered([Contrast([full] * seeds, without, full) for without, full in drawn], resamples=50)
    assert nothing.value == pytest.approx(0, abs=1e-12)
    assert every.value == pytest.approx(1)
    for found, value in ((nothing, 0), (every, 1)):
        assert found.low is None or (found.low, found.high) == pytest.approx((value, value), abs=1e-6)


@given(st.integers(0, 2**32), st.floats(-2, 2), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=40)
def test_scale_and_origin_of_the_metric_do_not_matter(seed: int, share: float, scale: float, shift: float) -> None:
    ((without, full),) = scores(seed, 3, 30)
    with_ = without + share * (full - without)
    found = recovered(Contrast(with_, without, full), resamples=100)
    assert found.value == pytest.approx(share, abs=1e-9)
    other = recovered(Contrast(-scale * with_ + shift, -scale * without + shift, -scale * full + shift), resamples=100)
    assert (other.low is None) == (found.low is None)
    if found.low is not None:
        assert (found.low, found.high) == pytest.approx((share, share), abs=1e-6)
        assert (other.value, other.low, other.high) == pytest.approx((found.value, found.low, found.high), abs=1e-6)


def synthetic(rng: np.random.Generator, share: float, seeds: int, units: int, *, paired: bool) -> Contrast:
    """True means 2 and 3 nats; what is recovered differs from seed to seed and from window to window.

    A pair shares its seed's calibration, whose effect then falls out of the difference. One seed has no effect: the
    interval then speaks of the text alone.
    """
    full = 2 + rng.normal(0, 0.5, units)
    effects = [rng.normal(0, 0.1, (seeds, 1)) * (seeds > 1) for _ in range(2)]
    without = full + 1 + effects[0] + rng.normal(0, 0.2, units) + rng.normal(0, 0.1, (seeds, units))
    gain = share + rng.normal(0, 0.05, (seeds, 1)) * (seeds > 1) + rng.normal(0, 0.1, units)
    own = effects[0] if paired else effects[1]
    with_ = without - gain + own - effects[0] + rng.normal(0, 0.1, (seeds, units))
    return Contrast(with_, without, full)


@pytest.mark.parametrize(("seeds", "units", "paired"), [(5, 60, False), (3, 200, False), (5, 40, True), (1, 60, True)])
def test_the_interval_covers_what_is_true(seeds: int, units: int, paired: bool) -> None:
    """400 trials: 95 % within three standard errors, which are 1.1 points, or a little more."""
    rng = np.random.default_rng(3)
    share, trials, hits, wide = 0.2, 400, 0, 0.0
    for trial in range(trials):
        found = recovered(synthetic(rng, share, seeds, units, paired=paired), resamples=500, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= share <= found.high
        wide += (found.high - found.low) / trials
    assert 0.915 <= hits / trials <= 0.99
    assert wide < 0.75


def test_the_plain_bootstrap_would_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why deviations are widened: three seeds, and a text that says all."""
    monkeypatch.setattr("swquant.evaluation.recovered.student_quantile", lambda probability, freedom: 1.6)
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        found = recovered(synthetic(rng, 0.2, 3, 400, paired=False), resamples=500, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.2 <= found.high
    assert hits / 200 < 0.9


def test_more_units_than_fit_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    contrast = synthetic(np.random.default_rng(0), 0.3, 2, 50, paired=False)
    whole = recovered(contrast, resamples=40)
    monkeypatch.setattr("swquant.evaluation.recovered._AT_ONCE", 50 * 7)
    parts = recovered(contrast, resamples=40)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-9)
    assert recovered(contrast, resamples=40) == parts
    assert recovered(contrast, resamples=40, seed=1) != parts


def test_a_loss_that_may_be_nothing_bounds_nothing() -> None:
    rng = np.random.default_rng(0)
    found = recovered(Contrast(rng.normal(size=(2, 50)), rng.normal(size=(2, 50)), rng.normal(size=50)), resamples=200)
    assert found.value is not None
    assert (found.low, found.high) == (None, None)


def test_where_nothing_was_lost_there_is_no_share() -> None:
    found = recovered(Contrast([1.0, 2.0], [2.0, 2.0], [1.0, 3.0]))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert (found.with_, found.without, found.full) == (1.5, 2, 2)


def test_several_tasks_count_the_same() -> None:
    one = Contrast(np.full(10, 0.5), np.zeros(10), np.ones(10))
    other = Contrast(np.full(1000, 0.1), np.zeros(1000), np.ones(1000))
    found = recovered([one, other], resamples=50)
    assert found.value == pytest.approx(0.3)
    assert (found.units, found.seeds) == (1010, (1, 1))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (([1.0, 2], [1.0], [1.0]), "the same units"),
        (([], [], []), "the same units"),
        (([1.0], [1.0], [[1.0], [2.0]]), "the same units"),
        (([float("nan")], [1.0], [1.0]), "not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(values: tuple[list[float], ...], part: str) -> None:
    with pytest.raises(SwquantError, match=part):
        Contrast(*values)


def test_contrasts_of_other_seeds_are_refused() -> None:
    with pytest.raises(SwquantError, match="runs with and without"):
        recovered([Contrast([1.0], [0.0], [2.0]), Contrast([[1.0], [1.0]], [0.0], [2.0])])
