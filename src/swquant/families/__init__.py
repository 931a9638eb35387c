"""Model families: a file here that defines a constant of its own name is a family of that name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swquant import registry
from swquant.errors import SwquantError, did_you_mean
from swquant.families.base import Family

__all__ = ["Family", "family_for"]


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` belongs to.

    Raises:
        SwquantError: If its architecture is unknown (the nearest known is named), or has a setting that the family's
            declaration does not cover.
    """
    known: dict[str, Family] = {}
    bases: dict[str, Family] = {}
    for name in registry.names(__name__):
        family: Family = registry.load(__name__, name)
        known |= dict.fromkeys(family.architectures, family)
        bases |= dict.fromkeys(family.base_architectures, family)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise SwquantError(
            f"config.json names the architectures {architectures!r:.200}, expected one of {', '.join(sorted(known))}"
        )
    architecture = architectures[0]
    if architecture not in known and architecture not in bases:
        raise SwquantError(
            f"the architecture {architecture!r:.200} is not known{did_you_mean(architecture, sorted(known))}"
        )
    family = (bases | known)[architecture]
    for key, expected in family.requires.items():
        if config.get(key, expected) != expected:
            raise SwquantError(
                f"config.json sets {key} to {config[key]!r:.200}; "
                f"the family {family.name} covers models with {expected!r} only"
            )
    return family
