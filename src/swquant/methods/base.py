"""The form of a method, and its construction from a recipe's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from swquant import registry
from swquant.families.base import Family
from swquant.phases.base import Phase
from swquant.quant.spec import QuantSpec
from swquant.validation import build


class Method(Protocol):
    """A frozen dataclass whose fields are the method's options."""

    def phases(self, spec: QuantSpec, family: Family, effort: float) -> tuple[Phase, ...]:
        """The phases in order; an empty tuple is round-to-nearest.

        Args:
            spec: The grid.
            family: The model's family, for defaults that depend on it.
            effort: Factor of the preset on the published number of epochs; it has no effect on an explicit number.
        """
        ...


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """Make the method ``name`` with ``options``.

    Raises:
        SwquantError: If the method or an option is unknown (with the nearest known), or an option has the wrong type.
    """
    return build(registry.load("swquant.methods", name), options, f"the method {name}")
