"""Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1: products on the CPU, one line a mistake."""

from __future__ import annotations

import itertools
import sys

import torch

from swquant.quant.bits import pack
from swquant.runtime.kernels import PackedWeight
from swquant.runtime.triton_source import matmul_product, matvec_product

SHAPES = ((40, 128, 32), (70, 256, 64), (33, 37, 37), (5, 300, 300))
"""Outputs, inputs, inputs per group; the last two are per channel and fill no words."""

KINDS = ((matvec_product, 1), (matvec_product, 3), (matmul_product, 21))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""The interpreter cuts where bfloat16 rounds, and multiplies bfloat16 blocks as integers (3.9): no matmul."""


def main() -> None:
    bits = int(sys.argv[1])
    rng = torch.Generator().manual_seed(bits)
    for symmetric, (out, inputs, width), dtype in itertools.product((True, False), SHAPES, TOLERANCE):
        groups = inputs // width
        codes = torch.randint(1 << bits, (out, inputs), generator=rng).to(torch.uint8)
        zero = torch.randint(1 << bits, (groups, out), generator=rng).to(torch.uint8)
        scale = ((torch.rand(out, groups, generator=rng) - 0.5) * 0.2).bfloat16().to(dtype)
        packed = None if symmetric else pack(zero, bits).T.contiguous()
        weight = PackedWeight(pack(codes, bits), scale, packed, bits, inputs)
        for product, rows in KINDS:
            if product is matmul_product and dtype == torch.bfloat16:
                continue
            x = torch.randn(rows, inputs, generator=rng).to(dtype)
            expected = x.double() @ weight.dequantize(torch.float64).T
            found = product(x, weight, tuned=False)
            error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
            if found.dtype != dtype or not error < TOLERANCE[dtype]:
                print(f"{product.__name__} {symmetric=} {out=} {inputs=} {width=} {dtype} {rows=}: {error}")


if __name__ == "__main__":
    main()
