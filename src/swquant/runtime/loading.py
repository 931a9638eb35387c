"""A quantized model of any format as a transformers model whose linears stay packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GenerationConfig
from transformers.core_model_loading import build_glob_alternation

from swquant.checkpoint.converted import to_memory
from swquant.checkpoint.names import Names
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, QuantizedModel, shapes_of
from swquant.checkpoint.reader import find_model
from swquant.device import resolve_device
from swquant.errors import SwquantError, reason_of
from swquant.formats import read_quantized
from swquant.formats.base import check_dtype
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.formats.reading import generation_settings
from swquant.model.layout import plain_matrices
from swquant.model.skeleton import build_model, tie
from swquant.model.whole import require_called_for
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import UNIFORM, QuantSpec
from swquant.runtime.kernels import AUTO, require_kernel
from swquant.runtime.linear import PackedLinear

GENERATION = "generation_config.json"


def load(
    directory: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = AUTO,
    trust_remote_code: bool = False,
) -> Any:
    """Load what ``swquant quantize`` wrote, in any format that keeps codes, without dequantizing it.

    The result is the model of transformers, ready for ``generate``, ``torch.compile`` and ``save_pretrained`` (which
    writes compressed-tensors); each quantized linear is a :class:`~swquant.runtime.linear.PackedLinear`, but for those
    of a class that computes something else than ``x @ W.T + bias`` with its weight, which are dequantized. Memory
    holds the packed model and one tensor more.

    Args:
        directory: The output's directory, or a hub name.
        device: Where to; ``auto`` is the accelerator if there is one.
        dtype: Of everything that is not codes; by default as stored.
        kernel: Which kernel multiplies, ``auto`` for the best that runs; see ``docs/runtime.md``.
        trust_remote_code: Run the Python code that comes with the model.

    Returns:
        A ``PreTrainedModel`` in eval mode.

    Raises:
        SwquantError: There is no such model, it is damaged, or the device, the dtype or the kernel cannot be used.
    """
    place = find_model(directory, trusted=trust_remote_code)
    target = resolve_device(device)
    _, quantized = read_quantized(place, trusted=trust_remote_code)
    outline = quantized.outline
    for spec in outline.specs:
        if spec.grid != UNIFORM:
            raise SwquantError(
                f"{place} is on the grid {spec.grid}, for which swquant has no layer; load it as its format is loaded"
            )
    stored = outline.dtype if dtype is None else dtype
    check_dtype(stored)
    if kernel != AUTO:
        require_kernel(kernel, target, stored)
    shapes = shapes_of(quantized)
    model, names, packed = _empty_model(quantized, shapes, stored, kernel)
    wide = _kept_wide(model, stored)
    for name, value in to_memory(names, quantized.parts()):
        if isinstance(value, Tensor):
            _fill_plain(model, name, value, target, wide(name))
        elif isinstance(layer := model.get_submodule(module := name.removesuffix(".weight")), PackedLinear):
            _fill_packed(layer, module, value, target)
        else:
            _fill_plain(model, name, value.dequantize(), target, wide(name))
    tie(model)
    _require_filled(model, place)
    grids = {module: grid for module, grid in outline.grids.items() if module in packed}
    keys = {f"{module}.weight" for module in grids}
    known = replace(outline, grids=grids, ignored=plain_matrices(model.named_modules(), names, shapes, keys))
    setattr(model.config, QUANTIZATION_CONFIG, CompressedTensors().config(known))
    _set_generation(model, place)
    return model.to(target).eval()


def _set_generation(model: Any, place: Path) -> None:
    """Give the model the ``generation_config.json`` beside it.

    One that is no JSON object is passed over, as transformers passes over what it cannot read.

    Raises:
        SwquantError: transformers does not take what it says.
    """
    if not generation_settings(place):
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(place, local_files_only=True)
    except Exception as error:  # transformers checks settings in as many ways as there are settings
        raise SwquantError(
            f"{place / GENERATION} does not say how text is generated ({reason_of(error)}); mend it or take it away"
        ) from error


def _empty_model(
    quantized: QuantizedModel, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, kernel: str
) -> tuple[Any, Names, set[str]]:
    """The model with packed layers, on ``meta`` but for the buffers that it computes.

    Returns:
        The model, where its tensors lie, and the modules on disk that are packed layers in it.
    """
    outline = quantized.outline
    model, names = build_model(outline.config, shapes, outline.directory, dtype)
    require_called_for(names, outline.linears, outline.directory)
    places = {
        piece.key.removesuffix(".weight"): name.removesuffix(".weight")
        for name, piece in names.pieces.items()
        if piece.whole
    }
    packed: set[str] = set()
    products: dict[type[nn.Linear], bool] = {nn.Linear: True}
    for module, shape in outline.linears.items():
        name, spec = places.get(module, module), outline.grids[module]
        linear = _linear(model, name, shape, outline.directory)
        spec.require_divides(name, shape[1])
        if type(linear) not in products:
            products[type(linear)] = _is_product(linear)
        if products[type(linear)]:
            model.set_submodule(name, _packed(linear, spec, dtype, kernel))
            packed.add(module)
    return model, names, packed


def _linear(model: nn.Module, name: str, shape: tuple[int, int], directory: Path) -> nn.Linear:
    """The linear ``name`` of the model as its code makes it, on ``meta``."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
        raise SwquantError(
            f"{directory} holds a quantized weight {name!r} of shape {list(shape)}, "
            "which its config.json does not call for"
        )
    return linear


