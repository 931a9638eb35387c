"""A ``config.json`` that leaves nothing to its readers.

Where a setting is missing, each runtime fills in what it thinks usual: YaRN's original context is the whole context in
transformers and 4096 in mlx-lm, the base of Qwen2's rotary positions 10,000 in one and 1,000,000 in the other. So an
output says all that transformers, with which it was measured, has filled in; rotary settings under the names from
before transformers 5 as well, which many readers know alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from swquant.model.empty import read_config

ROTARY = "rope_parameters"
FULL, SLIDING = "full_attention", "sliding_attention"
_BASE = frozenset(field.name for field in fields(PreTrainedConfig))
_OLD_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_APART = ("rope_theta", "partial_rotary_factor")
"""What stood beside ``rope_scaling``, not in it."""


def in_full(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The content of the ``config.json`` in ``place`` with what transformers fills in where it says nothing.

    Values that are given stay as they are, but for rotary settings, which are brought into one form. Where transformers
    would then read anything else than before, less is added, in the end nothing.
    """
    known = read_config(config, place)
    meant = _own(known)
    for old_names in (True, False):
        full = _filled(config, known, old_names)
        if _reads(full, place, meant):
            return full
    return dict(config)


def _reads(full: Mapping[str, Any], place: Path, meant: Mapping[str, Any]) -> bool:
    """Whether transformers takes ``full``, and for what was meant."""
    try:
        return _own(read_config(full, place)) == meant
    except Exception:  # transformers checks settings in as many ways as there are settings
        return False


def _own(known: Any) -> dict[str, Any]:
    """What a kind of model has beside the settings of all kinds, as JSON; a part's settings are a mapping in it."""
    found: dict[str, Any] = {}
    parts, values = _parts(known), known.to_dict()
    for name in (field.name for field in fields(known)):
        if name in parts:
            found[name] = {"model_type": parts[name].model_type, **_own(parts[name])}
        elif name in values and name not in _BASE and not name.startswith("_"):
            try:
                found[name] = json.loads(json.dumps(values[name], allow_nan=False))
            except (TypeError, ValueError):  # what JSON does not say stays as it is given
                continue
    if isinstance(found.get(ROTARY), dict):
        found[ROTARY] = _without_empty(found[ROTARY])
    return found


def _parts(known: Any) -> dict[str, Any]:
    """The settings of a model's parts by name, e.g. of a language model and of a tower for images."""
    found = {name: getattr(known, name, None) for name in type(known).sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}


def _filled(config: Mapping[str, Any], known: Any, old_names: bool) -> dict[str, Any]:
    own, parts = _own(known), _parts(known)
    full = {**own, **config}
    for name, value in own.items():
        given = config.get(name)
        if name in parts and isinstance(given, Mapping):
            full[name] = _filled(given, parts[name], old_names)
        elif name == ROTARY and value:
            full = {key: value for key, value in full.items() if key not in (*_APART, "rope_scaling")}
            full |= {ROTARY: value, **(_old_names(value, config) if old_names else {})}
    return full


def _without_empty(rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without those that are not set, and without betas of 0, which transformers takes for that.

    Where kinds of layers have settings of their own, a kind that has none has no rotary positions, and says so.
    """
    nested = {name: _without_empty(value) for name, value in rotary.items() if isinstance(value, dict)}
    unset = {name for name, value in rotary.items() if value is None or (name.startswith("beta_") and not value)}
    if nested:
        unset = {name for name in unset if rotary[name] is not None}
    unset |= {"type"} if "rope_type" in rotary else set()  # an older name of the same
    return {name: value for name, value in {**rotary, **nested}.items() if name not in unset}


def _old_names(rotary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under their names from before transformers 5, where layers differ those of full attention."""
    whole, local = rotary, rotary.get(SLIDING)
    if any(isinstance(value, dict) for value in rotary.values()):
        whole = rotary.get(FULL) or {}
    kind = whole.get("rope_type", "default")
    if kind not in _OLD_KINDS:
        return {}
    old = {name: whole[name] for name in _APART if name in whole}
    scaling = {name: value for name, value in whole.items() if name not in (*_APART, "rope_type")}
    if kind != "default" or scaling:
        old["rope_scaling"] = {"rope_type": kind, "type": kind, **scaling}
    elif "rope_scaling" in config:
        old["rope_scaling"] = None
    if isinstance(local, Mapping) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return old
