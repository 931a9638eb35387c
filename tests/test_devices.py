"""Devices that are not here: a run's paths on tensors that say they are on CUDA, and where devices are named."""

from __future__ import annotations

import ast
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import swquant
from swquant import registry
from swquant.engine.block import Cached, stored_dtypes
from swquant.engine.head import measure
from swquant.estimate.live import without_values
from swquant.estimate.rig import Rig, bind
from swquant.losses import parse_loss
from swquant.losses.base import LossContext
from swquant.model.calls import Front
from swquant.model.skeleton import Call
from swquant.plan import make_plan
from swquant.quant.deferred import solid
from swquant.quant.draft import commit, realize
from swquant.recipe import Recipe
from swquant.seeds import generator

SOURCES = Path(swquant.__file__).parent
NAMED_IN = {"device.py", "engine/precision.py"}
NAMES = {"cuda", "mps", "xpu", "hip", "npu", "hpu"}
CUDA = torch.device("cuda")
SHAPE = (4, 16, 64)
needs_guards = pytest.mark.skipif(
    torch.version.cuda is None, reason="a torch built for CUDA is needed, and no GPU: views ask for its device guards"
)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on anything but the CPU, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device.type != "cpu":
                raise TypeError(f"{func} made float64 on {value.device}")
        return out


@contextmanager
def pretended() -> Generator[None]:
    """Tensors without values, of which operations on mixed devices, and float64 on a device, are refused."""
    with without_values(), NoFloat64():
        yield


@pytest.fixture(autouse=True)
def nothing_of_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    for module in ("swquant.quant.rounding", "swquant.phases.columns"):
        monkeypatch.setattr(f"{module}._triton_works", lambda device: False)


def _on_cuda(call: Call) -> Call:
    args, kwargs = tree_map_only(Tensor, lambda value: torch.empty_like(value, device=CUDA), (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


@contextmanager
def rigged(source: Path, method: str = "rtn", **values: Any) -> Generator[Rig]:
    recipe = Recipe(method=method, samples=3, seq_len=SHAPE[1], group_size=32, calibration="bundled", device="cpu")
    plan = make_plan(replace(recipe, **values), source)
    bound = bind(plan, 0, SHAPE[1], torch.device("cpu"), range(1, SHAPE[0] + 1))
    with pretended(), torch.no_grad():
        made = {key: _on_cuda(call) for key, call in bound.calls._made.items()}
        bound = replace(bound, device=CUDA, calls=replace(bound.calls, _made=made))
        dtypes = stored_dtypes(plan.job(), 0)
        state = bound.block.module.state_dict()
        params = {name: torch.empty(value.shape, dtype=dtypes[name], device=CUDA) for name, value in state.items()}
        cached = Cached(*(torch.empty(SHAPE) for _ in range(5)))
        yield Rig(plan, bound, params, cached)


def test_mixed_devices_and_float64_are_refused() -> None:
    with pretended():
        with pytest.raises(RuntimeError, match="device"):
            torch.empty(2, device=CUDA) + torch.empty(2)
        with pytest.raises(TypeError, match="made float64 on cuda"):
            torch.empty(2, device=CUDA).double()
        assert torch.empty(2, device=CUDA).cpu().double().dtype == torch.float64


@needs_guards
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_goes_through_a_draft_and_its_codes_on_the_device(llama: Path, symmetric: bool) -> None:
    with rigged(llama, symmetric=symmetric) as rig:
        rig.advance(rig.params)
        draft = rig.draft()
        floats = {name: solid(value) for name, value in realize(draft).items()}
        assert {value.device.type for value in floats.values()} == {"cuda"}
        committed = commit(draft)
        rig.advance(committed.floats())
        assert all(value.codes.device.type == "cuda" for value in committed.quantized.values())


@needs_guards
@pytest.mark.parametrize("width", [64, 22])
def test_losses_stay_on_the_device(width: int) -> None:
    for name in registry.names("swquant.losses"):
        loss = parse_loss(name)
        with pretended(), torch.no_grad():
            pred, target = (torch.empty(2, 16, width, device=CUDA) for _ in range(2))
            assert loss(pred, target, LossContext(generator(0, "loss"))).device.type == "cuda"


@needs_guards
def test_the_head_is_measured_on_the_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(Recipe(method="rtn", samples=3, seq_len=16, calibration="bundled", device="cpu"), llama)
    read = {name: plan.checkpoint.read(name) for name in plan.checkpoint.tensors}
    monkeypatch.setattr(type(plan.checkpoint), "read", lambda self, name: torch.empty_like(read[name]))
    with pretended(), torch.no_grad():
        front = Front.load(plan.skeleton, plan.checkpoint, CUDA)
        quality = measure(front, plan.checkpoint, (torch.empty(SHAPE), torch.empty(SHAPE)), torch.zeros(4, 16).long())
    assert quality.tokens == 4 * 15


def test_devices_are_named_in_two_places_alone() -> None:
    found: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            literal = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0]
            asked = isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_mps", "is_xpu") and node.attr
            if literal in NAMES or asked:
                found.add(path.relative_to(SOURCES).as_posix())
    assert found <= NAMED_IN
