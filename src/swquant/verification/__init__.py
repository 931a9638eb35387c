"""Written outputs, opened again: by our own reader, and by code that is not ours."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from swquant import registry
from swquant.checkpoint.converted import Blend, Stack
from swquant.checkpoint.quantized import Part, QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.errors import SwquantError, reason_of
from swquant.formats.base import Format
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.phases.micro_batch import ran_out
from swquant.quant.qtensor import QTensor
from swquant.verification.base import Reader

Result = TypeVar("Result")

LARGEST_DIVERGENCE = 0.05
"""Nats per token between our predictions and a runtime's beyond which an output counts as broken.

Arithmetic in half precision or with 8-bit activations stays far below it; a zero point that is off by one does not.
"""


@dataclass(frozen=True)
class Verification:
    """What was found equal.

    Attributes:
        weights: Quantized weights whose codes, scales and zero points our reader gave back bit for bit; 0 for a
            format that does not keep codes.
        reader: The package, with its version, that gave back the same weights; ``None`` if it is not installed.
        runtime: The packages that computed logits from the output; ``None`` if that was not asked for, or they are
            not installed.
        kl: Mean of ``KL(ours || runtime's)`` in nats per token over one sample.
        top1: Share of its tokens for which both rank the same token first.
    """

    weights: int
    reader: str | None = None
    runtime: str | None = None
    kl: float | None = None
    top1: float | None = None


def verify(form: Format, directory: Path, model: QuantizedModel, sample: tuple[Tensor, Tensor] | None) -> Verification:
    """Open what ``form`` has written for ``model``, and compare.

    Args:
        form: The format.
        directory: Its output.
        model: What was to be written.
        sample: Tokens ``int64 [1, tokens]`` and the logits of the quantized model for them; ``None`` leaves the
            runtime out.

    Raises:
        SwquantError: Something differs; the output must not be used.
    """
    weights = _compare_codes(form, directory, model)
    reader = _reader(form)
    if reader is None:
        return Verification(weights)
    named = None if reader.package is None else _installed((reader.package,))
    if named is not None and not _asked(named, form, lambda: _compare_weights(reader, directory, model)):
        named = None
    unread = form.name == CompressedTensors.name and model.outline.unread is not None
    runtime = None if sample is None or unread or not reader.runtime else _installed(reader.runtime)
    if runtime is None or sample is None:
        return Verification(weights, named)
    found = _asked(runtime, form, lambda: _compare_logits(reader, directory, sample))
    if found is None:
        return Verification(weights, named)
    kl, top1 = found
    if not kl < LARGEST_DIVERGENCE:
        raise SwquantError(
            f"the {form.name} output predicts otherwise in {runtime} than here, by {kl:.3g} nats per token, expected "
            f"less than {LARGEST_DIVERGENCE}; it was not published: please report this with your swquant.yaml"
        )
    return Verification(weights, named, runtime, kl, top1)


def _reader(form: Format) -> Reader | None:
    return registry.load(__name__, form.name)() if form.name in registry.names(__name__) else None


def _installed(packages: tuple[str, ...]) -> str | None:
    """The packages with their versions, or ``None`` if one is missing."""
    try:
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    except importlib.metadata.PackageNotFoundError:
        return None


def _asked(packages: str, form: Format, question: Callable[[], Result]) -> Result | None:
    """What other software answers; ``None`` where it does not start on this machine, such as MLX without a backend.

    Raises:
        SwquantError: It does not read the output, or gives something else.
    """
    try:
        return question()
    except ImportError:
        return None
    except (SwquantError, MemoryError):
        raise
    except Exception as error:  # packages raise whatever an output makes them run into
        if ran_out(error):
            raise
        raise SwquantError(
            f"{packages} does not open the {form.name} output ({reason_of(error)}); it was not published"
        ) from error


def _compare_codes(form: Format, directory: Path, model: QuantizedModel) -> int:
    back = form.read(directory, read_config(directory))
    if back is None:
        return 0
    # Parts come back in the files' order, not in ours: digests let both be read once, a part at a time.
    expected: dict[str, str] = {}
    for part in model.parts():
        expected |= _digests(part)
    found: dict[str, str] = {}
    for part in back.parts():
        found |= _digests(part)
    for name in expected:
        if found.get(name) != expected[name]:
            state = "is missing" if name not in found else "differs"
            raise SwquantError(
                f"{name} {state} in the {form.name} output that was just written; check the disk, "
                "or report this with your swquant.yaml"
            )
    return len(model.outline.linears) + len(model.outline.ends)


def _digests(part: Part) -> Mapping[str, str]:
    return {name: _digest(value) for name, value in part.items()}


def _plain(value: Tensor) -> Tensor:
    """In float32; vectors plus 1, because a GGUF file holds Gemma's norms so, with the digits that this sum has."""
    return 1 + value.float() if value.dim() == 1 else value.float()


def _digest(value: Tensor | QTensor | Stack | Blend) -> str:
    if isinstance(value, Stack | Blend):
        raise ValueError("formats that keep codes hold no weights that are put together")
    tensors = (_plain(value),) if isinstance(value, Tensor) else (value.codes, *value.parts.values())
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().reshape(-1).numpy().data)
    return digest.hexdigest()


def _compare_weights(reader: Reader, directory: Path, model: QuantizedModel) -> bool:
    """Whether the package knows such weights; those it reads are compared."""
    for part in model.parts():
        for name, value in part.items():
            if isinstance(value, Tensor | Stack | Blend):
                continue
            spec = value.spec
            found = reader.weight(directory, name.removesuffix(".weight"), spec)
            if found is None:
                return False
            expected = value.dequantize()
            allowed = reader.tolerance(spec) * max(value.steps.abs().max(), expected.abs().max() / 2**spec.bits)
            if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
                raise SwquantError(
                    f"{reader.package} reads another {name} from the output than was trained; it was not published: "
                    "please report this with your swquant.yaml"
                )
    return True


def _compare_logits(reader: Reader, directory: Path, sample: tuple[Tensor, Tensor]) -> tuple[float, float]:
    tokens, logits = sample
    theirs = reader.logits(directory, tokens).float().log_softmax(-1)
    ours = logits.float().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    same = (torch.argmax(ours, -1) == torch.argmax(theirs, -1)).float().mean()
    return float(kl), float(same)
