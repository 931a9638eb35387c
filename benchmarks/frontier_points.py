"""The points that ``frontier.py`` measures: each side's settings, and the grids they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from swquant.quant.spec import QuantSpec

GRIDS: Mapping[str, QuantSpec] = {
    "w2g64": QuantSpec(2, 64, True),
    "w3g64": QuantSpec(3, 64, True),
    "w2g64-asym": QuantSpec(2, 64, False),
    "w3": QuantSpec(3, None, True),
}


@dataclass(frozen=True)
class Point:
    """A side with its settings.

    Attributes:
        side: ``swquant``, or a peer.
        settings: Of a recipe, or of the peer's own interface.
        symmetric: The only symmetry that it is for; ``None`` is both.
        ordered: Whether weights that share a scale lie beside each other, so that its grid can be checked.
    """

    side: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    symmetric: bool | None = None
    ordered: bool = True


def _ours(method: str) -> Point:
    return Point("swquant", {"method": method})


def _auto_round(**settings: Any) -> Point:
    return Point("auto-round", settings)


def _gptqmodel(**settings: Any) -> Point:
    return Point("gptqmodel", settings, ordered=not settings.get("desc_act", False))


def _llm_compressor(modifier: str = "GPTQ", **settings: Any) -> Point:
    return Point("llm-compressor", {"modifier": modifier, **settings})


START = "gptq + block_ap(epochs={})"
POINTS: Mapping[str, Point] = {
    # Without training, the quickest first.
    "rtn": _ours("rtn"),
    "rtn(search=True)": _ours("rtn(search=True)"),
    "auto-round, rtn": _auto_round(iters=0),
    "auto-round, rtn, neuqi": _auto_round(iters=0, enable_neuqi=True),
    "gptq": _ours("gptq"),
    "llm-compressor, GPTQ": _llm_compressor(),
    "llm-compressor, GPTQ, mse": _llm_compressor(weights={"observer": "memoryless_mse"}),
    "llm-compressor, GPTQ, imatrix": _llm_compressor(weights={"observer": "imatrix_mse"}),
    "gptqmodel, GPTQ": _gptqmodel(),
    "gptqmodel, GPTQ, mse": _gptqmodel(mse=2.4),
    "gptqmodel, GPTQ, mse, act-order": _gptqmodel(mse=2.4, desc_act=True),
    "gptqmodel, GPTAQ, mse": _gptqmodel(mse=2.4, gptaq={"alpha": 0.25}),
    "gptqmodel, FOEM, mse": _gptqmodel(mse=2.4, foem={"alpha": 0.0, "beta": 0.2}),
    "gptqmodel, FOEM + GPTAQ, mse": _gptqmodel(mse=2.4, foem={"alpha": 0.25, "beta": 0.2}),
    # Trained.
    "fast": Point("swquant", {"preset": "fast"}),
    "auto-round, light": _auto_round(iters=50, lr=5e-3),
    "gptq + block_ap(epochs=1)": _ours(START.format(1)),
    "gptq + end_to_end(epochs=2)": _ours("gptq + end_to_end(epochs=2)"),
    "gptq + end_to_end(epochs=8)": _ours("gptq + end_to_end(epochs=8)"),
    "gptq + end_to_end(epochs=4, weights=True)": _ours("gptq + end_to_end(epochs=4, weights=True)"),
    "fast + end_to_end(epochs=4)": _ours(f"{START.format(4)} + end_to_end(epochs=4)"),
    "fast + end_to_end(epochs=4, weights=True)": _ours(f"{START.format(4)} + end_to_end(epochs=4, weights=True)"),
    "auto-round": _auto_round(),
    "auto-round, alg_ext": replace(_auto_round(enable_alg_ext=True), symmetric=True),
    "auto-round, neuqi": _auto_round(enable_neuqi=True),
    "llm-compressor, AutoRound": _llm_compressor("AutoRound"),
    "default": Point("swquant", {"preset": "default"}),
    "best of auto-round": _auto_round(iters=1000),
    "best of auto-round, alg_ext": replace(_auto_round(iters=1000, enable_alg_ext=True), symmetric=True),
}
"""By their names in tables, in the order in which they are run."""


def points_of(grid: QuantSpec) -> Iterator[tuple[str, Point]]:
    """Those that are for a grid."""
    for name, point in POINTS.items():
        if point.symmetric in (None, grid.symmetric) and not (point.settings.get("desc_act") and grid.bits == 3):
            yield name, point
