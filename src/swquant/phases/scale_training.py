"""What a method may ask for after the last block: training scales, and weights where asked, end to end."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT_RATE = 1e-3

LEARNED_BYTES = 4 * 4
"""Of each value that is learned: itself, gradient and two moments, in float32; a large best state is on the disk."""


@dataclass(frozen=True)
class ScaleTraining:
    """Train the committed model against the original's predictions; see `swquant.engine.end_to_end`.

    Attributes:
        epochs: Passes over the calibration samples.
        batch_size: Samples per step.
        learning_rate: AdamW's, for the logarithm of a scale's magnitude.
        norms: Train the weights of the blocks' norms too.
        weights: Train the codes too.
        weight_rate: AdamW's, for a weight in units of its scale.
        original: Whether the original's weights tell where within the cells of their codes weights begin; otherwise
            they begin in the middle.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    norms: bool = False
    weights: bool = False
    weight_rate: float = WEIGHT_RATE
    original: bool = True
