"""What one block lost: its outputs and codes beside the original's, rounded to the nearest and as they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swquant.losses.transport import gaussian_directions
from swquant.quant.codes import code_entropy, share_at_ends
from swquant.quant.kind import row_bits
from swquant.quant.qtensor import QTensor
from swquant.report import CodeUse, FinalCodes, Measured, Shift, Slice
from swquant.seeds import generator

Floats = np.ndarray[Any, np.dtype[np.float32]]

TOKENS = 2048
"""At most so many tokens are measured, or one sample where that is longer."""

DIRECTIONS, SHOWN, BINS = 64, 2, 64
"""Directions that are projected on, those of them whose distributions are kept in any case, and bins of these."""

TAIL = 0.002
"""Share of the tokens at either end that may lie outside of the bins."""

DIGITS = 6


def measured_samples(validation: Sequence[int], evaluation: Sequence[int], tokens: int) -> list[int]:
    """Samples to measure on: evaluation and validation samples by turns, as many as :data:`TOKENS` allows.

    Args:
        validation: Calibration samples for validation; a lone sample trained a block all the same.
        evaluation: Samples that trained nothing.
        tokens: Of a sample.
    """
    turns = [sample for pair in zip(evaluation, validation, strict=False) for sample in pair]
    shorter = min(len(validation), len(evaluation))
    return sorted([*turns, *validation[shorter:], *evaluation[shorter:]][: max(1, TOKENS // tokens)])


def outputs_of(target: Tensor, before: Tensor, after: Tensor) -> tuple[float, Shift, Shift, tuple[Slice, ...]]:
    """Compare outputs ``float32 [samples, tokens, dim]`` on the CPU.

    Args:
        target: Those of the original model.
        before: Those of the block with its weights rounded to the nearest.
        after: Those of the quantized block.

    Returns:
        ``rms``, ``before``, ``after`` and ``slices`` of :class:`swquant.report.Measured`.
    """
    clouds = [value.flatten(0, -2) for value in (target, before, after)]
    rows = _projections(clouds)
    distances = [np.abs(other - rows[0]).mean(axis=1) for other in rows[1:]]
    original = _moments(clouds[0])
    shifts = [_shift(original, cloud, float(far.mean())) for cloud, far in zip(clouds[1:], distances, strict=True)]
    finite = all(bool(np.isfinite(values).all()) for values in rows)
    chosen = [*range(SHOWN), int(distances[1].argmax())] if finite else []
    slices = tuple(_slice(index, [values[index] for values in rows], distances) for index in dict.fromkeys(chosen))
    return _short(float(original.energy.sum() / target.numel()) ** 0.5), shifts[0], shifts[1], slices


def shift_of(target: Tensor, outputs: Tensor) -> Shift:
    """How far ``outputs`` are from ``target``, both ``float32 [samples, tokens, dim]`` on the CPU."""
    clouds = [value.flatten(0, -2) for value in (target, outputs)]
    original, own = _projections(clouds)
    return _shift(_moments(clouds[0]), clouds[1], float(np.abs(own - original).mean()))


def final_codes(codes: Tensor, bits: int) -> FinalCodes:
    """What codes ``uint8 [out, in]`` hold."""
    return FinalCodes(_short(code_entropy(codes, bits)), _short(share_at_ends(codes, bits)))


def codes_of(before: Mapping[str, QTensor], after: Mapping[str, QTensor]) -> dict[str, CodeUse]:
    """How each weight uses its codes, by the name of its linear."""
    return {name.removesuffix(".weight"): _code_use(before[name], value) for name, value in after.items()}


def measure_block(
    outputs: tuple[Tensor, Tensor, Tensor],
    quantized: tuple[Mapping[str, QTensor], Mapping[str, QTensor]],
) -> Measured:
    """All of it: ``outputs`` as :func:`outputs_of` takes them, ``quantized`` as :func:`codes_of` does."""
    rms, before, after, slices = outputs_of(*outputs)
    return Measured(outputs[0].shape[:-1].numel(), rms, before, after, slices, codes_of(*quantized))


def _code_use(before: QTensor, after: QTensor) -> CodeUse:
    bits, (rows, columns) = after.spec.bits, after.codes.shape
    return CodeUse(
        shape=(rows, columns),
        bits=rows * row_bits(after.spec, columns),
        entropy_before=_short(code_entropy(before.codes, bits)),
        entropy_after=_short(code_entropy(after.codes, bits)),
        saturated_before=_short(share_at_ends(before.codes, bits)),
        saturated_after=_short(share_at_ends(after.codes, bits)),
    )


def _projections(clouds: Sequence[Tensor]) -> list[Floats]:
    """Each cloud ``[tokens, dim]`` along the fixed directions, sorted, ``[directions, tokens]``."""
    directions = gaussian_directions(clouds[0].shape[-1], DIRECTIONS, generator(0, "drift"), like=clouds[0])
    return [np.sort((cloud @ directions).t().numpy(), axis=1) for cloud in clouds]


@dataclass(frozen=True)
class _Moments:
    """Of outputs ``[tokens, dim]``: what of the original's is needed more than once."""

    outputs: Tensor
    energy: Tensor
    mean: Tensor
    variance: Tensor


def _moments(outputs: Tensor) -> _Moments:
    variance, mean = torch.var_mean(outputs, 0, correction=0)
    return _Moments(outputs, outputs.square().sum(1).double(), mean.double(), variance.double())


def _shift(original: _Moments, outputs: Tensor, distance: float) -> Shift:
    """How far ``outputs [tokens, dim]`` are off; ``distance`` is their sliced Wasserstein distance."""
    own = _moments(outputs)
    squares = (outputs - original.outputs).square().sum(1).double().sum()
    products = (outputs * original.outputs).sum(1).double()
    lengths = (own.energy * original.energy).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return Shift(
        mse=_short(float(squares) / outputs.numel()),
        relative_error=_ratio(squares, original.energy.sum()),
        cosine=_short(float((products / lengths).mean())),
        sliced_wasserstein=_short(distance),
        mean_shift=_ratio((own.mean - original.mean).norm(), original.variance.sum().sqrt()),
        variance_shift=_ratio((own.variance - original.variance).norm(), original.variance.norm()),
    )


def _slice(index: int, rows: Sequence[Floats], distances: Sequence[Floats]) -> Slice:
    """The distributions of three sorted projections ``[tokens]``, in bins that hold nearly all of them."""
    skipped = int(TAIL * len(rows[0]))
    low = min(float(row[skipped]) for row in rows)
    high = max(float(row[-1 - skipped]) for row in rows)
    high = high if high > low else low + 1
    edges = np.linspace(low, high, BINS + 1)
    original, before, after = (_counts(row, edges) for row in rows)
    far_before, far_after = (_short(float(distance[index])) for distance in distances)
    return Slice(index, _short(low), _short(high), original, before, after, far_before, far_after)


def _counts(row: Floats, edges: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, ...]:
    """How many values of a sorted row lie between each pair of edges, the last edge included."""
    after = np.searchsorted(row, edges)
    after[-1] = np.searchsorted(row, edges[-1], side="right")
    return tuple(np.diff(after).tolist())


def _ratio(value: Tensor, unit: Tensor) -> float:
    return _short(float(value / unit)) if float(unit) else 0.0


def _short(value: float) -> float:
    """With as many digits as a report needs."""
    return float(f"{value:.{DIGITS}g}")
