"""What a method may ask for behind the last block: training the committed scales end to end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleTraining:
    """Train the committed model's scales against the original's predictions; see `swquant.engine.end_to_end`.

    Attributes:
        epochs: Passes over the calibration samples.
        batch_size: Samples per step.
        learning_rate: AdamW's, for the logarithm of a scale's magnitude.
        norms: Train the weights of the blocks' norms too.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    norms: bool
