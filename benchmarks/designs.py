"""Which cells `methods.py` runs: the methods at one budget, and the designs that ask one question each.

The budget is the number of samples that pass through a block in training, about the same for every method; with it go
each method's own optimizer, batch and rates. Searches (AWQ, GPTQ) take what they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
        samples: Calibration samples.
    """

    model: str
    title: str
    method: str
    loss: str | None
    bits: int
    group_size: int | None
    symmetric: bool
    seed: int
    samples: int

    @property
    def label(self) -> str:
        """The grid and the data in short."""
        group = f" g{self.group_size}" if self.group_size else " per channel"
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"W{self.bits}{group} {symmetry}, {self.samples} samples"


SEARCHES = {"RTN": "rtn", "AWQ": "awq", "GPTQ": "gptq"}
SMALL = {
    "OmniQuant": "omniquant(epochs=6)",
    "TesseraQ": "tesseraq(rounds=10, iterations=6)",
    "Block-AP": "block_ap(epochs=6)",
    "SignRound": "signround(steps=60, batch_size=4)",
}
"""About 250 passes over 48 samples."""

OTHERS = {
    "NormTweaking": "norm_tweaking(epochs=6)",
    "EfficientQAT": "efficientqat(epochs=4, scale_epochs=2)",
}
LARGE = {
    "OmniQuant": "omniquant(epochs=14)",
    "TesseraQ": "tesseraq(rounds=20, iterations=20)",
    "Block-AP": "block_ap(epochs=14)",
    "SignRound": "signround(steps=200, batch_size=8)",
    "EfficientQAT": "efficientqat(epochs=10, scale_epochs=4)",
}
"""About 1600 passes over 128 samples, what 200 steps of auto-round on batches of 8 take."""

BEST = {"best": "gptq + block_ap(epochs=10) + end_to_end(epochs=4)"}

TRIALS = {
    method: method
    for method in (
        "gptq(search=False)",
        "gptq(act_order=True)",
        "awq + gptq",
        "awq(clip=False) + gptq",
        "block_ap(epochs=4)",
        "block_ap(epochs=4, augmented=True)",
        "gptq + block_ap(epochs=4)",
        "gptq + norm_tweaking(learning_rate=1e-5)",
        "gptq + norm_tweaking",
        "rtn + end_to_end",
        "omniquant(epochs=8) + end_to_end",
        "rotate + rtn",
        "rotate + block_ap(epochs=4)",
    )
}


IDEAS = {
    method: method
    for method in (
        "efficientqat(epochs=6, scale_epochs=12)",
        "gptq + block_ap(epochs=6) + end_to_end(epochs=12)",
        "gptq + block_ap(epochs=6, norms=False) + end_to_end(epochs=12, norms=True)",
    )
}
"""Whether longer training end to end brings more than the recipe's."""


def cells(
    models: tuple[str, ...],
    methods: dict[str, str],
    losses: tuple[str | None, ...] = (None,),
    grids: tuple[tuple[int, int | None], ...] = ((2, 64),),
    symmetric: bool = False,
    seeds: range = range(1),
    samples: int = 48,
) -> Iterator[Cell]:
    """Every combination."""
    for seed in seeds:
        for model in models:
            for bits, group_size in grids:
                for title, method in methods.items():
                    for loss in losses:
                        yield Cell(model, title, method, loss, bits, group_size, symmetric, seed, samples)


DEMO, TWO_MORE = ("demo",), ("deep", "long")
FURTHER = ((2, 128), (3, None), (4, 128))
FIVE = range(5)
CONFIRMED = ("Block-AP", "SignRound")

DESIGNS: dict[str, tuple[Cell, ...]] = {
    "screen": (
        *cells(DEMO, SEARCHES),
        *cells(DEMO, SMALL, (None, ALIGNED_MSE)),
        *cells(DEMO, {"TesseraQ": SMALL["TesseraQ"]}, ("mse", ALIGNED_L2)),
        *cells(DEMO, OTHERS, (None, ALIGNED_MSE)),
        *cells(DEMO, {"NormTweaking": OTHERS["NormTweaking"]}, ("mse",)),
    ),
    "peers": tuple(cells(DEMO, {"SignRound": LARGE["SignRound"]} | BEST, seeds=FIVE, samples=128)),
    "models": (
        *cells(DEMO, {name: LARGE[name] for name in ("Block-AP", "EfficientQAT")}, samples=128),
        *cells(TWO_MORE, SEARCHES),
        *cells(TWO_MORE, SMALL | OTHERS | BEST),
        *cells(TWO_MORE, {name: SMALL[name] for name in CONFIRMED}, (ALIGNED_MSE,)),
        *cells(TWO_MORE, {name: SMALL[name] for name in CONFIRMED}, seeds=range(3)),
    ),
    "seeds": tuple(cells(("demo", "deep"), {"Block-AP": SMALL["Block-AP"]}, (None, ALIGNED_MSE), seeds=FIVE)),
    "aim": tuple(cells(TWO_MORE, {"EfficientQAT, longer": LARGE["EfficientQAT"]} | BEST, seeds=FIVE)),
    "grids": (
        *cells(DEMO, {name: SEARCHES[name] for name in ("RTN", "GPTQ")}, grids=FURTHER),
        *cells(DEMO, SMALL, grids=FURTHER),
    ),
    "trials": tuple(cells(DEMO, TRIALS, symmetric=True)),
    "ideas": tuple(cells(DEMO, IDEAS, samples=128)),
    "large": tuple(cells(DEMO, LARGE, samples=128)),
}
