"""End to end: the scales of all blocks together, trained against the original model's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.errors import SwquantError
from swquant.methods.base import Part, Rate, Setting, Subject
from swquant.phases.scale_training import WEIGHT_RATE, ScaleTraining

EPOCHS = 8
LEARNING_RATE = 1e-2
SUPER_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class EndToEnd:
    """EfficientQAT's second step (E2E-QP; Chen et al., arXiv 2407.11062), against the original model's predictions.

    It comes last: codes and zero points stay as the methods before it left them. With ``weights`` the codes are trained
    too, which is quantization-aware training with the original for a teacher (as in LLM-QAT, Liu et al., arXiv
    2305.17888, without its data and its quantized activations).

    Attributes:
        epochs: Passes over the calibration samples; ``None`` is 8, times the preset's effort.
        batch_size: Samples per step.
        learning_rate: AdamW's at the beginning, for the logarithm of a scale's magnitude; ``None`` is 1e-2, on K grids,
            where 256 weights share what is trained, 3e-3.
        norms: Train the weights of the blocks' norms too.
        weights: Train the codes too. It takes 16 bytes of the device's memory for each weight of the whole model.
        weight_rate: AdamW's at the beginning, for a weight in units of its scale; ``None`` is 1e-3, with ``weights``.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    learning_rate: Rate | None = None
    norms: bool = False
    weights: bool = False
    weight_rate: Rate | None = None

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One part, after the last block.

        Raises:
            SwquantError: Weights have a rate and are not to be trained.
        """
        if self.weight_rate is not None and not self.weights:
            raise SwquantError("end_to_end has a weight_rate and trains no weights: add weights=True, or leave it out")
        epochs = self.epochs if self.epochs is not None else setting.scaled(EPOCHS)
        usual = LEARNING_RATE if setting.spec.super_width is None else SUPER_LEARNING_RATE
        rate = self.learning_rate or usual
        moving = self.weight_rate or WEIGHT_RATE
        work = ScaleTraining(epochs, self.batch_size, rate, self.norms, self.weights, moving)
        decides: set[Subject] = {"scales", "norms"} if self.norms else {"scales"}
        if self.weights:
            decides.add("codes")
        return (Part("end_to_end", work, frozenset(decides), trained=True),)
