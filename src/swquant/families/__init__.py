"""Hints about architectures: a file here that defines a constant of its own name is a family of that name.

No family has to be known to be quantized. Those that are tell what inspection cannot find: how a rotation of the
residual stream folds into the weights, and what llama.cpp and onnxruntime call the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from swquant import registry
from swquant.errors import SwquantError
from swquant.families.base import Family

__all__ = ["Family", "begins_each_window", "family_for", "rotatable"]

BEGIN_EACH_WINDOW = "gemma"
"""In the ``model_type`` of models that predict badly without a token that begins the text."""


def begins_each_window(config: Mapping[str, Any]) -> bool:
    """Whether a window of text needs the token that begins a text, wherever the window was cut.

    Gemma in all its versions and wrappers does: without it its perplexity is several times as high, and what it is
    calibrated on is not what it is used on. LLaMA and others are measured without it by all papers.

    Args:
        config: The content of ``config.json``.
    """
    parts = (config, config.get("text_config"))
    kinds = (str(part.get("model_type")) for part in parts if isinstance(part, Mapping))
    return any(BEGIN_EACH_WINDOW in kind for kind in kinds)


def families() -> dict[str, Family]:
    """All of them, by name."""
    return {name: registry.load(__name__, name) for name in registry.names(__name__)}


def rotatable() -> tuple[str, ...]:
    """Names of those whose residual stream can be rotated."""
    return tuple(name for name, family in families().items() if family.writers)


def family_for(
    config: Mapping[str, Any], wanted: str, covered: Collection[str] | None = None, instead: str = "leave it out"
) -> Family:
    """The family that a ``config.json`` belongs to.

    Args:
        config: Its content.
        wanted: What needs to know, e.g. ``the format gguf``.
        covered: Names of the families that it covers; ``None`` for all.
        instead: What to do with others, the end of a sentence.

    Raises:
        SwquantError: ``wanted`` does not cover its architecture, or a setting is one that it does not.
    """
    known: dict[str, Family] = {}
    heads: list[str] = []
    for name, family in families().items():
        if covered is None or name in covered:
            known |= dict.fromkeys((*family.architectures, *family.base_architectures), family)
            heads += family.architectures
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(architecture, str) or architecture not in known:
        shown = architectures if architecture is None else architecture
        raise SwquantError(
            f"{wanted} does not cover the architecture {shown!r:.200} yet, only {', '.join(sorted(heads))}; {instead}"
        )
    family = known[architecture]
    for key, expected in family.requires.items():
        if config.get(key, expected) != expected:
            raise SwquantError(
                f"config.json sets {key} to {config[key]!r:.200}; {wanted} covers models of the family {family.name} "
                f"with {expected!r} only"
            )
    return family
