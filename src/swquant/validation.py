"""From untyped values (a YAML file, flags) to a typed dataclass, or one sentence about what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from swquant.errors import SwquantError, did_you_mean

T = TypeVar("T")

strict = with_config(ConfigDict(strict=True))
"""Decorator of dataclasses whose values are to be of the declared types, without conversion."""


def build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Make the dataclass ``cls`` from ``values``.

    Args:
        cls: A dataclass; one decorated by :data:`strict` converts nothing.
        values: Field names to values.
        what: What the fields belong to, for the message, e.g. ``"the recipe"``.

    Raises:
        SwquantError: A key is unknown (the nearest is named), or a value has the wrong type or is out of range.
    """
    known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known) if known else "; it takes none"
            raise SwquantError(f"{what} has no key {key!r}{hint}")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SwquantError(f"{what}: {place} is {first['input']!r}; {_lower(first['msg'])}") from error


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
