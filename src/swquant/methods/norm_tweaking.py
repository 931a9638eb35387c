"""NormTweaking: the norms' weights trained on the moments of the block's output channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from swquant.learnables.norm_weights import NormWeights
from swquant.losses.channel_moments import ChannelMoments
from swquant.methods.base import Part, Rate, Setting
from swquant.methods.gptq import GPTQ
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train


@dataclass(frozen=True)
class NormTweaking:
    """NormTweaking (Li et al., arXiv 2309.02784): ``gptq + (Train(NormWeights),)`` under `ChannelMoments`.

    One pass with Adam at a constant rate over the norms' weights and, where they have them, biases. The quantized
    weights stay as they are.

    Attributes:
        start: What quantizes the weights; ``None`` is GPTQ where no block-wise method stands before it.
        epochs: Passes over the calibration samples, 1 in the paper, which found more to hurt.
        batch_size: Samples per step, over which moments are taken.
        learning_rate: Of the norms; the paper searches it by grid, from 1e-5 on, which moves bfloat16 norms by nothing.
        augmented: Add the loss against the original block's output on the quantized model's hidden states.
    """

    start: Literal["gptq", "none"] | None = None
    epochs: Annotated[int, Field(ge=0)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 1
    learning_rate: Rate = 1e-3
    augmented: bool = False

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """GPTQ's parts where it is the start, and one training phase."""
        phase = Train(
            (NormWeights(self.learning_rate),),
            self.epochs,
            self.batch_size,
            self.augmented,
            loss=ChannelMoments(),
            optimizer=Optimizer("adam"),
        )
        own = Part("norm_tweaking", phase, decides=frozenset({"norms"}), trained=True)
        return (*(GPTQ().parts(setting) if setting.starts(self.start) else ()), own)
