"""OmniQuant: learnable weight clipping and learnable equivalent transformation."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.families.base import Family
from swquant.learnables.base import Learnable
from swquant.learnables.equivalent_transform import EquivalentTransform
from swquant.learnables.weight_clipping import WeightClipping
from swquant.phases.base import Phase
from swquant.phases.train import Train
from swquant.quant.spec import QuantSpec

EPOCHS = 20
EPOCHS_AT_2_BITS = 40


@dataclass(frozen=True)
class OmniQuant:
    """OmniQuant (Shao et al., arXiv 2308.13137): ``(Train(EquivalentTransform, WeightClipping),)``.

    Defaults are those of the paper's weight-only runs: clipping for every family, the equivalent transformation for
    families whose norms have biases (OPT) and not for the LLaMA kind, 20 epochs or 40 at 2 bits, batches of one sample,
    AdamW without weight decay. The augmented loss is on at 2 bits; the paper's OPT scripts leave it off.

    Attributes:
        epochs: Passes over the calibration samples; ``None`` is 40 at 2 bits and 20 above, times the preset's effort.
        batch_size: Samples per step.
        transform: Learn the equivalent transformation; ``None`` decides by family.
        shift: Learn its shifts too where the block has biases.
        alpha: Exponent of the transformation's initial scales.
        augmented: Use the augmented loss; ``None`` is on at 2 bits.
        clipping_rate: Learning rate of the clipping logits.
        transform_rate: Learning rate of scales and shifts.
    """

    epochs: int | None = None
    batch_size: int = 1
    transform: bool | None = None
    shift: bool = True
    alpha: float = 0.5
    augmented: bool | None = None
    clipping_rate: float = 1e-2
    transform_rate: float = 5e-3

    def phases(self, spec: QuantSpec, family: Family, effort: float) -> tuple[Phase, ...]:
        """One training phase."""
        published = EPOCHS_AT_2_BITS if spec.bits == 2 else EPOCHS
        epochs = self.epochs if self.epochs is not None else max(1, round(published * effort))
        transform = self.transform if self.transform is not None else family.norm_biases
        learnables: tuple[Learnable, ...] = (WeightClipping(self.clipping_rate),)
        if transform:
            learnables = (EquivalentTransform(self.transform_rate, self.alpha, self.shift), *learnables)
        augmented = self.augmented if self.augmented is not None else spec.bits == 2
        return (Train(learnables, epochs, self.batch_size, augmented),)
