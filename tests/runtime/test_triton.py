"""The Triton kernels: in Triton's interpreter, compiled for GPUs that are not there, and on one if there is one."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant.quant.bits import pack
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import BITS, QuantSpec
from swquant.runtime import PackedLinear
from swquant.runtime.kernels import PackedWeight
from swquant.runtime.kernels.plain import Plain
from swquant.runtime.kernels.triton import Triton

Make = Callable[[QuantSpec, int, int, int], QTensor]
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_products_in_the_interpreter(bits: int) -> None:
    script = Path(__file__).with_name("triton_products.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(bits)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", BITS)
def test_they_compile_for_ampere_and_hopper(
    bits: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swquant.runtime import triton_source

    block = {"BLOCK_N": 16, "BLOCK_P": 32}, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64}
    for symmetric, dtype in itertools.product((True, False), ("bf16", "fp16", "fp32")):
        for kernel, sizes in zip((triton_source.matvec, triton_source.matmul), block, strict=True):
            meta: dict[str, Any] = {"BITS": bits, "SYMMETRIC": symmetric, **sizes}
            pointers = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
            pointers |= dict.fromkeys(("x_ptr", "scale_ptr", "out_ptr"), f"*{dtype}")
            kinds = {name: "constexpr" if name in meta else pointers.get(name, "i32") for name in kernel.arg_names}
            constants = {(kernel.arg_names.index(name),): value for name, value in meta.items()}
            source = ASTSource(kernel, kinds, constexprs=constants)
            code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            uses_tensor_cores = "mma" in code
            assert uses_tensor_cores == (kernel is triton_source.matmul and dtype != "fp32")


def test_refusals_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "CUDA" in str(Triton().refusal(torch.device("cpu"), torch.float32))
    assert "float64" in str(Triton().refusal(cuda, torch.float64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "swquant[triton]" in str(Triton().refusal(cuda, torch.float32))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_products_on_a_gpu(
    bits: int, symmetric: bool, group: int | None, dtype: torch.dtype, make_packed: Make
) -> None:
    q = make_packed(QuantSpec(bits, group, symmetric), 200, 37 if group is None else 384, bits)
    zero = None if symmetric else pack(q.zero.T, bits).T.contiguous().cuda()
    weight = PackedWeight(pack(q.codes, bits).cuda(), q.scale.to("cuda", dtype), zero, bits, q.codes.shape[1])
    for rows in (1, 4, 5, 130):
        x = torch.randn(rows, weight.in_features, device="cuda", dtype=dtype)
        expected = Plain().multiply(x.double(), weight)
        found = Triton().multiply(x, weight)
        assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.gpu
@needs_triton
def test_a_layer_on_a_gpu_compiles_and_has_gradients(make_packed: Make) -> None:
    q = make_packed(QuantSpec(2, 64, False), 128, 256, 0)
    layer = PackedLinear(q.spec, 256, 128, bias=False, dtype=torch.bfloat16)
    layer.fill(q, torch.device("cuda"))
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    layer(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
