"""A linear layer on packed codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swquant.errors import SwquantError
from swquant.quant.bits import pack, packed_words, unpack
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import QuantSpec
from swquant.runtime.kernels import AUTO, PackedWeight
from swquant.runtime.ops import packed_linear

ROWS_AT_ONCE = 256
"""Rows that are packed together, which takes 16 bytes a code."""


class NoSuchAttributeError(SwquantError, AttributeError):
    """Code has asked a packed layer for what it does not have."""


class PackedLinear(nn.Module):
    """``x @ W.T + bias`` where ``W [out, in]`` is kept as codes, scales and zero points, and never as a whole.

    Its state is buffers alone, named and laid out as compressed-tensors has them, so that ``save_pretrained`` of a
    model with such layers writes that format::

        weight_packed      int32 [out, ceil(in * bits / 32)]
        weight_scale       dtype [out, groups]
        weight_zero_point  int32 [ceil(out * bits / 32), groups]    asymmetric only
        weight_shape       int64 [2]
        bias               dtype [out]                              where there is one

    Gradients pass through to the input; the layer itself has nothing to train.

    Attributes:
        spec: The weight's grid.
        in_features: Inputs.
        out_features: Outputs.
        kernel: Which kernel multiplies, a name in ``swquant.runtime.kernels``; ``auto`` chooses for each call.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kernel: str = AUTO,
    ) -> None:
        super().__init__()
        spec.require_divides("the layer", in_features)
        self.spec, self.in_features, self.out_features, self.kernel = spec, in_features, out_features, kernel
        groups = spec.groups(in_features)

        def words(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.register_buffer("weight_packed", words(out_features, packed_words(in_features, spec.bits)))
        self.register_buffer("weight_scale", torch.zeros(out_features, groups, dtype=dtype, device=device))
        zero = None if spec.symmetric else words(packed_words(out_features, spec.bits), groups)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    def fill(self, q: QTensor, device: torch.device) -> None:
        """Take the codes and the grid of ``q``, packed, to ``device``.

        Raises:
            SwquantError: If its shape or grid is not the layer's, or a scale is not one of the layer's dtype.
        """
        if q.spec != self.spec or tuple(q.codes.shape) != (self.out_features, self.in_features):
            raise SwquantError(
                f"a weight {q.spec.label} {list(q.codes.shape)} was found, "
                f"expected {self.spec.label} {[self.out_features, self.in_features]}; write the model again"
            )
        scale = q.scale.to(self.weight_scale.dtype)
        if not torch.equal(scale.to(q.scale.dtype), q.scale):
            raise SwquantError(f"{scale.dtype} cannot represent the scales; load the model with another dtype")
        bits = self.spec.bits
        self.weight_packed = torch.cat([pack(codes, bits).to(device) for codes in q.codes.split(ROWS_AT_ONCE)])
        self.weight_scale = scale.to(device)
        self.weight_zero_point = None if self.spec.symmetric else pack(q.zero.T, bits).T.contiguous().to(device)
        self.weight_shape = torch.tensor(q.codes.shape, device=device)

    @property
    def weight(self) -> Tensor:
        """``W [out, in]`` in the dtype of the scales, for a model's code that does not call the layer but reads it.

        It is dequantized anew each time, which costs an unpacking of all codes and, until the caller drops it, as much
        memory as the plain weight. Nothing keeps it, so that changing it changes nothing.
        """
        zero, width = self.weight_zero_point, self.in_features
        packed = PackedWeight(self.weight_packed, self.weight_scale, zero, self.spec.bits, width)
        return packed.dequantize(self.weight_scale.dtype)

    def __getattr__(self, name: str) -> Any:
        """See ``torch.nn.Module``; what neither it nor the layer has is refused in a sentence."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise NoSuchAttributeError(
                f"a packed linear has no {name!r}, for which the model's code asks; quantize the model with the format "
                "dequantized and load that in transformers"
            ) from None

    @property
    def qweight(self) -> Tensor:
        """The codes, by the name under which peft asks on which device a quantized layer lies."""
        return self.weight_packed

    def quantized(self) -> QTensor:
        """Codes and grid, unpacked."""
        bits, scale = self.spec.bits, self.weight_scale.float()
        codes = unpack(self.weight_packed, bits, self.in_features)
        if self.weight_zero_point is None:
            zero = torch.full_like(scale, self.spec.mid_code, dtype=torch.uint8)
        else:
            zero = unpack(self.weight_zero_point.T, bits, self.out_features).T.contiguous()
        return uniform(codes, scale, zero, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x [..., in]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input is {list(x.shape)}, expected {self.in_features} in the last dimension")
        product = packed_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.spec.bits, self.kernel
        )
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        symmetry = "symmetric" if self.spec.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.spec.label}, {symmetry}"
