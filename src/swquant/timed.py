"""What was chosen for a time, and what was changed while it ran, as run states and reports keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from swquant.units import span

_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

NOT_THE_SAME = "Two runs with a time need not end in the same bits: how far each gets is up to the machine."

AHEAD = 0.9
"""Of the time that is left: what more training has to fit into, so that a run is not back at less soon after."""

LATE = 1.02
"""Of the time that is left: what a run may seem to take before it does less, as measurements vary by some percent."""


@dataclass(frozen=True)
class Training:
    """How much is trained.

    Attributes:
        blocks: Epochs of Block-AP on each block; 0 is none.
        whole: Epochs of the end-to-end stage; 0 leaves it out.
    """

    blocks: _Count
    whole: _Count


@dataclass(frozen=True)
class Step:
    """A point that a time can buy.

    Attributes:
        samples: Least of the calibration.
        tokens: Most of a sample; ``None`` is as many as the recipe takes.
        training: What is trained.
    """

    samples: int
    tokens: int | None
    training: Training


PATH = tuple(
    Step(samples, tokens, Training(blocks, whole))
    for samples, tokens, blocks, whole in (
        (16, 512, 0, 0),
        (32, None, 0, 0),
        (64, None, 0, 0),
        (64, None, 0, 1),
        (64, None, 0, 2),
        (128, None, 0, 2),
        (128, None, 1, 2),
        (128, None, 2, 2),
        (128, None, 2, 3),
        (128, None, 2, 4),
        (256, None, 2, 4),
        (256, None, 3, 4),
        (256, None, 4, 4),
        (256, None, 4, 6),
        (256, None, 6, 6),
        (512, None, 6, 6),
        (512, None, 6, 8),
        (512, None, 8, 8),
        (512, None, 12, 8),
        (512, None, 16, 8),
    )
)
"""The points in the order in which they pay: samples, tokens of each, epochs on blocks, epochs end to end.

The demo model at 2 bits in groups of 64, 64 samples of 128 tokens, one seed; KL on three other kinds of text, and
seconds of the processor: GPTQ 0.246 in 19; an epoch on blocks 0.230 in 35; two epochs end to end 0.206 in 39, four
0.203 in 56, two on 128 samples 0.194 in 70; two on blocks and two end to end 0.201 in 66. So the end-to-end stage comes
first, then samples, then blocks; SmolLM2-135M says so too (``docs/experiments.md``).
"""


@dataclass(frozen=True)
class Costs:
    """What a run takes, part by part, in seconds.

    Attributes:
        before: Until the first block: samples.
        blocks: Of each block in turn: whatever is trained, and an epoch of its training.
        begun: Of the end-to-end stage whatever its epochs.
        epoch: One of its epochs.
        after: From there to the end: measuring, writing, reading again.
    """

    before: _Seconds
    blocks: tuple[tuple[_Seconds, _Seconds], ...]
    begun: _Seconds
    epoch: _Seconds
    after: _Seconds

    def block(self, index: int, epochs: int) -> float:
        """A block's."""
        fixed, epoch = self.blocks[index]
        return fixed + epochs * epoch

    def left(self, training: Training, done: int = 0) -> float:
        """After ``done`` blocks, to the end; from before the first, without :attr:`before`."""
        blocks = sum(self.block(index, training.blocks) for index in range(done, len(self.blocks)))
        stage = self.begun + training.whole * self.epoch if training.whole else 0.0
        return blocks + stage + self.after


@dataclass(frozen=True)
class Change:
    """What was decided while a run was at work.

    Attributes:
        block: Before which block, the number of blocks being the end-to-end stage.
        epoch: Epochs of that stage that were done.
        training: What is trained from there on.
        spent: Seconds that the run had taken.
        expected: Those that it would have taken without the change.
        pace: How many times as long as planned its last blocks took.
    """

    block: _Count
    epoch: _Count
    training: Training
    spent: _Seconds
    expected: _Seconds
    pace: _Seconds


@dataclass(frozen=True)
class Timed:
    """A run within a time.

    Attributes:
        asked: What a run has to ask for to go on with this, see :func:`swquant.estimate.curve.asked_of`.
        seconds: That it may take.
        spent: Those that it had taken when this was chosen: for the grids, where they were chosen too, and measuring.
        expected: Those that it was to take.
        settings: Keys of the recipe that were chosen, as files have them.
        samples: Calibration samples.
        tokens: Of each.
        training: What was to be trained.
        left_out: What more time would have brought, in words; empty where there is no more.
        costs: As they were measured before the run.
        changes: What was changed while it ran.
        taken: Seconds that it took; ``None`` until it ends.
    """

    asked: str
    seconds: _Seconds
    spent: _Seconds
    expected: _Seconds
    settings: Mapping[str, Any]
    samples: _Count
    tokens: _Count
    training: Training
    left_out: str
    costs: Costs
    changes: tuple[Change, ...] = ()
    taken: _Seconds | None = None

    @property
    def now(self) -> Training:
        """What is trained after all changes so far."""
        return self.changes[-1].training if self.changes else self.training

    @property
    def summary(self) -> str:
        """What was chosen, in a line."""
        more = f"; left out: {self.left_out}" if self.left_out else ""
        return (
            f"Within {span(self.seconds)}: {self.settings['method']} on {self.samples} samples of {self.tokens} "
            f"tokens, about {span(self.expected)}{more}"
        )

    @property
    def told(self) -> tuple[str, ...]:
        """All of it, a sentence each."""
        took = "" if self.taken is None else f", took {span(self.taken)}"
        return (f"{self.summary}{took}", *(told(one, len(self.costs.blocks)) for one in self.changes), NOT_THE_SAME)

    @staticmethod
    def from_mapping(values: Any) -> Timed:
        """From plain values; raises ``ValueError`` where they are none."""
        return _TIMED.validate_python(values)


def told(change: Change, blocks: int) -> str:
    """A change in a sentence."""
    training = change.training
    if change.block < blocks:
        place = f"From block {change.block + 1} on"
        what = f"{_epochs(training.blocks)} on each block, {_epochs(training.whole)} end to end"
    elif change.epoch:
        place, what = f"After epoch {change.epoch} end to end", f"{_epochs(training.whole)} in all"
    else:
        place = "After the last block"
        what = f"{_epochs(training.whole)} end to end" if training.whole else "nothing is trained end to end"
    pace = f"{change.pace:.2f} times as long as planned"
    return f"{place}: {what}, as blocks took {pace} and the run would have ended at {span(change.expected)}"


def fitting(
    costs: Costs, ladder: Sequence[Training], now: Training, left: float, done: int = 0, pace: float = 1.0
) -> Training:
    """What to train after ``done`` blocks where ``left`` seconds are left.

    Args:
        costs: Of the run.
        ladder: All there is to choose from, in the order in which it pays; the last that fits is taken.
        now: What is trained so far. It stays while it fits, unless more does with something to spare.
        left: Seconds.
        done: Blocks that are finished.
        pace: How many times as long as the costs say everything takes.
    """
    takes = {training: pace * costs.left(training, done) for training in (*ladder, now)}
    if takes[now] <= LATE * left:
        more = [one for one in ladder if takes[one] > takes[now] and takes[one] <= AHEAD * left]
        return more[-1] if more else now
    return next((one for one in reversed(ladder) if takes[one] <= left), ladder[0])


def _epochs(count: int) -> str:
    return f"{count} {'epoch' if count == 1 else 'epochs'}"


_TIMED = TypeAdapter(Timed)