@torch.no_grad()
def _is_product(linear: nn.Linear) -> bool:
    """Whether a linear of a class of its own computes ``x @ W.T + bias``, found on random values.

    Falcon's does; DeepSeek-V4's, which multiplies groups of its inputs by groups of its rows, does not.
    """
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.randn(value.shape, generator=draw) for name, value in linear.named_parameters()}
    x = torch.randn(2, 3, linear.in_features, generator=draw)
    try:
        found = functional_call(linear, values, (x,))
    except Exception:  # a class's own code raises whatever such an input makes it run into
        return False
    expected = nn.functional.linear(x, values["weight"], values.get("bias"))
    close = isinstance(found, Tensor) and found.shape == expected.shape
    return close and torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def _packed(linear: nn.Linear, spec: QuantSpec, dtype: torch.dtype, kernel: str) -> PackedLinear:
    """The packed layer, on ``meta``, for the place of ``linear``."""
    return PackedLinear(
        spec,
        linear.in_features,
        linear.out_features,
        bias="bias" in dict(linear.named_parameters()),
        dtype=dtype,
        device=torch.device("meta"),
        kernel=kernel,
    )


def _fill_packed(layer: PackedLinear, name: str, q: QTensor, device: torch.device) -> None:
    try:
        layer.fill(q, device)
    except SwquantError as error:
        raise SwquantError(f"{name}: {error}") from error


def _kept_wide(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which tensors the model's class keeps in float32 in any dtype, such as corrections of routers' scores."""
    patterns = list(model._get_dtype_plan(dtype))
    found = build_glob_alternation(patterns)[0] if patterns else None
    return lambda name: found is not None and found.search(name) is not None


def _fill_plain(model: nn.Module, name: str, value: Tensor, device: torch.device, wide: bool) -> None:
    """Put a tensor where the model has it; what the model does not have, such as stored rotary tables, stays out."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return
    slots: Mapping[str, Tensor | None] = {**dict(module.named_parameters(recurse=False)), **_state(module)}
    here = slots.get(leaf)
    if here is None:
        return
    if here.shape != value.shape:
        raise SwquantError(f"{name} has the shape {list(value.shape)}, config.json calls for {list(here.shape)}")
    filled = value.to(device, torch.float32 if wide else here.dtype)
    setattr(module, leaf, nn.Parameter(filled, requires_grad=False) if isinstance(here, nn.Parameter) else filled)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved."""
    saved = module.state_dict(keep_vars=True)
    return {name: value for name, value in module.named_buffers(recurse=False) if name in saved}


def _require_filled(model: nn.Module, directory: Path) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise SwquantError(f"{directory} has no tensor {name!r}, which its config.json calls for")
