"""Python code that comes with a checkpoint: where it is named, and whether the user trusts it.

A configuration in memory names code only if the user trusts it: :func:`swquant.checkpoint.reader.read_config` takes the
names away otherwise. So whoever finds :data:`CODE` in one may run what it names, and what is written has it just then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swquant.checkpoint.shards import read_json

CONFIG = "config.json"
CODE = "auto_map"
"""Key of a configuration that names the model's own code."""
OF_A_PROGRAM = ("return_dict", "attn_implementation", "_attn_implementation")
"""Keys that say how one program runs a model, and nothing of what it computes: predictions as a tuple, which
transformers' own classes do not run with, and attention by a package that need not be here."""


def names_code(directory: Path) -> bool:
    """Whether a model or its tokenizer has code of its own."""
    files = (directory / CONFIG, directory / "tokenizer_config.json")
    return any(path.is_file() and CODE in read_json(path) for path in files)


def trusts_code(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` was read with trust in the model's own code, and there is some."""
    return CODE in config


def without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the names of code, which neither runs nor goes along."""
    return _without(values, (CODE,))


def of_the_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without :data:`OF_A_PROGRAM`."""
    return _without(values, OF_A_PROGRAM)


def _without(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in keys
    }
