"""Methods one after the other: ``rotate + gptq + block_ap(epochs=4) + tesseraq``, read, checked and sorted by stage."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from swquant import registry
from swquant.errors import SwquantError
from swquant.methods.base import Method, Part, Rotation, Setting
from swquant.phases.base import Phase
from swquant.phases.scale_training import ScaleTraining
from swquant.quant.spec import QuantSpec
from swquant.validation import build

EXAMPLE = "write methods with '+' between them, such as 'awq + block_ap(epochs=4) + tesseraq'"
LONGEST = 1000
STAGES = ("before the first block", "block by block", "after the last block")


@dataclass(frozen=True)
class Step:
    """A method of a pipeline with its options."""

    name: str
    options: Mapping[str, Any]
    method: Method

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={self.options[key]!r}" for key in sorted(self.options))
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True)
class Pipeline:
    """What a run does, by stage.

    Attributes:
        rotate: Whether the checkpoint is rotated first.
        phases: What is done to each block.
        finish: What is done to the model after the last block.
        parts: All of it, in order.
    """

    rotate: bool
    phases: tuple[Phase, ...]
    finish: ScaleTraining | None
    parts: tuple[Part, ...]


def parse_methods(
    expression: str, options: Mapping[str, Any] | None = None, epochs: int | None = None
) -> tuple[Step, ...]:
    """Read a pipeline.

    >>> " + ".join(map(str, parse_methods("awq + block_ap(epochs = 4)")))
    'awq + block_ap(epochs=4)'

    Args:
        expression: Names of methods with keyword options, ``+`` between them.
        options: Options, each of the only method that has it.
        epochs: Those of every method that trains by epochs, in place of what the text says.

    Raises:
        SwquantError: The text is something else, a method or an option is unknown or has the wrong type, or no method
            trains by epochs and they are given.
    """
    if len(expression) > LONGEST:
        length = len(expression)
        raise SwquantError(f"the method of {length} characters cannot be read, at most {LONGEST} are: {EXAMPLE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(" ".join(expression.split()), mode="eval").body
        calls = list(_calls(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SwquantError(f"the method {expression!r} cannot be read: {EXAMPLE}") from error
    for key, value in (options or {}).items():
        owner = _owner(calls, key, expression)
        calls = [(name, {**given, key: value} if name == owner else given) for name, given in calls]
    if epochs is not None:
        calls = _with_epochs(calls, epochs, expression)
    return tuple(
        Step(name, given, build(registry.load("swquant.methods", name), given, f"the method {name}"))
        for name, given in calls
    )


def _owner(calls: list[tuple[str, dict[str, Any]]], key: str, expression: str) -> str:
    """The one method that has the option ``key``; a lone method is taken for it, and refuses it by itself."""
    owners = [name for name, _ in calls if len(calls) == 1 or _has(name, key)]
    if len(owners) == 1:
        return owners[0]
    if not owners:
        raise SwquantError(f"no method of {expression!r} has an option {key!r}")
    raise SwquantError(
        f"{key} could be an option of {' or '.join(owners)}: write it in parentheses after the one, "
        f"such as {owners[0]}({key}=...)"
    )


def _has(name: str, key: str) -> bool:
    return any(field.name == key for field in fields(registry.load("swquant.methods", name)))


def _with_epochs(
    calls: list[tuple[str, dict[str, Any]]], epochs: int, expression: str
) -> list[tuple[str, dict[str, Any]]]:
    by_epochs = [_has(name, "epochs") for name, _ in calls]
    if not any(by_epochs):
        raise SwquantError(f"no method of {expression!r} trains by epochs: leave them out, or set its own options")
    return [
        (name, {**given, "epochs": epochs} if has else given)
        for (name, given), has in zip(calls, by_epochs, strict=True)
    ]


def build_pipeline(steps: tuple[Step, ...], setting: Setting) -> Pipeline:
    """Sort the parts of all methods by stage.

    Raises:
        SwquantError: A combination that cannot be: two parts learn one thing, a later part would discard what an
            earlier one settled, or a stage comes too late.
    """
    parts: list[Part] = []
    first = True
    for step in steps:
        own = step.method.parts(replace(setting, first=first))
        first = first and any(_stage(part) == 0 for part in own)
        for part in own:
            _check_grids(part, (setting.spec, *setting.others))
            for earlier in parts:
                _check_pair(earlier, part)
            parts.append(part)
    works = [part.work for part in parts]
    finish = [work for work in works if isinstance(work, ScaleTraining)]
    moved = any("equivalence" in part.decides for part in parts)
    return Pipeline(
        rotate=any(isinstance(work, Rotation) for work in works),
        phases=tuple(work for work in works if not isinstance(work, Rotation | ScaleTraining)),
        finish=replace(finish[0], original=not moved) if finish else None,
        parts=tuple(parts),
    )


def _check_grids(part: Part, specs: tuple[QuantSpec, ...]) -> None:
    """Refuse a part that learns what some kind of grid has not."""
    for spec in specs:
        for subject in sorted({"rounding", "codes"} & part.decides - spec.kind.learned):
            raise SwquantError(
                f"{part.name} learns the {subject}, which cannot be learned on the grid {spec.grid}: "
                + ("leave weights out, and the scales are trained" if subject == "codes" else "choose another method")
            )


def _check_pair(earlier: Part, later: Part) -> None:
    before, after = _stage(earlier), _stage(later)
    if before > after:
        raise SwquantError(
            f"{later.name} works {STAGES[after]} and {earlier.name} {STAGES[before]}: put {later.name} first"
        )
    if earlier.name == later.name:
        raise SwquantError(f"{later.name} is listed twice: remove one")
    both = earlier.decides & later.decides
    if earlier.trained and later.trained and both:
        raise SwquantError(f"{earlier.name} and {later.name} both learn the {_list(both)}: remove one")
    lost = earlier.decides & later.discards
    if lost:
        swap = "" if later.decides & earlier.discards else f"put {later.name} before {earlier.name}, or "
        raise SwquantError(
            f"{later.name} would discard the {_list(lost)} that {earlier.name} has found: {swap}remove one"
        )


def _stage(part: Part) -> int:
    return 0 if isinstance(part.work, Rotation) else 2 if isinstance(part.work, ScaleTraining) else 1


def _list(subjects: frozenset[Any]) -> str:
    return " and the ".join(sorted(subjects))


def _calls(node: ast.expr) -> Iterator[tuple[str, dict[str, Any]]]:
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            yield from _calls(left)
            yield from _calls(right)
        case ast.Name(id=name):
            yield name, {}
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            options = {_key(keyword): _literal(keyword.value) for keyword in keywords}
            if len(options) < len(keywords):
                raise ValueError
            yield name, options
        case _:
            raise ValueError


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError
    return keyword.arg


def _literal(node: ast.expr) -> Any:
    """A literal's value; a bare name is a text, so that ``start=awq`` needs no quotes."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
