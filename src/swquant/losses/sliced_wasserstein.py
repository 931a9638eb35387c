"""Sliced Wasserstein distance between the distributions of token outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points, check_least
from swquant.losses.transport import gaussian_directions, sliced_cost

_NAME = "sliced_wasserstein"


def sliced_wasserstein_loss(
    pred: Tensor,
    target: Tensor,
    *,
    slices: int = 128,
    power: int = 1,
    block: int = 1,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the sliced Wasserstein distance between two clouds of points, a loss that ignores which point is which.

    Both clouds are projected on L random directions, the N projections of each are sorted, and the distance is

    .. math:: \frac{1}{L N} \sum_{l=1}^{L} \sum_{n=1}^{N}
              \left| \operatorname{sort}(X w_l)_n - \operatorname{sort}(Y w_l)_n \right|^p,
              \qquad w_l = g_l / \lVert g_l \rVert, \quad g_l \sim \mathcal{N}(0, I).

    With ``power=1`` this is the 1-Wasserstein distance, averaged over directions, as in [1], in the units of the
    inputs. With ``power=2`` it is the square of the 2-Wasserstein distance, averaged over directions, as in [2] and
    [3]: in squared units, like the mean squared error, and in expectation over directions at most that error.

    With ``block=b`` [1] joins b consecutive tokens of a sequence into one point of dimension b * dim, which keeps the
    order of tokens inside a block.

    The gradient is exact for the drawn directions: ``sum_l w_l * sign(gap_ln) / (L N)`` for the point of rank n, or
    ``2 gap_ln`` in place of the sign with ``power=2``. Where gaps are zero it is zero, so equal clouds have a zero
    gradient. It reaches ``pred``, and ``target`` too if that requires it. Second derivatives are refused.

    Cost: one product [N, dim] x [dim, L] for each cloud and one back, and 2 L sorts of N numbers.

    Two things to know before weighting it. The distance with ``power=1`` grows like the root of the mean squared
    error, so beside that error a fixed weight means something else in every layer; ``power=2`` scales alike. And
    under float16 gradients of this size (1 / (L N) per term) need a scaled loss, as any mean does.

    Args:
        pred: [points, dim] or [sequences, tokens, dim]; floating point of any width. [points, dim] is one sequence.
        target: same shape. Half precision is computed in float32, float64 in float64, under autocast too.
        slices: L, the number of directions; unused if ``directions`` are given.
        power: p, 1 or 2.
        block: b, the number of tokens joined into one point; divides the tokens of a sequence.
        directions: [block * dim, slices], used as they are (columns of length 1 for a distance); constants.
        generator: where directions are drawn from if none are given, anew at each call; on the CPU or on the device of
            the inputs. It draws what ``torch.randn(block * dim, slices, generator=generator)`` would.

    Returns:
        A scalar.

    Raises:
        SwquantError: shapes differ or are not 2-D or 3-D, ``block`` does not divide the tokens, a parameter is out of
            range, or not exactly one of ``directions`` and ``generator`` is given.

    >>> pred = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> sliced_wasserstein_loss(pred, pred.flip(0), generator=torch.Generator().manual_seed(0))
    tensor(0.)
    >>> sliced_wasserstein_loss(pred, pred + 2, directions=torch.eye(2))
    tensor(2.)
    >>> sliced_wasserstein_loss(pred, pred + 2, directions=torch.eye(2), power=2)
    tensor(4.)

    .. [1] D. Cao, Y. Yin, S. Aref, "Sliced-Wasserstein Distribution Alignment Loss Improves the Ultra-Low-Bit
       Quantization of Large Language Models", arXiv:2601.07878. Where its code takes directions from torch's
       global generator, this function is handed one, so that a run can be repeated and resumed.
    .. [2] J. Rabin, G. Peyré, J. Delon, M. Bernot, "Wasserstein Barycenter and its Application to Texture Mixing",
       SSVM 2011.
    .. [3] N. Bonneel, J. Rabin, G. Peyré, H. Pfister, "Sliced and Radon Wasserstein Barycenters of Measures",
       JMIV 2015.
    """
    _check(slices, power, block)
    pred, target = full_precision(pred, target)
    with without_autocast(pred.device):
        pred_points, target_points = as_points(pred, _NAME, block), as_points(target, _NAME, block)
        chosen = _directions(pred_points, slices, directions, generator)
        return sliced_cost(pred_points, target_points, chosen, power)


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced Wasserstein distance as a `Loss`, its directions drawn from the context; see `sliced_wasserstein_loss`.

    It is not separable: splitting the points into shards pairs each with fewer candidates, and the mean over shards
    exceeds the distance of the whole.

    Attributes:
        slices: number of directions.
        power: 1 for the paper's distance, 2 for the squared 2-Wasserstein distance.
        block: consecutive tokens joined into one point.
    """

    slices: int = 128
    power: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        _check(self.slices, self.power, self.block)

    @property
    def separable(self) -> bool:
        """No, see above."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        return sliced_wasserstein_loss(
            pred, target, slices=self.slices, power=self.power, block=self.block, generator=ctx.rng
        )


class SlicedWassersteinLoss(nn.Module):
    """`sliced_wasserstein_loss` as a module for any training loop.

    >>> loss = SlicedWassersteinLoss(torch.Generator().manual_seed(0), slices=64)
    >>> student = torch.randn(2, 16, 8, requires_grad=True)
    >>> loss(student, torch.randn(2, 16, 8)).backward()
    >>> student.grad.shape
    torch.Size([2, 16, 8])

    Args:
        generator: where directions come from, anew at each call. It stays yours: save ``generator.get_state()`` with
            a checkpoint, and a resumed run sees the directions that an uninterrupted one would.
        slices: number of directions.
        power: 1 or 2.
        block: consecutive tokens joined into one point.
    """

    def __init__(self, generator: torch.Generator, *, slices: int = 128, power: int = 1, block: int = 1) -> None:
        super().__init__()
        self.config = SlicedWasserstein(slices, power, block)
        self.generator = generator

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the distance between ``pred`` and ``target``, [points, dim] or [sequences, tokens, dim]."""
        return self.config(pred, target, LossContext(self.generator))

    def extra_repr(self) -> str:
        """Show the parameters where the module is printed."""
        return f"slices={self.config.slices}, power={self.config.power}, block={self.config.block}"


def _check(slices: int, power: int, block: int) -> None:
    check_least(_NAME, "slices", slices)
    if power not in (1, 2):
        raise SwquantError(f"power of {_NAME} must be 1 or 2, got {power}")
    check_least(_NAME, "block", block)


def _directions(points: Tensor, slices: int, given: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return the given directions, checked, or draw them."""
    if given is None and generator is not None:
        return gaussian_directions(points.shape[1], slices, generator, like=points)
    if given is None or generator is not None:
        raise SwquantError("sliced_wasserstein takes directions or a generator to draw them from: pass one of them")
    if given.dim() != 2 or given.shape[0] != points.shape[1] or given.shape[1] == 0:
        raise SwquantError(
            f"directions of sliced_wasserstein must be [{points.shape[1]}, slices] here, got {list(given.shape)}"
        )
    if given.requires_grad:
        raise SwquantError("directions of sliced_wasserstein are constants and get no gradient: detach them")
    return given.to(points)
