"""TesseraQ: progressive adaptive rounding and dequantization scale tuning, from AWQ's scales and clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from swquant.learnables.adaptive_rounding import AdaptiveRounding
from swquant.learnables.base import Learnable
from swquant.learnables.dequant_gain import DequantGain
from swquant.losses.l2 import L2
from swquant.methods.awq import AWQ
from swquant.methods.base import Part, Rate, Setting, Subject
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train

ROUNDS, ITERATIONS = 20, 250
ROUNDING: frozenset[Subject] = frozenset({"rounding"})


@dataclass(frozen=True)
class TesseraQ:
    """TesseraQ (Li and Panda, arXiv 2410.19103): ``awq + (Train(AdaptiveRounding, DequantGain),)``.

    Defaults are those of the authors' LLaMA configurations: 20 rounds of 250 steps on 4 samples, Adam at 1e-3 with its
    moments forgotten before every round. The last state is kept, since only that one is hard, unless the start
    has a smaller loss. Rates are for the published 5000 steps; shorter training takes them larger by as much, up to the
    limit of :class:`Optimizer`, for a logit has the same way to go.

    Attributes:
        start: Whose scales and clips it starts from; ``None`` is AWQ's where no block-wise method stands before it.
        rounds: Hardenings; the published schedule of 20 thresholds is resampled to other numbers.
        iterations: Steps per round; ``None`` is 250 times the preset's effort.
        batch_size: Samples per step.
        learning_rate: Of the rounding logits.
        gain: Learn the gain too.
        gain_rate: Its learning rate.
        augmented: Add the loss against the original block's output on the quantized model's hidden states.
    """

    start: Literal["awq", "none"] | None = None
    rounds: Annotated[int, Field(ge=1)] = ROUNDS
    iterations: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    learning_rate: Rate = 1e-3
    gain: bool = True
    gain_rate: Rate = 1e-3
    augmented: bool = False

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """AWQ's parts where it is the start, and one training phase."""
        learnables: tuple[Learnable, ...] = (AdaptiveRounding(self.learning_rate),)
        if self.gain:
            learnables = (*learnables, DequantGain(self.gain_rate))
        phase = Train(
            learnables,
            self.rounds,
            self.batch_size,
            self.augmented,
            loss=L2(),
            optimizer=Optimizer("adam", restart=True, span=ROUNDS * ITERATIONS),
            steps=self.iterations or setting.scaled(ITERATIONS),
            keep_best=False,
        )
        own = Part("tesseraq", phase, decides=ROUNDING, discards=ROUNDING, trained=True)
        return (*(AWQ().parts(setting) if setting.starts(self.start) else ()), own)
