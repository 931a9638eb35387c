"""Which share of the gradient each term of a weighted sum has.

The gradient meant is that with respect to the block's output, ``g_i = d term_i / d out`` over a batch: what all
learnables of all methods see of a term, and cheap, because nothing goes back through the block itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swquant.losses.base import LossContext
from swquant.losses.expression import WeightedSum


def term_gradients(
    loss: WeightedSum, out: Tensor, targets: Sequence[Tensor], contexts: Sequence[LossContext]
) -> dict[str, Tensor]:
    """Return the gradient of each unweighted term at ``out``, by label, summed over the targets.

    Args:
        loss: The sum.
        out: The block's outputs, [samples, tokens, dim]; taken as a leaf.
        targets: What they are compared with, of the same shape each.
        contexts: One for each target.

    Returns:
        Tensors of the shape of ``out``.
    """
    leaf = out.detach().requires_grad_()
    with torch.enable_grad():
        found = [loss.terms(leaf, target, context) for target, context in zip(targets, contexts, strict=True)]
        values = {label: torch.stack([terms[label] for terms in found]).sum() for label in found[0]}
        return {label: torch.autograd.grad(value, leaf)[0] for label, value in values.items()}


def shares_of(loss: WeightedSum, norms: Mapping[str, float]) -> dict[str, float]:
    """Return each term's share of the gradient: ``w_i ||g_i||`` over the sum of them; empty where that is no number.

    Args:
        loss: The sum, whose weights are ``w``.
        norms: ``||g_i||`` by label.
    """
    weighted = {term.label: term.weight * norms[term.label] for term in loss.parts}
    whole = sum(weighted.values())
    return {label: norm / whole for label, norm in weighted.items()} if 0 < whole < math.inf else {}
