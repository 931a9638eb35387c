"""The time left, told by a scripted clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from swquant.engine.observer import Observer
from swquant.engine.pace import Pace, tail_of
from swquant.ui import Lines

BLOCKS, SAMPLES, VALIDATED, EPOCHS, HEAD = 12, 112, 16, 3, 2.5


@dataclass
class Clock:
    time: float = 100.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Script:
    """A run whose parts take what they take on a machine; a backward pass costs two forward passes."""

    clock: Clock
    watcher: Observer | Pace
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    told: list[tuple[float, float]] = field(default_factory=list)

    def take(self, seconds: float) -> None:
        self.clock.time += seconds * self.chance.uniform(0.9, 1.1)

    def note(self, pace: Pace) -> None:
        left = pace.left()
        if left is not None:
            self.told.append((self.clock.time, left))

    def run(self, pace: Pace, block: float, forward: float, finish: bool, done: int = 0) -> None:
        tail = tail_of(EPOCHS, SAMPLES, VALIDATED, BLOCKS, HEAD) if finish else 0.0
        self.watcher.begin(BLOCKS, done, tail)
        for index in range(done, BLOCKS):
            for step in range(20):
                self.take(block / 20)
                self.watcher.step(step + 1, 20)
                if index - done > 1:
                    self.note(pace)
            report = {"phases": [], "drift": 0.1, "seconds": block, "forward_seconds": forward}
            self.watcher.block(index, report)
            if index - done > 0:
                self.note(pace)
        for epoch in range(EPOCHS if finish else 0):
            for step in range(28):
                self.take(4 * (BLOCKS * (2 + 2) + 3 * HEAD) * forward)
                self.watcher.step(epoch * 28 + step + 1, EPOCHS * 28)
                self.note(pace)
            self.take(VALIDATED * (BLOCKS + 2 * HEAD) * forward)


@pytest.mark.parametrize("done", [0, 5])
@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(("block", "forward"), [(300.0, 0.2), (40.0, 0.2), (2000.0, 0.01)])
def test_it_is_right_within_a_fifth_after_two_blocks(done: int, finish: bool, block: float, forward: float) -> None:
    clock = Clock()
    pace = Pace(clock)
    script = Script(clock, pace)
    script.run(pace, block, forward, finish, done)
    whole = clock.time - script.told[0][0]
    assert len(script.told) > 50
    for when, left in script.told:
        true = clock.time - when
        assert left == pytest.approx(true, rel=0.2, abs=0.03 * whole)


def test_nothing_is_told_before_the_first_block() -> None:
    pace = Pace(Clock())
    pace.begin(4, 0, 0.0)
    pace.step(3, 10)
    assert pace.left() is None


def test_a_resumed_end_to_end_stage_tells_by_its_own_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin(4, 4, 1000.0)
    clock.time += 60
    pace.step(11, 40)
    assert pace.left() is None
    clock.time += 10
    pace.step(12, 40)
    assert pace.left() == pytest.approx(280)


def test_lines_tell_it_behind_blocks_and_epochs() -> None:
    console, clock = Console(record=True, quiet=True, width=200), Clock()
    lines = Lines(console, pace=Pace(clock))
    with console.capture() as captured:
        lines.console.quiet = False
        lines.begin(3, 0, 50.0)
        clock.time += 100
        lines.block(0, {"phases": [], "drift": 0.1, "seconds": 100.0, "forward_seconds": 1.0})
        clock.time += 100
        lines.block(1, {"phases": [], "drift": 0.1, "seconds": 100.0, "forward_seconds": 1.0})
        clock.time += 100
        lines.block(2, {"phases": [], "drift": 0.1, "seconds": 100.0, "forward_seconds": 1.0})
        for step in range(2):
            clock.time += 10
            lines.step(step + 1, 6)
        lines.stage("End to end, epoch 1/3: validation KL 0.2")
    ends = [line.rpartition("about ")[2] for line in captured.get().splitlines()]
    assert ends == ["4 min left", "2 min left", "50 s left", "40 s left"]
