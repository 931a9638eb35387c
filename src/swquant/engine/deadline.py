"""A run that ends in time: how much is still trained is decided before each block and each epoch of the last stage.

Each decision stands in the run state before anything is done by it, and a run that goes on keeps it; so a run that was
stopped ends in the bits of one that was not and made the same decisions. What counts is the time in which the run was
at work: from its beginning to the last block or epoch that a stopped process committed, and from the beginning of the
process that goes on. Time in between, and what was lost of a block, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from swquant.engine.run_state import BEGAN, RunState
from swquant.phases.base import Phase
from swquant.phases.train import Train
from swquant.timed import LATE, PATH, Change, Timed, Training, fitting, told

RECENT = 4
"""Blocks whose pace counts: one alone varies, and a machine that other work has left is faster again."""

MOMENT = 1e-3
"""Least seconds that an epoch is taken to last."""

TIMED, WHOLE = "time", "whole"
"""Of what a run state notes: a :class:`swquant.timed.Timed`; seconds at which the end-to-end stage began, and at which
each of its epochs ended."""


@dataclass
class Timer:
    """Seconds that a run has been at work.

    Attributes:
        before: Those of earlier processes.
        now: A clock.
    """

    before: float = 0.0
    now: Callable[[], float] = time.monotonic
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    def __call__(self) -> float:
        """So far."""
        return self.before + self.now() - self._began


@dataclass
class Deadline:
    """Decides how much is trained; on rank 0 alone.

    Attributes:
        run_state: Where the run stands, and what was decided.
        timer: Tells its seconds.
        say: Hears of changes.
    """

    run_state: RunState
    timer: Timer
    say: Callable[[str], None]

    @property
    def timed(self) -> Timed:
        """All that was decided so far."""
        return Timed.from_mapping(self.run_state.notes[TIMED])

    def before_block(self, index: int) -> int:
        """Epochs on a block, from now on."""
        return self._decide(index, _ladder(self.timed)).blocks

    def before_whole(self) -> int:
        """Epochs of the end-to-end stage."""
        timed, notes = self.timed, self.run_state.notes
        most = PATH[-1].training.whole if timed.training.whole else 0
        ladder = [replace(timed.now, whole=epochs) for epochs in range(most + 1)]
        whole = self._decide(len(timed.costs.blocks), ladder).whole
        notes.setdefault(WHOLE, [self.timer()])
        return whole

    def after_epoch(self, done: int) -> int:
        """Epochs of the end-to-end stage in all, after ``done`` of them; the caller commits it."""
        timed, spent, ends = self.timed, self.timer(), self.run_state.notes[WHOLE]
        ends[done:] = [spent]  # a damaged state may have been let go of, and its epochs with it
        pace = self._pace(timed)
        first = min(1, done - 1)  # the first epoch alone has in it what the stage begins with
        taken = spent - ends[first] - (0 if first else pace * timed.costs.begun)
        epoch = max(taken / (done - first), MOMENT)
        ahead = spent + pace * timed.costs.after
        fit = done + max(0, int((timed.seconds - ahead) / epoch))
        if fit >= timed.now.whole:
            return timed.now.whole
        expected = ahead + epoch * (timed.now.whole - done)
        if expected <= timed.seconds * LATE:
            return timed.now.whole
        self._note(timed, len(timed.costs.blocks), done, replace(timed.now, whole=fit), spent, expected)
        return fit

    def _decide(self, index: int, ladder: list[Training]) -> Training:
        """What is trained from block number ``index`` on."""
        timed, spent, begun = self.timed, self.timer(), self.run_state.training is not None
        if begun or not index or any(change.block == index for change in timed.changes):
            return timed.now
        pace, left = self._pace(timed), timed.seconds - spent
        training = fitting(timed.costs, ladder, timed.now, left, index, pace)
        if training != timed.now:
            expected = spent + pace * timed.costs.left(timed.now, index)
            self._note(timed, index, 0, training, spent, expected)
            self.run_state.commit()
        return training

    def _note(self, timed: Timed, block: int, epoch: int, training: Training, spent: float, expected: float) -> None:
        change = Change(block, epoch, training, round(spent, 1), round(expected, 1), round(self._pace(timed), 3))
        self.run_state.notes[TIMED] = asdict(replace(timed, changes=(*timed.changes, change)))
        self.say(told(change, len(timed.costs.blocks)))

    def _pace(self, timed: Timed) -> float:
        """How many times as long as planned the last blocks took."""
        done = self.run_state.done
        if not done:
            return 1.0
        ends = [self.run_state.notes[BEGAN], *(report["ended"] for report in self.run_state.reports)]
        first = max(0, done - RECENT)
        planned = sum(timed.costs.block(index, _epochs_at(timed, index)) for index in range(first, done))
        return (ends[done] - ends[first]) / planned if planned else 1.0


def with_epochs(phases: tuple[Phase, ...], epochs: int) -> tuple[Phase, ...]:
    """Phases of which those that train take so many epochs."""
    return tuple(replace(phase, epochs=epochs) if isinstance(phase, Train) else phase for phase in phases)


def _epochs_at(timed: Timed, index: int) -> int:
    """Epochs that a finished block had."""
    made = [timed.training, *(change.training for change in timed.changes if change.block <= index)]
    return made[-1].blocks


def _ladder(timed: Timed) -> list[Training]:
    """What there is to choose from: nothing that the run has no stage for."""
    most = timed.training
    found = (replace(step.training, **_none(most)) for step in PATH)
    return list(dict.fromkeys(found))


def _none(most: Training) -> dict[str, int]:
    return {name: 0 for name, value in asdict(most).items() if not value}
