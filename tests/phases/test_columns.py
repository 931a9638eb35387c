"""GPTQ's inner loop: compiled, it yields the bits of plain torch."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swquant.phases import columns
from swquant.phases.columns import round_columns
from swquant.phases.gptq import _compensated as compensated
from swquant.phases.gptq import _factored, _invert_upper
from swquant.quant.draft import Slot, open_draft
from swquant.quant.grid import Grid, extent_of, minmax_grid
from swquant.quant.spec import QuantSpec

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 4, 8), (32, 64, 128, None), (True, False))]
GRIDS += [QuantSpec.named(name) for name in ("q2_k", "q3_k", "q4_k")]


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch):
    """A function that has columns rounded by numba, and counts them, or by plain torch."""
    pytest.importorskip("numba")
    counted: list[int] = []
    real = columns._by_numba

    def note(work: Tensor, errors: Tensor, *rest: object) -> None:
        counted.append(len(errors))
        real(work, errors, *rest)

    def choose(numba: bool) -> list[int]:
        monkeypatch.setattr(columns, "_numba_pays", lambda work: numba)
        counted.clear()
        return counted

    monkeypatch.setattr(columns, "_by_numba", note)
    return choose


def case(rows: int, width: int, spec: QuantSpec, seed: int) -> tuple[Tensor, Slot, Tensor]:
    """A weight, of which every fifth column lies half-way between levels, and the second moments of its inputs."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=rng)
    grid = minmax_grid(extent_of(weight, spec), spec, 1.0, 1.0, None)
    ties = (torch.randint(-3, 4, weight.shape, generator=rng) + 0.5) * grid.scale.expand(
        rows, spec.groups(width), spec.group_width(width)
    ).reshape(rows, width)
    weight[:, ::5] = ties[:, ::5]
    inputs = torch.randn(2 * width, width, generator=rng) @ (
        torch.eye(width) + 0.05 * torch.randn(width, width, generator=rng)
    )
    return weight, open_draft({"w": weight}, ("w",), spec).slots["w"], inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("spec", GRIDS, ids=lambda spec: f"{spec.label}-{spec.symmetric}")
def test_numba_gives_the_bits_of_torch(spec: QuantSpec, by) -> None:
    width = 512 if spec.super_width else 256
    weight, slot, second = case(41, width, spec, 1)
    for act_order, search in itertools.product((False, True), (False, True)):
        inputs = _factored(second, 0.01, act_order, "w", [])
        by(False)
        values, grid = compensated(weight, slot, inputs, search)
        counted = by(True)
        fast, same = compensated(weight, slot, inputs, search)
        assert sum(counted) == width
        assert torch.equal(fast, values)
        assert all(torch.equal(same.parts[name], part) for name, part in grid.parts.items())
        assert not torch.equal(fast, weight)


def test_threads_and_float64_change_nothing(by, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(3, 64, False)
    weight, slot, second = case(700, 128, spec, 2)
    inputs = _factored(second, 0.01, False, "w", [])
    by(False)
    values = compensated(weight, slot, inputs, True)[0]
    assert by(True) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(compensated(weight, slot, inputs, True)[0], values)
    wide = weight.double()
    slot = open_draft({"w": wide}, ("w",), spec).slots["w"]
    inputs = _factored(second.double(), 0.01, False, "w", [])
    found = compensated(wide, slot, inputs, True)[0]
    by(False)
    assert found.dtype == torch.float64
    assert torch.equal(found, compensated(wide, slot, inputs, True)[0])


def test_values_that_are_not_finite_stay_so(by) -> None:
    spec = QuantSpec(2, None, False)
    grid = Grid(torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    found: list[list[Tensor]] = []
    for numba in (True, False):
        by(numba)
        work = torch.tensor([[1.0, float("nan"), float("inf")], [2.0, 3.0, 4.0]])
        errors = torch.empty(2, 3)
        round_columns(work, errors, torch.tensor([[1.0, 0.5], [0.0, 2.0]]), grid, [0, 0], spec)
        found.append([work, errors])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=0, equal_nan=True)
    assert found[0][1][0].isnan().tolist() == [False, True, False]


def test_a_numba_that_cannot_be_imported_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swquant.phases.numba_columns", raising=False)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    columns._numba_works.cache_clear()
    with pytest.warns(UserWarning, match="Numba needs NumPy"):
        assert not columns._numba_works()
    columns._numba_works.cache_clear()


def test_the_inverse_of_a_triangle_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swquant.phases.gptq.WHOLE", 3)
    rng = torch.Generator().manual_seed(0)
    for size in (1, 3, 4, 11, 64):
        upper = torch.randn(size, size, generator=rng, dtype=torch.double).triu() + 3 * torch.eye(size)
        inverse = upper.clone()
        _invert_upper(inverse)
        torch.testing.assert_close(inverse @ upper, torch.eye(size, dtype=torch.double))
        assert torch.equal(inverse, inverse.triu())


@needs_triton
@pytest.mark.slow
def test_triton_gives_the_bits_of_torch_in_its_interpreter() -> None:
    script = Path(__file__).with_name("triton_columns.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shifted", [True, False])
def test_triton_compiles_it_without_fused_products(
    shifted: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swquant.phases.triton_columns import kernel

    meta = {"SHIFTED": shifted, "COLUMNS": 128, "ROWS": 16}
    kinds = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("columns", "rows", "count"), "i32")
    kinds |= {"group_ptr": "*i32", "most": "fp32"} | dict.fromkeys(meta, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in meta.items()}
    source = ASTSource(kernel, kinds, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert "div.rn.f32" in code
    assert "div.full" not in code
    assert "fma.rn.f32" not in code


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("spec", [QuantSpec(2, 64, True), QuantSpec(3, None, False), QuantSpec.named("q2_k")])
def test_on_a_gpu(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, slot, second = case(300, 512, spec, 3)
    inputs = _factored(second.cuda(), 0.01, False, "w", [])
    found: list[Tensor] = []
    slot = open_draft({"w": weight.cuda()}, ("w",), spec).slots["w"]
    for fused in (True, False):
        monkeypatch.setattr(columns, "_triton_works", lambda device, fused=fused: fused)
        found.append(compensated(weight.cuda(), slot, inputs, True)[0])
    assert torch.equal(*found)
