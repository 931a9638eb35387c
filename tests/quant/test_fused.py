"""Quantizing by Triton's kernels: in its interpreter, compiled for GPUs that are not there, on one where there is."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant.quant import rounding
from swquant.quant.grid import extent_of, minmax_grid
from swquant.quant.spec import BITS, QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_values_to_the_bit_and_gradients_in_the_interpreter(bits: int) -> None:
    script = Path(__file__).with_name("triton_fused.py")
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
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_they_compile_with_exact_division(
    kind: int, one: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swquant.quant import fused_source

    flags = dict.fromkeys(("WEIGHT", "SCALE", "STEP", "ZERO", "VALUES"), True) | {"ONE": one}
    for kernel, dtype in itertools.product((fused_source.forward, fused_source.backward), ("bf16", "fp32")):
        meta: dict[str, Any] = {"KIND": kind, "BLOCK_G": 8, "BLOCK_W": 128, **flags}
        meta = {name: value for name, value in meta.items() if name in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, "*fp32") | {"groups": "i32", "width": "i32", "most": "fp32"}
        kinds |= {name: f"*{dtype}" for name in ("weight_ptr", "weight_out") if name in kinds}
        kinds |= dict.fromkeys(meta, "constexpr")
        constants = {(kernel.arg_names.index(name),): value for name, value in meta.items()}
        source = ASTSource(kernel, kinds, constexprs=constants)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert "div.rn.f32" in code
        assert "div.full" not in code


def test_a_triton_that_cannot_build_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It fails as it is imported here; where a kernel cannot be built, as it is first called. It is told of once."""
    (tmp_path / "triton.py").write_text("raise RuntimeError('Failed to find C compiler')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swquant.quant.fused_source", raising=False)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    rounding._triton_works.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert not rounding._triton_works(torch.device("cpu"))
    assert not rounding._triton_works(torch.device("cpu"))
    rounding._triton_works.cache_clear()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [None, 64])
def test_on_a_gpu(size: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(2, size, symmetric=False)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1536, generator=rng).to(dtype)
    upstream = torch.randn(300, 1536, generator=rng).cuda()
    grid = minmax_grid(extent_of(weight, spec), spec, 0.7, 0.8, None)
    found: list[list[torch.Tensor | None]] = []
    for fused in (True, False):
        monkeypatch.setattr(rounding, "_fused", lambda weight, fused=fused: fused)
        w, s = weight.cuda().requires_grad_(), grid.scale.cuda().requires_grad_()
        out = rounding.fake_quantize(w, rounding.Grid(s, grid.zero.cuda()), spec)
        out.backward(upstream)
        found.append([out.detach(), w.grad, s.grad])
    (out, by_weight, by_scale), (plain, plain_by_weight, plain_by_scale) = found
    assert torch.equal(out, plain)
    torch.testing.assert_close(by_weight, plain_by_weight)
    torch.testing.assert_close(by_scale, plain_by_scale, rtol=1e-4, atol=1e-3)
