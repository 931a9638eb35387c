"""A grid of trials: every combination of what a YAML file lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from swquant.errors import SwquantError, did_you_mean
from swquant.losses import parse_loss
from swquant.methods import parse_methods
from swquant.recipe import AUTO, SELF, Recipe
from swquant.validation import read_yaml

MODEL, RECIPE, CASES = "model", "recipe", "cases"
RECIPE_KEYS = tuple(field.name for field in fields(Recipe))
IN_CASES = (MODEL, RECIPE, *RECIPE_KEYS)
_PATHS = (MODEL, "calibration", "evaluation")


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        model: The model's name in tables, as the file has it.
        source: Its directory, or its name on the hub.
        recipe: What to do to it.
    """

    model: str
    source: str
    recipe: Recipe


def read_grid(path: Path) -> tuple[Cell, ...]:
    """Every combination of the values that the file lists, in the order of its keys, the last varying first.

    The file is a mapping of ``model``, ``recipe`` (a named recipe, or a YAML file, that the other keys override) and a
    recipe's keys to a value or a list of values. ``cases`` is a list of such mappings, for keys that vary together.
    Paths are looked for beside the file first.

    Raises:
        SwquantError: The file cannot be read, a key is unknown or comes twice, or a combination makes no recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SwquantError(f"the grid {path} cannot be read: {error}") from error
    values = read_yaml(text, f"the grid {path}")
    if not isinstance(values, dict):
        raise SwquantError(f"the grid {path} holds no mapping of keys to values or lists")
    shared = _checked(values, (*IN_CASES, CASES), str(path))
    cases = shared.pop(CASES, [{}])
    return tuple(
        _cell(combination, path) for case in _cases(cases, shared, path) for combination in _combinations(shared | case)
    )


def _cases(cases: Any, shared: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise SwquantError(f"{path}: cases is {str(cases)[:60]!r}, expected a list of mappings")
    for case in cases:
        twice = sorted(shared.keys() & case.keys())
        if twice:
            raise SwquantError(f"{path}: {twice[0]!r} stands both in a case and outside of the cases; keep one")
        yield _checked(case, IN_CASES, f"a case of {path}")


def _checked(values: Mapping[Any, Any], known: tuple[str, ...], what: str) -> dict[str, Any]:
    for key, value in values.items():
        if key not in known:
            raise SwquantError(f"{what} has no key {key!r}{did_you_mean(str(key), known)}")
        if value == []:
            raise SwquantError(f"{what}: {key} is an empty list, which leaves no trial; give one value or more")
    return dict(values)


def _combinations(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    for choice in itertools.product(*lists):
        yield dict(zip(values, choice, strict=True))


def _cell(values: dict[str, Any], path: Path) -> Cell:
    model, base = values.pop(MODEL, None), values.pop(RECIPE, None)
    if not isinstance(model, str):
        raise SwquantError(f"{path}: model is {model!r}, expected a model directory or a hub name, or a list of them")
    if base is not None and not isinstance(base, str):
        raise SwquantError(f"{path}: recipe is {base!r}, expected a recipe's name, or a list of them")
    for key in _PATHS[1:]:
        if isinstance(values.get(key), str):
            values[key] = _beside(path, values[key])
    if base is not None:
        recipe = Recipe.load(_beside(path, base) if base.endswith((".yaml", ".yml")) else base)
    else:
        recipe = Recipe() if "method" in values else Recipe.recommended(values)[1]
    recipe = recipe.override(values)
    if recipe.calibration == AUTO:
        # Trials are compared with each other, so none may choose for itself.
        recipe = replace(recipe, calibration=SELF)
    _ = recipe.spec
    parse_methods(recipe.method, recipe.options, recipe.epochs)
    if recipe.loss is not None:
        parse_loss(recipe.loss)
    return Cell(model, _beside(path, model), recipe)


def _beside(path: Path, text: str) -> str:
    """``text`` as a path, if that lies beside the grid's file or here; else as it is."""
    for place in (path.parent / text, Path(text)):
        if place.exists():
            return str(place.resolve())
    return text
