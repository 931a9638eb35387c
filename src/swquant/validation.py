"""From untyped values (a YAML file, flags) to a typed dataclass, or one sentence about what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from swquant.errors import SwquantError, did_you_mean, reason_of

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which ``1e-3`` is a number, as in YAML 1.2, and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str, what: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        SwquantError: It is not valid YAML; ``what`` names it.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = reason_of(error, 300)
        raise SwquantError(f"{what} is not valid YAML: {reason}") from error


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Make the dataclass ``cls`` from ``values``, each of the declared type without conversion (an int is a float).

    Args:
        cls: A dataclass.
        values: Field names to values.
        what: What the fields belong to, for the message, e.g. ``"the recipe"``.

    Raises:
        SwquantError: A key is unknown (the nearest is named), or a value has the wrong type or is out of range.
    """
    known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    types = get_type_hints(cls, include_extras=True)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            hint = did_you_mean(str(key), known) if known else "; it takes none"
            raise SwquantError(f"{what} has no key {key!r}{hint}")
        try:
            checked[key] = TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise SwquantError(f"{what}: {key} is {value!r}; {reason[:1].lower()}{reason[1:]}") from error
    return cls(**checked)
