"""OmniQuant: learnable weight clipping and learnable equivalent transformation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.learnables.base import Learnable
from swquant.learnables.equivalent_transform import EquivalentTransform
from swquant.learnables.weight_clipping import WeightClipping
from swquant.methods.base import Part, Rate, Setting, Subject
from swquant.phases.train import Train

EPOCHS = 20
EPOCHS_AT_2_BITS = 40
REBUILT: frozenset[Subject] = frozenset({"grid", "rounding", "weights"})


@dataclass(frozen=True)
class OmniQuant:
    """OmniQuant (Shao et al., arXiv 2308.13137): ``(Train(EquivalentTransform, WeightClipping),)``.

    Defaults are those of the paper's weight-only runs: clipping for every family, the equivalent transformation for
    families whose norms have biases (OPT) and not for the LLaMA kind, 20 epochs or 40 at 2 bits, batches of one sample,
    AdamW without weight decay. The augmented loss is on at 2 bits; the paper's OPT scripts leave it off.

    Attributes:
        epochs: Passes over the calibration samples; ``None`` is 40 at 2 bits and 20 above, times the preset's effort.
        batch_size: Samples per step.
        transform: Learn the equivalent transformation; ``None`` does where norms have biases.
        shift: Learn its shifts too where the block has biases.
        alpha: Exponent of the transformation's initial scales.
        augmented: Use the augmented loss; ``None`` is on at 2 bits.
        clipping_rate: Learning rate of the clipping logits.
        transform_rate: Learning rate of scales and shifts.
    """

    epochs: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    transform: bool | None = None
    shift: bool = True
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    augmented: bool | None = None
    clipping_rate: Rate = 1e-2
    transform_rate: Rate = 5e-3

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One training phase."""
        at_2_bits = setting.spec.bits == 2
        epochs = self.epochs if self.epochs is not None else setting.scaled(EPOCHS_AT_2_BITS if at_2_bits else EPOCHS)
        transform = self.transform if self.transform is not None else setting.norm_biases
        learnables: tuple[Learnable, ...] = (WeightClipping(self.clipping_rate),)
        decides: set[Subject] = {"clips"}
        if transform:
            moves = EquivalentTransform(self.transform_rate, alpha=self.alpha, shift=self.shift)
            learnables = (moves, *learnables)
            decides.add("equivalence")
        augmented = self.augmented if self.augmented is not None else at_2_bits
        phase = Train(learnables, epochs, self.batch_size, augmented)
        return (Part("omniquant", phase, frozenset(decides), discards=REBUILT, trained=True),)
