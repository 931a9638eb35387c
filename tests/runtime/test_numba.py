"""The kernel that numba compiles against the dequantized weight."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant.quant.bits import pack
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec
from swquant.runtime.kernels import PackedWeight, kernel_for

pytest.importorskip("numba")
numba_kernel = pytest.importorskip("swquant.runtime.kernels.numba")

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
MANY = numba_kernel.FEW_ROWS + 3


def packed(q: QTensor, dtype: torch.dtype) -> PackedWeight:
    zero = None if q.spec.symmetric else pack(q.zero.T, q.spec.bits).T.contiguous()
    return PackedWeight(pack(q.codes, q.spec.bits), q.scale.to(dtype), zero, q.spec.bits, q.codes.shape[1])


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    return numba_kernel.Numba().multiply(x, weight)


def exact(x: Tensor, q: QTensor) -> Tensor:
    return x.double() @ q.dequantize().double().T


def check(q: QTensor, rows: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(rows, q.codes.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    found, expected = product(x, packed(q, dtype)), exact(x, q)
    weights = q.dequantize().abs().double()
    bound = torch.finfo(dtype).eps * (x.double().abs() @ weights.T + 1) + 1e-6 * (x.double().abs().sum() + 1)
    assert found.dtype == dtype
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    spec=SPECS,
    out=st.integers(1, 70),
    width=st.integers(1, 3),
    rows=st.sampled_from([1, 3, MANY]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact_up_to_rounding_on_every_grid(
    spec: QuantSpec, out: int, width: int, rows: int, dtype: torch.dtype, seed: int, make_packed: Make
) -> None:
    columns = 37 * width if spec.group_size is None else width * spec.group_size
    check(make_packed(spec, out, columns, seed), rows, dtype, seed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=12)
@given(out=st.integers(1, 70), columns=st.integers(1, 130), rows=st.sampled_from([1, 3, MANY]))
def test_products_are_exact_up_to_rounding(
    bits: int, symmetric: bool, out: int, columns: int, rows: int, make_packed: Make
) -> None:
    check(make_packed(QuantSpec(bits, None, symmetric), out, columns, out), rows, torch.bfloat16, columns)


@pytest.mark.parametrize("bits", BITS)
def test_one_input_and_many_meet_in_float32(bits: int, make_packed: Make) -> None:
    q = make_packed(QuantSpec(bits, 64, False), 96, 192, bits)
    weight = packed(q, torch.float32)
    x = torch.randn(MANY, 192, generator=torch.Generator().manual_seed(0))
    together = product(x, weight)
    alone = torch.cat([product(row[None], weight) for row in x])
    assert torch.allclose(together, alone, atol=2e-4)
    assert torch.allclose(together.double(), exact(x, q), atol=2e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_many_inputs_are_multiplied_in_bfloat16_where_that_is_fast(
    fast: bool, make_packed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_kernel, "_narrow_is_fast", lambda: fast)
    q = make_packed(QuantSpec(4, 64, False), 96, 192, 0)
    x = torch.randn(MANY, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = product(x, packed(q, torch.bfloat16))
    rounded = torch.nn.functional.linear(x.float(), q.dequantize().bfloat16().float()).bfloat16()
    unrounded = exact(x, q).bfloat16()
    assert not torch.equal(rounded, unrounded)
    near, far = (rounded, unrounded) if fast else (unrounded, rounded)
    assert (found.float() - near.float()).abs().mean() < (found.float() - far.float()).abs().mean()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, MANY])
def test_threads_share_the_rows(rows: int, make_packed: Make, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q = make_packed(QuantSpec(3, 32, False), 101, 96, 0)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    alone = product(x, packed(q, torch.bfloat16))
    monkeypatch.setattr(numba_kernel, "WEIGHTS_PER_THREAD", 96)
    monkeypatch.setattr(numba_kernel, "WEIGHTS_AT_ONCE", 96 * 40)
    assert torch.allclose(product(x, packed(q, torch.bfloat16)), alone, atol=1e-5)


def test_scales_of_any_value_count(make_packed: Make) -> None:
    q = make_packed(QuantSpec(4, 32, True), 20, 64, 0)
    q = uniform(q.codes, q.scale * 1.001, q.zero, q.spec)
    x = torch.randn(2, 64)
    assert torch.allclose(product(x, packed(q, torch.float32)).double(), exact(x, q), atol=1e-4)


def test_it_is_the_choice_on_a_cpu(make_packed: Make) -> None:
    weight = packed(make_packed(QuantSpec(2, 32, True), 24, 64, 0), torch.float32)
    assert kernel_for("auto", torch.zeros(1, 64), weight).name == "numba"
    assert kernel_for("auto", torch.zeros(300, 64), weight).name == "numba"
    assert kernel_for("auto", torch.zeros(1, 64, dtype=torch.float64), weight).name == "plain"
    assert "CPU" in str(numba_kernel.Numba().refusal(torch.device("meta"), torch.float32))


def test_without_numba_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = numba_kernel.Numba().refusal(torch.device("cpu"), torch.float32)
    assert reason is not None
    assert "swquant[cpu]" in reason


def _child(x: Tensor, weight: PackedWeight, queue: multiprocessing.SimpleQueue[list[float]]) -> None:
    queue.put(product(x, weight)[0].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_makes_its_own_threads(
    make_packed: Make, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_kernel, "WEIGHTS_PER_THREAD", 96)
    q = make_packed(QuantSpec(2, 32, True), 64, 96, 0)
    x, weight = torch.randn(1, 96), packed(q, torch.float32)
    expected = product(x, weight)[0].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(x, weight, queue))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert queue.get() == expected
