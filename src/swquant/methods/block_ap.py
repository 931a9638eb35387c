"""Block-AP: all of a block's weights, scales and zero points trained through the rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.errors import SwquantError
from swquant.learnables.base import Learnable
from swquant.learnables.grid_params import GridParams
from swquant.learnables.norm_weights import NormWeights
from swquant.learnables.weights import Weights
from swquant.methods.base import Part, Rate, Setting, Subject
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train

EPOCHS = 16
STEPS = 4096
FLOOR = 1 / 20
GRID_RATE = 3e-4
SUPER_GRID_RATE, INTEGER_RATE = 3e-5, 1e-3


@dataclass(frozen=True)
class BlockAP:
    """EfficientQAT's first step (Chen et al., arXiv 2407.11062): ``(Train(Weights, GridParams, NormWeights),)``.

    The published run takes 2 epochs over 4096 samples in batches of 2, AdamW without weight decay, its rates falling
    to a twentieth by a cosine. Here 16 epochs over the preset ``best``'s 512 samples see as many. Rates are in units of
    the grid's steps and for the published 4096 steps; shorter training takes them larger by ``4096 / steps``, up to 25.

    Attributes:
        epochs: Passes over the calibration samples; ``None`` is 16 times the preset's effort.
        batch_size: Samples per step.
        weight_rate: Learning rate of the weights, in codes.
        grid_rate: Of the scales, as a share of themselves, and of the zero points, in codes; ``None`` is 3e-4. On K
            grids of the super-blocks' factors, as a share of themselves; ``None`` is 3e-5.
        integer_rate: On K grids of the groups' scales and minima, in their codes; ``None`` is 1e-3.
        norm_rate: Of the norms' weights.
        norms: Train the norms' weights too.
        augmented: Add the loss against the original block's output on the quantized model's hidden states.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 2
    weight_rate: Rate = 7e-4
    grid_rate: Rate | None = None
    integer_rate: Rate | None = None
    norm_rate: Rate = 2e-5
    norms: bool = True
    augmented: bool = False

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One training phase.

        Raises:
            SwquantError: ``integer_rate`` is given and the grid has no super-blocks.
        """
        epochs = self.epochs if self.epochs is not None else setting.scaled(EPOCHS)
        learnables: tuple[Learnable, ...] = (Weights(self.weight_rate), self._grid(setting))
        decides: set[Subject] = {"weights", "grid"}
        if self.norms:
            learnables = (*learnables, NormWeights(self.norm_rate, biases=False))
            decides.add("norms")
        optimizer = Optimizer("adamw", "cosine", FLOOR, span=STEPS)
        phase = Train(learnables, epochs, self.batch_size, self.augmented, optimizer=optimizer)
        return (Part("block_ap", phase, frozenset(decides), frozenset({"rounding"}), trained=True),)

    def _grid(self, setting: Setting) -> Learnable:
        if setting.spec.super_width is not None:
            return GridParams(self.grid_rate or SUPER_GRID_RATE, self.integer_rate or INTEGER_RATE)
        if self.integer_rate is not None:
            raise SwquantError(
                f"integer_rate is of the integer scales of K grids, and the grid is {setting.spec.grid}: leave it out"
            )
        return GridParams(self.grid_rate or GRID_RATE)
