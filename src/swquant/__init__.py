"""Training-based post-training quantization of large language models to 2, 3 and 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swquant.errors import SwquantError
    from swquant.evaluation import Evaluation, evaluate
    from swquant.losses import SlicedWasserstein, SlicedWassersteinLoss, parse_loss, sliced_wasserstein_loss
    from swquant.quant.spec import QuantSpec
    from swquant.recipe import Recipe
    from swquant.report import Report
    from swquant.run import quantize
    from swquant.runtime import load

__all__ = [
    "Evaluation",
    "QuantSpec",
    "Recipe",
    "Report",
    "SlicedWasserstein",
    "SlicedWassersteinLoss",
    "SwquantError",
    "evaluate",
    "load",
    "parse_loss",
    "quantize",
    "sliced_wasserstein_loss",
]

_HOMES = {
    "Evaluation": "evaluation",
    "QuantSpec": "quant.spec",
    "Recipe": "recipe",
    "Report": "report",
    "SlicedWasserstein": "losses",
    "SlicedWassersteinLoss": "losses",
    "SwquantError": "errors",
    "evaluate": "evaluation",
    "load": "runtime",
    "parse_loss": "losses",
    "quantize": "run",
    "sliced_wasserstein_loss": "losses",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``swquant --help`` waits for no library."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"swquant.{_HOMES[name]}"), name)
