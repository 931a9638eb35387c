"""What to try next: rules on a report's numbers, each a function from the report to a sentence or ``None``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median

from swquant.grids.uniform import SCALE_BITS
from swquant.phases.base import PhaseReport
from swquant.phases.scale_training import LEARNED_BYTES
from swquant.recipe import SELF
from swquant.report import Report
from swquant.units import size

MUCH, SOME, LITTLE = 1.5, 1.05, 1.01
"""Perplexity over the original's: much, some, and next to nothing lost."""

RUINED = 5.0
"""Perplexity over the original's from which nobody has a use for the output."""

RISEN, FALLING = 1.02, 0.98
"""Validation loss of the last round over the least one; of the last over the one before it."""

LEARNED = 0.9
"""Training loss of the last round over the first one's where training has learned something since."""

STANDS_OUT = 3.0
"""A block's own part of the drift over the median block's."""

FEW_TOKENS = 4000

FINER = {"channel": 128, 128: 64, 64: 32}
"""The next smaller group."""

Rule = Callable[[Report], str | None]


def advise(report: Report) -> tuple[str, ...]:
    """The sentences of all rules that apply, the most promising first."""
    return tuple(said for said in (rule(report) for rule in RULES) if said is not None)


def ruined(report: Report) -> str | None:
    """Some outputs are no language models any more."""
    if _lost(report) < RUINED or report.quality is None:
        return None
    return (
        f"The output is ruined: its perplexity is {_lost(report):.3g} times the original's. Train it (leave --method "
        "out), or give it more bits."
    )


def nothing_trained(report: Report) -> str | None:
    """A method that only rounds or searches leaves most to be won."""
    if _trained(report) or report.finish is not None:
        return None
    return (
        f"Nothing was trained. Leave --method out: the recipe for {report.recipe['bits']} bits trains every block, "
        "which recovers most of what rounding loses."
    )


def end_to_end_missing(report: Report) -> str | None:
    """At few bits, scales trained on the predictions make up for errors that blocks cannot see."""
    if report.finish is not None or int(report.recipe["bits"]) > 3 or not _trained(report) or _lost(report) < LITTLE:
        return None
    return (
        "No scales were trained end to end. Add + end_to_end to --method: it trains all scales on the original's "
        "predictions, and only the samples' hidden states take more memory."
    )


def codes_stayed(report: Report) -> str | None:
    """After the scales, codes trained on the predictions recover more, where the memory is there."""
    recipe, moved = report.recipe, any(block.codes for block in report.final_blocks)
    if report.finish is None or moved or int(recipe["bits"]) > 3 or "grid" in recipe or _lost(report) < LITTLE:
        return None
    weights = sum(use.shape[0] * use.shape[1] for _, block in report.measured_blocks for use in block.codes.values())
    if not weights:
        return None
    return (
        "Scales were trained end to end and codes were not. With end_to_end(weights=True) they are, which holds "
        f"{LEARNED_BYTES} bytes for each weight on the device, {size(LEARNED_BYTES * weights)} in all, and wants many "
        "samples."
    )


def asymmetric(report: Report) -> str | None:
    """A zero point per group helps where there are few levels."""
    recipe = report.recipe
    if not recipe["symmetric"] or int(recipe["bits"]) > 3 or "grid" in recipe or _lost(report) < SOME:
        return None
    return (
        f"The grid is symmetric. Try --asymmetric where your runtime reads it: a zero point for each group costs "
        f"{recipe['bits']} bits per group and lets the few levels span what the group holds."
    )


def smaller_groups(report: Report) -> str | None:
    """Smaller groups cost scales and lose less."""
    recipe = report.recipe
    group = FINER.get(recipe["group_size"])
    if "grid" in recipe or group is None or _lost(report) < SOME:
        return None
    wider = 0 if recipe["group_size"] == "channel" else SCALE_BITS / recipe["group_size"]
    return (
        f"Try --group-size {group}: more scales follow the weights more closely and cost "
        f"{SCALE_BITS / group - wider:.3g} more bits per weight."
    )


def more_bits(report: Report) -> str | None:
    """Where much is lost in spite of training, bits are what is missing."""
    bits = int(report.recipe["bits"])
    if bits > 3 or "grid" in report.recipe or _lost(report) < MUCH or not _trained(report):
        return None
    return f"Perplexity is {_lost(report):.2f} times the original's. If the memory allows it, try --bits {bits + 1}."


def fewer_bits(report: Report) -> str | None:
    """Where nothing is lost, a smaller model may do."""
    bits = int(report.recipe["bits"])
    if report.quality is None or bits < 3 or "grid" in report.recipe or _lost(report) > LITTLE:
        return None
    fewer = 4 if bits == 8 else bits - 1
    return f"Next to nothing was lost. Try --bits {fewer}: the model may well be smaller."


