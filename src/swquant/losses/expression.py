"""Weighted sums of losses from an expression such as ``0.9*mse + 0.1*sliced_wasserstein(slices=256)``.

Grammar (a subset of Python's, parsed and never evaluated)::

    sum    = ["+"] term {"+" term}
    term   = number "*" factor | factor ["*" number]
    factor = name ["(" [keyword "=" literal {"," keyword "=" literal}] ")"] | "(" sum ")"
"""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swquant import registry
from swquant.errors import SwquantError, did_you_mean
from swquant.losses.base import Loss, LossContext

Literal = bool | int | float | str

_LONGEST = 1000
_DEEPEST = 50
_EXAMPLE = "write a sum such as '0.9*mse + 0.1*sliced_wasserstein(slices=256)'"


@dataclass(frozen=True)
class Term:
    """One loss and its weight in a sum.

    Attributes:
        weight: a positive finite number.
        label: the loss in canonical form, e.g. ``sliced_wasserstein(slices=256)``: its name, then the parameters that
            differ from their defaults, sorted.
        loss: the loss itself.
    """

    weight: float
    label: str
    loss: Loss

    def __str__(self) -> str:
        return self.label if self.weight == 1 else f"{_number(self.weight)}*{self.label}"


@dataclass(frozen=True)
class WeightedSum:
    """A sum of weighted losses, itself a loss; `str` gives the canonical expression, which parses to an equal sum."""

    parts: tuple[Term, ...]

    @property
    def separable(self) -> bool:
        """Whether each of its losses is; see `Loss`."""
        return all(term.loss.separable for term in self.parts)

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the weighted sum; see `Loss`."""
        return self.total(self.terms(pred, target, ctx))

    def terms(self, pred: Tensor, target: Tensor, ctx: LossContext) -> dict[str, Tensor]:
        """Return each loss's value by its label, before weighting: what a log shows and `total` adds up."""
        return {term.label: term.loss(pred, target, ctx) for term in self.parts}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the values that `terms` gave."""
        first, *others = (term.weight * terms[term.label] for term in self.parts)
        return sum(others, first)

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


def parse_loss(expression: str) -> WeightedSum:
    """Return the sum of losses that ``expression`` describes.

    Equal losses are merged by adding their weights, terms of weight zero are dropped and the others sorted, so that
    expressions that mean the same give equal sums and one canonical string.

    >>> str(parse_loss("0.10 * sliced_wasserstein(power=1, slices=256)+.9*mse"))
    '0.9*mse + 0.1*sliced_wasserstein(slices=256)'

    Args:
        expression: names of losses (see `swquant.registry.names`) with keyword parameters, non-negative finite
            weights, sums, parentheses.

    Raises:
        SwquantError: anything else, with what was met and what to write.
    """
    weights: dict[str, float] = {}
    losses: dict[str, Loss] = {}
    for weight, label, loss in _sum(_parsed(expression), 1.0, 0):
        weights[label] = weights.get(label, 0.0) + weight
        losses[label] = loss
    parts = tuple(Term(weights[label], label, losses[label]) for label in sorted(losses) if weights[label] > 0)
    if not parts:
        raise SwquantError(f"every weight in the loss {expression!r} is zero: give at least one a positive weight")
    if not all(math.isfinite(term.weight) for term in parts):
        raise SwquantError(f"a weight in the loss {expression!r} is not finite: use smaller numbers")
    return WeightedSum(parts)


def _parsed(expression: object) -> ast.expr:
    if not isinstance(expression, str):
        raise SwquantError(f"a loss is a text, got {type(expression).__name__}: {_EXAMPLE}")
    if len(expression) > _LONGEST:
        raise SwquantError(f"the loss has {len(expression)} characters, at most {_LONGEST} are read: {_EXAMPLE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(" ".join(expression.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SwquantError(f"the loss {_clip(expression)} is not an expression: {_EXAMPLE}") from error


def _sum(node: ast.expr, weight: float, depth: int) -> Iterator[tuple[float, str, Loss]]:
    """Yield weight, label and loss of each term below ``node``."""
    if depth > _DEEPEST:
        raise SwquantError(f"the loss has more than {_DEEPEST} nested terms: {_EXAMPLE}")
    match node:
        case ast.BinOp(op=ast.Add()):
            yield from _sum(node.left, weight, depth + 1)
            yield from _sum(node.right, weight, depth + 1)
        case ast.BinOp(op=ast.Mult(), left=ast.Constant() as factor, right=inner):
            yield from _sum(inner, weight * _weight(factor), depth + 1)
        case ast.BinOp(op=ast.Mult(), left=inner, right=ast.Constant() as factor):
            yield from _sum(inner, weight * _weight(factor), depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            yield from _sum(inner, weight, depth + 1)
        case ast.Name(id=name):
            yield (weight, *_loss(name, []))
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            yield (weight, *_loss(name, keywords))
        case ast.Call(func=ast.Name(id=name)):
            raise SwquantError(f"the parameters of the loss {name!r} need their names: write {name}(parameter=value)")
        case _:
            raise SwquantError(f"{_source(node)} is not part of a loss: {_EXAMPLE}")


def _weight(node: ast.Constant) -> float:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SwquantError(f"{_source(node)} is not a weight: use a number, e.g. 0.1")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight):
        raise SwquantError(f"the weight {_source(node)} is not finite: use a smaller number")
    return weight


def _loss(name: str, keywords: list[ast.keyword]) -> tuple[str, Loss]:
    """Return the label and the loss for ``name(**keywords)``."""
    kind = registry.load("swquant.losses", name)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    given: dict[str, Literal] = {}
    for keyword in keywords:
        key = keyword.arg
        if key is None or key in given:
            raise SwquantError(f"the loss {name!r} is given {key or '**'!r} in a way that is not read: {_EXAMPLE}")
        if key not in defaults:
            hint = did_you_mean(key, defaults) if defaults else "; it takes none"
            raise SwquantError(f"the loss {name!r} has no parameter {key!r}{hint}")
        given[key] = _value(name, key, keyword.value, types[key])
    shown = ", ".join(f"{key}={given[key]!r}" for key in sorted(given) if given[key] != defaults[key])
    return (f"{name}({shown})" if shown else name), kind(**given)


def _value(name: str, key: str, node: ast.expr, expected: Any) -> Literal:
    """Return the literal at ``node``, checked against the parameter's type; an int serves where a float is expected."""
    value = _literal(node)
    if expected is float and type(value) is int:
        value = _weight(ast.Constant(value))
    if value is None or type(value) is not expected:
        raise SwquantError(f"{key} of the loss {name!r} must be {expected.__name__}, got {_source(node)}")
    return value


def _literal(node: ast.expr) -> Literal | None:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case _:
            return None


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and value < 1e16 else repr(value)


def _source(node: ast.expr) -> str:
    try:
        return _clip(ast.unparse(node))
    except (RecursionError, ValueError):
        return "a deeply nested term"


def _clip(text: str, longest: int = 60) -> str:
    return repr(text if len(text) <= longest else f"{text[:longest]}...")
