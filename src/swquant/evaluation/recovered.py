"""How much of what quantization lost came back, with an interval.

``recovered = (metric_with - metric_without) / (metric_full - metric_without)``: 0 is the model quantized without the
thing in question, 1 the original. Any metric that is a mean over windows, tokens or items will do, whichever direction
is better; perplexity goes in as its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swquant.errors import SwquantError

RESAMPLES = 4000
LEVEL = 0.95
_AT_ONCE = 1 << 22
_LARGE = 1000
"""Degrees of freedom from which Student's quantile is the normal one for all that matters here."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Recovered:
    """A share of what was lost.

    Attributes:
        value: ``(with_ - without) / (full - without)``; ``None`` where exactly nothing was lost.
        low: Lower end of the interval; ``None`` where what was lost is not told from nothing, so that no share of it
            is excluded.
        high: Upper end.
        level: The interval's confidence.
        with_: The metric's mean with the thing in question.
        without: Its mean without.
        full: The original's.
        units: Windows or items that were resampled.
        seeds: Runs with, and runs without.
    """

    value: float | None
    low: float | None
    high: float | None
    level: float
    with_: float
    without: float
    full: float
    units: int
    seeds: tuple[int, int]


@dataclass(frozen=True, init=False)
class Contrast:
    """One metric's values on the same units: windows of a text, or items of a task.

    Args:
        with_: Of the models quantized with the thing in question, ``[seeds, units]`` or ``[units]``.
        without: Of those quantized without it; where there are as many, seed by seed the same.
        full: Of the original, ``[units]``.

    Raises:
        SwquantError: The numbers of units differ, there are none, or a value is not finite.
    """

    with_: Values
    without: Values
    full: Values

    def __init__(self, with_: ArrayLike, without: ArrayLike, full: ArrayLike) -> None:
        values = [np.atleast_2d(np.asarray(part, np.float64)) for part in (with_, without, full)]
        widths = [part.shape[1] for part in values]
        if any(part.ndim != 2 or not part.size for part in values) or len(set(widths)) > 1 or len(values[2]) > 1:
            shapes = ", ".join(str(part.shape) for part in values)
            raise SwquantError(f"scores of shapes {shapes}: expected [seeds, units] twice and [units], the same units")
        if not all(np.isfinite(part).all() for part in values):
            raise SwquantError("a score is not finite, so nothing can be said of what was recovered")
        for name, part in zip(("with_", "without", "full"), values, strict=True):
            object.__setattr__(self, name, part)


def recovered(
    contrast: Contrast | Sequence[Contrast], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Recovered:
    """The share of what was lost that was recovered, with a bootstrap interval.

    Units are drawn with replacement, the same for all models, and so are seeds; in pairs where both sides have as
    many. The drawn means' deviations are widened by ``t / z * sqrt(n / (n - 1))``, ``t`` and ``z`` being the quantiles
    of Student with ``n - 1`` degrees of freedom and of the normal distribution, since the plain bootstrap's interval is
    too narrow for a few seeds (the expanded percentile interval of T. Hesterberg, arXiv 1411.5279). With one seed, the
    interval speaks of the text alone.

    Args:
        contrast: The scores; several are averaged, each counting the same, such as the accuracies of several tasks.
        resamples: How many times to draw.
        level: The interval's confidence.
        seed: Of the draws.

    Raises:
        SwquantError: The contrasts' seeds differ.
    """
    parts = [contrast] if isinstance(contrast, Contrast) else list(contrast)
    seeds = {(len(part.with_), len(part.without)) for part in parts}
    if len(seeds) != 1:
        raise SwquantError(f"the contrasts have {sorted(seeds)} runs with and without; expected the same of all")
    (counts,) = seeds
    sides = ([part.with_ for part in parts], [part.without for part in parts], [part.full for part in parts])
    with_, without, full = (float(np.mean([values.mean() for values in side])) for side in sides)
    units = sum(part.full.size for part in parts)
    if full == without:
        return Recovered(None, None, None, level, with_, without, full, units, counts)
    gains, losses = _resampled(parts, counts, resamples, level, np.random.default_rng(seed))
    tails = ((1 - level) / 2, (1 + level) / 2)
    ends = np.quantile(losses, tails)
    low, high = (None, None) if ends[0] <= 0 <= ends[1] else map(float, np.quantile(gains / losses, tails))
    value = (with_ - without) / (full - without)
    return Recovered(value, low, high, level, with_, without, full, units, counts)


def _resampled(
    parts: Sequence[Contrast], counts: tuple[int, int], resamples: int, level: float, rng: np.random.Generator
) -> tuple[Values, Values]:
    """``metric_with - metric_without`` and ``metric_full - metric_without`` of each draw, ``[resamples]``."""
    seeds_with = _weights(rng, counts[0], resamples, level)
    seeds_without = seeds_with if counts[0] == counts[1] else _weights(rng, counts[1], resamples, level)
    gains, losses = np.zeros(resamples), np.zeros(resamples)
    for part in parts:
        units = part.full.size
        rows = max(1, _AT_ONCE // units)
        for first in range(0, resamples, rows):
            drawn = slice(first, min(first + rows, resamples))
            weights = _weights(rng, units, drawn.stop - first, level)
            without = (weights @ part.without.T * seeds_without[drawn]).sum(1)
            gains[drawn] += (weights @ part.with_.T * seeds_with[drawn]).sum(1) - without
            losses[drawn] += weights @ part.full[0] - without
    return gains / len(parts), losses / len(parts)


def _weights(rng: np.random.Generator, count: int, resamples: int, level: float) -> Values:
    """Weights of a mean over ``count`` things drawn with replacement, widened; ``[resamples, count]``."""
    if count == 1:
        return np.ones((resamples, 1))
    drawn = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    tail = (1 + level) / 2
    widening = student_quantile(tail, count - 1) / NormalDist().inv_cdf(tail) * math.sqrt(count / (count - 1))
    return 1 / count + widening * (drawn - 1 / count)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution for a probability of 1/2 or more.

    Bisection on the finite series for ``P(|T| < t)`` (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if freedom > _LARGE:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """``P(|T| < sqrt(freedom) * tan(angle))``."""
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2 == 0:
        term = total = 1.0
        for step in range(2, freedom, 2):
            term *= cosine**2 * (step - 1) / step
            total += term
        return sine * total
    term, total = cosine, cosine if freedom > 1 else 0.0
    for step in range(3, freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total)
