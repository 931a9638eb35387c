"""What happens in a block when it runs: which linears read what, which norm they read it from, and what comes out.

Found by running the block on tensors without values and watching its modules, so it holds for whatever code the block
has. Tensors are told apart by identity: ``q_proj`` and ``k_proj`` share their input if they are given one object.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from swquant.errors import reason_of

LOOKUPS = (
    "__getitem__",
    "__contains__",
    "__iter__",
    "__reversed__",
    "get",
    "items",
    "keys",
    "values",
    "pop",
    "popitem",
)
"""Methods of lists and mappings that tell what is in them."""


@dataclass(frozen=True)
class Flow:
    """How a block runs.

    Attributes:
        linears: The linears in the order in which they are called.
        inputs: Those that are given one and the same tensor, in that order too.
        norms: A module without linears whose output such a set reads, by the first linear of the set.
        outputs: Number of values that the block returns as a tuple; ``None`` if it returns the hidden states alone.
        writes: It puts something into a list or mapping that it was given, which other blocks may read.
        reads: It looks something up in such a one, or may have.
        failed: Why the block could not be run without values; the rest is then a guess from its code.
        once: The linears that are called once, or not at all where no token is sent to them; none where it failed.
    """

    linears: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    norms: Mapping[str, str]
    outputs: int | None
    writes: bool = False
    reads: bool = False
    failed: str | None = None
    once: frozenset[str] = frozenset()


@torch.no_grad()
def trace(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow:
    """Run ``block`` on ``meta`` with such arguments, the hidden states among them."""
    seen = _Seen()
    hooks = [
        module.register_forward_hook(partial(seen.note, name))
        for name, module in block.named_modules()
        if name and (isinstance(module, nn.Linear) or _is_small(module))
    ]
    state = {name: value.to("meta") for name, value in (*block.named_parameters(), *block.named_buffers())}
    looked_up: list[str] = []
    given, named = pytree.tree_map(_without_values, (args, dict(kwargs)))
    given = tuple(_watched(value, looked_up) if is_container(value) else value for value in given)
    named = {key: _watched(value, looked_up) if is_container(value) else value for key, value in named.items()}
    held = _containers(given, named)
    before = [len(one) for one in held]
    failed = None
    try:
        out: Any = functional_call(block, state, given, named)
    except Exception as error:  # code that asks for values cannot run without any
        failed, out = reason_of(error), (None,) if _says_tuple(block) else None
    finally:
        for hook in hooks:
            hook.remove()
    if failed is not None:
        linears = tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))
        known = len(out) if out else None
        return Flow(linears, tuple((name,) for name in linears), {}, known, reads=True, failed=failed)
    writes = before != [len(one) for one in held]
    outputs = len(out) if isinstance(out, tuple | list) else None
    return Flow(*seen.sets(), outputs, writes, bool(looked_up), once=frozenset(seen.order) - seen.again)


def _containers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Lists and mappings among the arguments; they are copies, so that nothing of the model's is written to."""
    return [value for value in (*args, *kwargs.values()) if is_container(value)]


def is_container(value: Any) -> bool:
    """Whether it is a list or mapping that a block can put something into."""
    return isinstance(value, MutableMapping | MutableSequence)


def _watched(value: Any, looked_up: list[str]) -> Any:
    """A copy of a list or mapping that notes when something is looked up in it."""
    kind = type(value)

    def noting(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            looked_up.append(name)
            return getattr(kind, name)(self, *args, **kwargs)

        return method

    watched = type(kind.__name__, (kind,), {name: noting(name) for name in LOOKUPS if hasattr(kind, name)})
    out = copy.copy(value)
    try:
        out.__class__ = watched
    except TypeError:  # instances of Python's own classes take no other, and those can be made of one another
        return watched(value)
    return out


class _Seen:
    """Notes of the hooks. Tensors are kept, so that none takes the identity of another that is gone."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.order: list[str] = []
        self.again: set[str] = set()
        self.readers: dict[int, list[str]] = {}
        self.makers: dict[int, str] = {}

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, nn.Linear):
            if name in self.order:
                self.again.add(name)
            elif args:
                self.kept.append(args[0])
                self.order.append(name)
                self.readers.setdefault(id(args[0]), []).append(name)
        elif isinstance(out, Tensor):
            self.kept.append(out)
            self.makers[id(out)] = name

    def sets(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], dict[str, str]]:
        norms = {names[0]: self.makers[key] for key, names in self.readers.items() if key in self.makers}
        return tuple(self.order), tuple(tuple(names) for names in self.readers.values()), norms


def _is_small(module: nn.Module) -> bool:
    """Whether it could be a norm: parameters of its own, none of them a matrix, and no modules inside."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(value.dim() == 1 for value in own) and not any(True for _ in module.children())


def _without_values(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _says_tuple(block: nn.Module) -> bool:
    returns = inspect.signature(type(block).forward).return_annotation
    return "tuple" in str(returns).lower()
