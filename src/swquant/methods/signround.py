"""SignRound: rounding offsets and weight ranges by signed gradient descent; the method of AutoRound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.learnables.range_factors import RangeFactors
from swquant.learnables.rounding_offset import RoundingOffset
from swquant.losses.mse import Mse
from swquant.methods.base import Part, Rate, Setting
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train

STEPS = 200
ROUNDS = 10


@dataclass(frozen=True)
class SignRound:
    """SignRound (Cheng et al., arXiv 2309.05516): ``(Train(RangeFactors, RoundingOffset, optimizer=sign SGD),)``.

    Defaults are the paper's: 200 steps on 8 samples, a learning rate of one over the steps that falls linearly to zero,
    so that an offset can just get from 0 to a half.

    Attributes:
        steps: Steps in all, rounded up to ten equal rounds; ``None`` is 200 times the preset's effort.
        batch_size: Samples per step.
        learning_rate: Of the offsets; ``None`` is one over the steps.
        range_rate: Of the range factors; ``None`` is the same.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Rate | None = None
    range_rate: Rate | None = None

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One training phase."""
        asked = self.steps or setting.scaled(STEPS)
        rounds = min(ROUNDS, asked)
        steps = -(-asked // rounds)
        rate = 1 / (rounds * steps) if self.learning_rate is None else self.learning_rate
        phase = Train(
            (RangeFactors(rate if self.range_rate is None else self.range_rate), RoundingOffset(rate)),
            rounds,
            self.batch_size,
            loss=Mse(),
            optimizer=Optimizer("sign_sgd", "linear"),
            steps=steps,
        )
        own = Part("signround", phase, frozenset({"rounding", "clips"}), frozenset({"grid", "rounding"}), trained=True)
        return (own,)
