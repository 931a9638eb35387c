"""Our codes as torchao's tensors, for what is built on them: compilation, export, packing for ARM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swquant.integrations.versions import require_version
from swquant.quant.qtensor import QTensor
from swquant.runtime.linear import PackedLinear
from swquant.runtime.loading import load

SUPPORTED = ("0.18", "0.19")
"""torchao's versions, from the first to before the second, for which this was written."""


def load_torchao(
    directory: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    int8_activations: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load what ``swquant quantize`` wrote, its weights as torchao's ``IntxUnpackedToInt8Tensor``.

    ::

        model = torch.compile(load_torchao("./model-w4"))

    That tensor has a byte for each code, scales and zero points, so the model takes as much memory as one of 8 bits; it
    is what torchao exports from and what its kernels for ARM are packed from::

        quantized weight = (qdata - zero_point) * scale,  qdata in [-2^(bits - 1), 2^(bits - 1) - 1]

    Args:
        directory: The output's directory, or a hub name.
        device: Where to; ``auto`` is the accelerator if there is one.
        dtype: Of everything that is not codes; by default as stored.
        int8_activations: torchao also rounds what each linear reads to 8 bits, a grid for each token, as its packing
            for ARM asks for; what the report measured is without.
        trust_remote_code: Run the Python code that comes with the model.

    Returns:
        transformers' model in eval mode, plain linears with such weights in the place of packed ones.

    Raises:
        SwquantError: torchao is missing or of a version that this was not written for, or as :func:`swquant.load`.
    """
    require_version("torchao", *SUPPORTED)
    model = load(directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
    for name, layer in packed:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = to_torchao(layer.quantized(), layer.weight_scale.dtype, int8_activations=int8_activations)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias, requires_grad=False)
        model.set_submodule(name, linear)
    # What it says of itself is that its layers are packed, as compressed-tensors has them.
    del model.config.quantization_config
    return model.eval()


def to_torchao(q: QTensor, dtype: torch.dtype, *, int8_activations: bool = False) -> Tensor:
    """A weight on a uniform grid as torchao's tensor.

    Args:
        q: Codes and grid.
        dtype: Of scales and of the dequantized weight; one that holds the scales exactly.
        int8_activations: See :func:`load_torchao`.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (  # pyright: ignore[reportMissingImports]
        IntxUnpackedToInt8TensorActivationQuantization as Activations,
    )

    offset, width = q.spec.mid_code, q.spec.group_width(q.codes.shape[1])
    qdata, zero = ((value.to(torch.int16) - offset).to(torch.int8) for value in (q.codes, q.zero))
    rounded = Activations.INT8_ASYM_PER_TOKEN if int8_activations else None
    codes = getattr(torch, f"int{q.spec.bits}")
    return IntxUnpackedToInt8Tensor(qdata, q.scale.to(dtype), zero, codes, (1, width), dtype, rounded)
