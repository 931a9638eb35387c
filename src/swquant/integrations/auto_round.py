"""AutoRound with a loss of ours, and with the gradient of ``clamp`` that it was tuned with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from swquant.integrations.versions import require_version
from swquant.losses import Loss, LossContext, parse_loss
from swquant.quant.through import clamped
from swquant.seeds import generator

SUPPORTED = ("0.16.1", "0.17")
"""auto-round's versions, from the first to before the second, whose methods are those that are replaced."""

_CLAMPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)


@contextmanager
def auto_round_loss(expression: str, *, seed: int = 0) -> Generator[None, None, None]:
    """Have auto-round compare blocks by a loss of ours while the context lasts, in its Python interface and its CLI.

    ::

        with auto_round_loss("0.9*mse + 0.1*sliced_wasserstein"):
            AutoRound(model, tokenizer, scheme="W2A16").quantize_and_save(folder)

    The loss takes the place of the mean squared error in SignRound and its variants, for blocks; single layers outside
    of blocks, and the cross-entropy that ``--enable_lfq`` asks for, stay theirs. Padding is left out of both outputs.
    With ``mse`` it trains to the bytes that auto-round trains to. Under accumulation of gradients auto-round adds up
    sums over elements, so our means are multiplied by their number.

    On torch from 2.14 on the gradient of ``clamp`` is 0 at its ends (pytorch pull request 191142), where at 2 bits most
    codes stand and where auto-round expects 1; within the context it is 1 there, as it was.

    Args:
        expression: See :func:`swquant.losses.parse_loss`.
        seed: Of random directions; each call of the loss draws new ones.

    Raises:
        SwquantError: auto-round is missing or of a version that this was not written for, or the loss cannot be read.
    """
    block_loss = _block_loss(parse_loss(expression), generator(seed, "auto-round"))
    theirs = {kind: vars(kind)["_get_loss"] for kind in _quantizers()}
    try:
        for kind in theirs:
            kind._get_loss = block_loss
        with _ClosedClamp() if _clamp_opens_at_its_ends() else nullcontext():
            yield
    finally:
        for kind, method in theirs.items():
            kind._get_loss = method


def _block_loss(loss: Loss, rng: torch.Generator) -> Callable[..., Tensor]:
    """What stands in the place of auto-round's method."""

    def block_loss(
        self: Any,
        pred_output: Tensor,
        ref_output: Tensor,
        indices: Tensor,
        loss_func: Callable[..., Tensor],
        device: str | torch.device = "cpu",
        valid_token_mask: Sequence[Tensor] | None = None,
        input_ids: Any = None,
    ) -> Tensor:
        pred, target = pred_output.float(), ref_output.float()
        weight = pred.numel() if getattr(loss_func, "reduction", "mean") == "sum" else 1
        if valid_token_mask:
            valid = torch.cat([valid_token_mask[int(i)] for i in indices], dim=0).to(pred.device).bool()
            pred, target = (side[valid].unsqueeze(0) for side in (pred, target))
            weight = weight * valid.float().mean()
        return loss(pred, target, LossContext(rng)) * weight

    return block_loss


def _quantizers() -> tuple[Any, ...]:
    """auto-round's classes that train blocks."""
    require_version("auto-round", *SUPPORTED)
    from auto_round.algorithms.quantization.sign_round.quantizer import (  # pyright: ignore[reportMissingImports]
        SignRoundQuantizer,
    )
    from auto_round.algorithms.quantization.sign_roundv2 import (  # pyright: ignore[reportMissingImports]
        SignRoundV2Quantizer,
    )

    return SignRoundQuantizer, SignRoundV2Quantizer


def _clamp_opens_at_its_ends() -> bool:
    """Whether this torch has no gradient there."""
    end = torch.ones((), requires_grad=True)
    end.clamp(max=1).backward()
    return end.grad is None or not bool(end.grad)


class _ClosedClamp(TorchFunctionMode):
    """``clamp`` between numbers with the gradient 1 at both ends."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _CLAMPS and torch.is_grad_enabled() and isinstance(args[0], Tensor) and args[0].requires_grad:
            least, most = (*args[1:], None, None)[:2]
            least, most = given.get("min", least), given.get("max", most)
            if not isinstance(least, Tensor) and not isinstance(most, Tensor):
                return clamped(args[0], least, most)
        return func(*args, **given)