def more_samples(report: Report) -> str | None:
    """A validation loss that rises while training goes on is overfitting."""
    phases = _phases(report)
    risen = [phase for phase in phases if _last(phase) > RISEN * min(filter(None, phase.curve), default=0.0)]
    if not phases or 2 * len(risen) < len(phases):
        return None
    return (
        f"The validation loss rose again in {len(risen)} of {len(phases)} trainings: they fit their samples more than "
        f"the model. Try --samples {2 * int(report.recipe['samples'])}."
    )


def samples_learned_by_heart(report: Report) -> str | None:
    """A training loss that falls without the validation loss is overfitting before it shows as a rise."""
    phases = [phase for phase in _phases(report) if phase.training]
    alone = [phase for phase in phases if _fell_alone(phase)]
    if not phases or 2 * len(alone) < len(phases) or more_samples(report) is not None:
        return None
    return (
        f"In {len(alone)} of {len(phases)} trainings the loss on the samples that train went on falling while that on "
        f"validation samples did not. Try --samples {2 * int(report.recipe['samples'])}."
    )


def more_epochs(report: Report) -> str | None:
    """A validation loss that still falls in the last round promises more."""
    phases = [phase for phase in _phases(report) if len(phase.curve) > 1]
    falling = [phase for phase in phases if 0 < _last(phase) < FALLING * (phase.curve[-2] or 0.0)]
    if not phases or 2 * len(falling) < len(phases):
        return None
    return (
        f"The validation loss was still falling in {len(falling)} of {len(phases)} trainings. "
        f"Try {'--preset default' if report.recipe['preset'] == 'fast' else 'more --epochs'}."
    )


def worst_block(report: Report) -> str | None:
    """One block that adds far more drift than the others is where to look."""
    drifts = [0.0, *(block.drift for block in report.block_reports)]
    added = [max(0.0, after - before) for before, after in pairwise(drifts)]
    if len(added) < 3 or max(added) <= STANDS_OUT * median(added):
        return None
    index = added.index(max(added))
    return (
        f"Block {index} adds the most drift, {drifts[index]:.3g} -> {drifts[index + 1]:.3g}. If the loss curves show "
        "that it is not done, train longer; if its weights or inputs have outliers, try rotate + first in --method."
    )


def not_finite(report: Report) -> str | None:
    """Losses that were not finite were caught, but the steps were too long."""
    count = sum(len(phase.events) for phase in _phases(report) if None in phase.curve)
    if not count:
        return None
    return f"A loss was not finite {count} times. Try smaller learning rates, which are options of the method."


def not_measured(report: Report) -> str | None:
    """Without evaluation there is nothing to compare."""
    if report.quality is not None:
        return None
    return "Nothing was measured. Give --evaluation-samples, or run swquant eval with --reference."


def flattering_text(report: Report) -> str | None:
    """Text that the calibration came from flatters."""
    if report.quality is None or report.recipe["evaluation"] is not None:
        return None
    drawn = report.recipe["calibration"] == SELF
    source = "text that the model wrote itself" if drawn else "text held out of the calibration's"
    return f"The numbers are of {source}, which flatters. Give --evaluation, or run swquant eval on other text."


def few_tokens(report: Report) -> str | None:
    """Few tokens make noisy numbers."""
    if report.quality is None or report.quality.tokens >= FEW_TOKENS:
        return None
    tokens = report.quality.tokens
    return f"Only {tokens} tokens were measured, so small differences are noise. Raise --evaluation-samples."


RULES: tuple[Rule, ...] = (
    ruined,
    nothing_trained,
    end_to_end_missing,
    codes_stayed,
    more_samples,
    samples_learned_by_heart,
    more_epochs,
    asymmetric,
    smaller_groups,
    more_bits,
    fewer_bits,
    worst_block,
    not_finite,
    not_measured,
    flattering_text,
    few_tokens,
)


def _lost(report: Report) -> float:
    """Perplexity over the original's; without a measurement, as if some had been lost."""
    quality = report.quality
    return SOME if quality is None else quality.perplexity / quality.perplexity_reference


def _phases(report: Report) -> list[PhaseReport]:
    """Every training, of blocks and end to end."""
    finish = report.finish_report
    phases = [phase for block in report.block_reports for phase in block.phases]
    return [phase for phase in (*phases, *([finish] if finish else [])) if phase.curve]


def _trained(report: Report) -> bool:
    return any(phase.curve for block in report.block_reports for phase in block.phases)


def _fell_alone(phase: PhaseReport) -> bool:
    before, after, first, last = phase.curve[0], phase.curve[-1], phase.training[0], phase.training[-1]
    if before is None or after is None or first is None or last is None:
        return False
    return last < LEARNED * first and after > FALLING * before


def _last(phase: PhaseReport) -> float:
    """The last round's validation loss; where it was not finite, 0, which neither rises nor falls."""
    return phase.curve[-1] or 0.0
