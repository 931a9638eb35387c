"""Weights that are made where a linear needs them, and made again where its gradient does.

A block's weights on their way to the grid are functions of what is stored and of what is learned. Kept as such, one
linear's weight exists at a time, in the forward as in the backward pass, instead of all of them with their gradients.
Small ones are made once and kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from swquant.quant.through import wide_dtype, widened

_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad")
_FACTS = frozenset(
    {
        *(vars(torch._C.TensorBase)[name].__get__ for name in _PROPERTIES),  # pyright: ignore[reportPrivateUsage]
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
    }
)
"""What is known of a tensor without its values."""

SMALL = 1 << 18
"""Weights of a linear up to which they are kept for the backward pass: a few MiB, and making them anew takes longer."""


class Deferred(Tensor):
    """The value ``make(*sources)``, which is not there; made by :func:`defer`.

    ``functional.linear`` takes it for a weight without making it for longer than it computes; any other function of
    torch is given the value.

    Attributes:
        make: A pure and differentiable function.
        sources: Its arguments; they may be deferred too.
    """

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no values; multiply by :class:`_Linear`; for all else make the values."""
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return func(*args)
        if func is Tensor.float and args[0].dtype == torch.float32:
            return args[0]
        if func is functional.linear and not isinstance(args[0], Deferred) and isinstance(args[1], Deferred):
            return _linear(*args, **(kwargs or {}))
        given, named = torch.utils._pytree.tree_map(_made, (args, kwargs or {}))  # pyright: ignore
        return func(*given, **named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing may compute on what is not there."""
        raise TypeError(f"{func} was called on a deferred weight: pass solid(weight)")


def defer(make: Callable[..., Tensor], *sources: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A :class:`Deferred` value of this shape and dtype."""
    learned = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    like = sources[0]
    value: Deferred = Tensor._make_wrapper_subclass(  # pyright: ignore
        Deferred, shape, dtype=dtype, device=like.device, requires_grad=learned
    )
    value.make, value.sources = make, sources
    return value


def in_float(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` in float32 (float64 where they are), matrices of another dtype deferred; integers as they are."""
    return {name: _in_float(value) for name, value in params.items()}


def _in_float(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return _float_later(value) if value.dim() == 2 else widened(value)


def _float_later(value: Tensor) -> Tensor:
    if value.dtype == wide_dtype(value) or isinstance(value, Deferred):
        return value
    return defer(widened, value, shape=value.shape, dtype=wide_dtype(value))


def solid(value: Tensor) -> Tensor:
    """``value`` itself, made if it is deferred."""
    return value.make(*map(solid, value.sources)) if isinstance(value, Deferred) else value


def on_leaves(params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Cut a graph at ``params``, so that a backward pass ends there and can be repeated.

    Args:
        params: Tensors, differentiable or not, deferred or not.

    Returns:
        ``params`` as functions of leaves, and pairs ``(root, leaf)``: what was differentiated with respect to before,
        and the leaf in its place; a root that is a leaf itself stays.
    """
    roots = {id(root): root for value in params.values() for root in _roots(value)}
    leaves = {key: root if root.is_leaf else root.detach().requires_grad_() for key, root in roots.items()}
    return {name: _on(value, leaves) for name, value in params.items()}, [
        (root, leaves[key]) for key, root in roots.items()
    ]


def _made(value: Any) -> Any:
    return solid(value) if isinstance(value, Deferred) else value


def _roots(value: Tensor) -> list[Tensor]:
    """The tensors, not deferred, that ``value`` is differentiable in, each once."""
    if not isinstance(value, Deferred):
        return [value] if value.requires_grad else []
    return list({id(root): root for source in value.sources for root in _roots(source)}.values())


def _on(value: Tensor, others: Mapping[int, Tensor]) -> Tensor:
    """``value`` with ``others`` in the place of sources that have their ``id``."""
    if not isinstance(value, Deferred):
        return others.get(id(value), value)
    sources = (_on(source, others) for source in value.sources)
    return defer(value.make, *sources, shape=value.shape, dtype=value.dtype)


SLICE = 1 << 24
"""Of a matrix that is stored in another dtype and not learned, such as a head: weights that are widened at once."""


class _SlicedLinear(torch.autograd.Function):
    """``x W^T + b`` for a large ``W`` that is stored in another dtype: a slice of its rows is in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored: Tensor) -> Tensor:
        ctx.stored = stored
        out = x.new_empty(*x.shape[:-1], len(stored))
        for rows in _row_slices(stored):
            out[..., rows] = functional.linear(x, stored[rows].to(x.dtype))
        return out if bias is None else out.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope = grad_outputs[0]
        into = slope.new_zeros(*slope.shape[:-1], ctx.stored.shape[1])
        for rows in _row_slices(ctx.stored):
            into += slope[..., rows] @ ctx.stored[rows].to(slope.dtype)
        return into, None, None


def _row_slices(stored: Tensor) -> Iterator[slice]:
    rows, width = stored.shape
    step = max(1, SLICE // width)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _linear(x: Tensor, weight: Deferred, bias: Tensor | None = None) -> Tensor:
    if weight.make is widened and weight.numel() > SLICE and not _roots(weight) and not _short(x):
        return _SlicedLinear.apply(x, bias, weight.sources[0])  # pyright: ignore[reportReturnType]
    kept = torch.is_grad_enabled() and weight.numel() <= SMALL
    return _Linear.apply(x, None if bias is None else solid(bias), (weight, kept), *_roots(weight))  # pyright: ignore[reportReturnType]


def _short(x: Tensor) -> bool:
    """Whether autocast multiplies in another dtype."""
    return _product_dtype(x) != x.dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``x`` is multiplied in: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _made_on_leaves(
    weight: Deferred, names: Sequence[int], roots: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """The weight as a function of leaves in the place of its roots, and these; the roots' ``id`` are ``names``."""
    leaves = [root.detach().requires_grad_(wants) for root, wants in zip(roots, wanted, strict=True)]
    with torch.set_grad_enabled(any(wanted)), torch.autocast(weight.device.type, enabled=False):
        return solid(_on(weight, dict(zip(names, leaves, strict=True)))), leaves


class _Linear(torch.autograd.Function):
    """``x W^T + b`` for a deferred ``W``; in the backward pass neither ``W`` nor its gradient waits for the other.

    Under autocast its three products are autocast's; ``W`` is made, and its gradient goes on, in ``W``'s own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, held: tuple[Deferred, bool], *roots: Tensor) -> Tensor:
        (weight, kept), kind = held, _product_dtype(x)
        x = x.to(kind)
        ctx.save_for_backward(x, *roots)
        ctx.weight, ctx.roots = weight, [id(root) for root in roots]
        made = _made_on_leaves(weight, ctx.roots, roots, [kept and wants for wants in ctx.needs_input_grad[3:]])
        ctx.made = made if kept else None
        return functional.linear(x, made[0].detach().to(kind), None if bias is None else bias.to(kind))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *roots = ctx.saved_tensors
        wants_x, wants_bias, _, *wanted = ctx.needs_input_grad
        slope = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        weight, leaves = ctx.made or _made_on_leaves(ctx.weight, ctx.roots, roots, wanted)
        ctx.made = None
        into_x = (slope @ weight.detach().to(x.dtype)).view(x.shape) if wants_x else None
        into_bias = slope.sum(0) if wants_bias else None
        into_roots: list[Tensor | None] = [None] * len(roots)
        if any(wanted):
            edge, kind = get_gradient_edge(weight), weight.dtype
            del weight
            into_weight = (slope.t() @ x.reshape(-1, x.shape[-1])).to(kind)
            learned = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad([edge], learned, [into_weight], allow_unused=True))
            into_roots = [next(found) if wants else None for wants in wanted]
        return into_x, into_bias, None, *into_roots
