"""Which cells `methods.py` runs: the methods at one budget, and the designs that ask one question each.

The budget is the number of samples that pass through a block in training, about `PASSES` for every method; with it go
each method's own optimizer, batch and rates. Searches (AWQ, GPTQ) take what they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PASSES = 400
ALIGNED_MSE = "0.9*mse + 0.1*sliced_wasserstein"
ALIGNED_L2 = "0.9*l2 + 0.1*sliced_wasserstein"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: The model's name on the command line.
        title: The method's name in tables.
        method: The recipe's method.
        loss: The recipe's loss; ``None`` is the method's own.
        bits: Of a weight.
        group_size: ``None`` is per channel.
        symmetric: The grid's kind.
        seed: The recipe's.
    """

    model: str
    title: str
    method: str
    loss: str | None
    bits: int
    group_size: int | None
    symmetric: bool
    seed: int = 0

    @property
    def label(self) -> str:
        """The grid in short."""
        group = f" g{self.group_size}" if self.group_size else " per channel"
        return f"W{self.bits}{group} {'symmetric' if self.symmetric else 'asymmetric'}"


SEARCHES = {"RTN": "rtn", "AWQ": "awq", "GPTQ": "gptq"}
TRAINED = {
    "OmniQuant": "omniquant(epochs=7)",
    "TesseraQ": "tesseraq(iterations=10)",
    "Block-AP": "block_ap(epochs=7)",
    "SignRound": "signround(steps=100, batch_size=4)",
    "NormTweaking": "norm_tweaking(epochs=7)",
    "EfficientQAT": "efficientqat",
}
SPECS = ((2, 64), (2, 128), (3, None), (4, 128))


def cells(
    models: tuple[str, ...],
    methods: dict[str, str],
    losses: tuple[str | None, ...] = (None,),
    specs: tuple[tuple[int, int | None], ...] = ((2, 64),),
    symmetric: tuple[bool, ...] = (False,),
    seeds: range = range(1),
) -> Iterator[Cell]:
    """Every combination."""
    for seed in seeds:
        for model in models:
            for bits, group_size in specs:
                for sym in symmetric:
                    for title, method in methods.items():
                        for loss in losses:
                            yield Cell(model, title, method, loss, bits, group_size, sym, seed)


DESIGNS: dict[str, tuple[Cell, ...]] = {}
