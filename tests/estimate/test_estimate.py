"""What is said before a run against what the run takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import swquant.run
from swquant import registry
from swquant.checkpoint.reader import Checkpoint
from swquant.cli import app
from swquant.engine.block import Cached, stored_dtypes
from swquant.engine.observer import Silent
from swquant.errors import SwquantError
from swquant.estimate import estimate, shape_of
from swquant.estimate.live import Live, without_values
from swquant.estimate.memory import memory_of
from swquant.estimate.rig import Rig, bind
from swquant.estimate.shown import print_estimate
from swquant.estimate.timing import Measured, measure
from swquant.plan import make_plan
from swquant.quant.deferred import in_float
from swquant.recipe import Recipe
from swquant.run import quantize
from swquant.units import parse_size, span

MakeModel = Callable[..., Path]

RECIPE = Recipe(method="omniquant(epochs=1)", samples=4, seq_len=64, evaluation_samples=1, device="cpu")
FORMATS = ("compressed_tensors", "gptq", "auto_round", "mlx", "dequantized", "gguf", "onnx")


class Usage(Silent):
    """The most bytes that a directory has held."""

    def __init__(self, work: Path) -> None:
        self.work, self.most = work, 0

    def look(self) -> None:
        """Look now."""
        self.most = max(self.most, sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file()))

    def step(self, done: int, total: int) -> None:
        """A step has ended."""
        self.look()


@pytest.fixture(scope="module")
def wide(make_model: MakeModel) -> Path:
    return make_model("llama", 3, torch.bfloat16, hidden_size=512, intermediate_size=1024, head_dim=128)


@pytest.mark.slow
def test_the_disk_is_known_within_2_percent(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, calibration=str(text), format=",".join(FORMATS))
    found = estimate(recipe, wide, tmp_path / "out", measure=False)
    usage = Usage(tmp_path / "out.swquant-work")
    publish = swquant.run.publish

    def watched(staging: Path, out: Path) -> None:
        usage.look()
        publish(staging, out)

    monkeypatch.setattr(swquant.run, "publish", watched)
    report = quantize(recipe, wide, tmp_path / "out", observer=usage)
    for output in report.outputs:
        assert found.disk["outputs"][output.format] == pytest.approx(output.bytes, rel=0.02), output.format
    assert found.disk["peak"] == pytest.approx(usage.most, rel=0.02)
    assert found.bits_per_weight == report.bits_per_weight


@pytest.mark.parametrize(
    "method",
    [
        "omniquant(epochs=1)",
        "block_ap(epochs=1, batch_size=2)",
        pytest.param("awq", marks=pytest.mark.slow),
        "signround(steps=1)",
    ],
)
def test_tensors_without_values_take_what_tensors_with_values_take(llama: Path, method: str) -> None:
    plan = make_plan(replace(RECIPE, method=method, seq_len=32), llama)
    shape = shape_of(plan)
    (phase,) = plan.pipeline.phases[:1]
    dtypes = stored_dtypes(plan.job(), 0)
    bound = bind(plan, 0, shape[1], torch.device("cpu"), range(1, shape[0] + 1))
    peaks: list[int] = []
    for mode in (without_values(), Live()):
        with mode as live:
            own = bound.block.module.state_dict()
            params = {name: torch.ones(value.shape, dtype=dtypes[name]) for name, value in own.items()}
            cached = Cached(*(torch.ones(shape) for _ in range(3)), torch.empty(0), torch.ones(shape))
            rig = Rig(plan, replace(bound, calls=bound.calls.copied()), params, cached)
            rig.advance(in_float(params))
            phase.run(rig.draft(), rig.problem(phase, [0, 1], [2]))
            peaks.append(live.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
    assert peaks[0] > 4 * sum(value.numel() for value in params.values())


class Counted(Live):
    """With the values that code asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("options", ["search=False, target=0", "search=False"])
def test_gptq_takes_what_is_said(make_model: MakeModel, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its columns one by one, which take no more."""
    narrow = make_model("llama", 1, torch.bfloat16, hidden_size=128, intermediate_size=512, head_dim=32)
    plan = make_plan(replace(RECIPE, method=f"gptq({options})", calibration="bundled", seq_len=32), narrow)
    monkeypatch.setattr("swquant.phases.gptq.round_columns", lambda *_: None)
    (phase,), shape = plan.pipeline.phases, shape_of(plan)
    dtypes = stored_dtypes(plan.job(), 0)
    bound = bind(plan, 0, shape[1], torch.device("cpu"), range(1, shape[0] + 1))
    with Counted() as live:
        cached = Cached(*(torch.rand(shape) for _ in range(3)), torch.empty(0), torch.rand(shape))
        before = live.now
        own = bound.block.module.state_dict()
        params = {name: torch.rand(value.shape).to(dtypes[name]) for name, value in own.items()}
        rig = Rig(plan, replace(bound, calls=bound.calls.copied()), params, cached)
        draft = rig.draft()
        live.mark()
        phase.run(draft, rig.problem(phase, [0, 1], [2]))
    assert memory_of(plan, shape).blocks["Gptq"] == pytest.approx(live.peak - before, rel=0.15)


@pytest.mark.slow
def test_every_loss_is_counted_on_few_threads_too(llama: Path) -> None:
    every = " + ".join(f"0.1*{name}" for name in registry.names("swquant.losses"))
    recipe = replace(RECIPE, calibration="bundled", loss="mse")
    plans = [make_plan(one, llama) for one in (recipe, replace(recipe, loss=every))]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain, with_all = (memory_of(plan, shape_of(plan)).blocks["Train"] for plan in plans)
    finally:
        torch.set_num_threads(before)
    assert with_all > plain


def test_no_weight_is_read(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    for name in ("read", "rows", "require_finite"):
        monkeypatch.setattr(Checkpoint, name, refuse)
    found = estimate(RECIPE, llama, tmp_path / "out")
    assert found.time is not None
    assert found.time["total"] > 0
    assert found.problems == ()


@pytest.mark.slow
def test_a_larger_batch_takes_more_memory_and_a_micro_batch_less(llama: Path) -> None:
    plans = [make_plan(replace(RECIPE, method=f"block_ap(epochs=1, batch_size={size})"), llama) for size in (1, 3)]
    one, three = (memory_of(plan, shape_of(plan)).blocks["Train"] for plan in plans)
    cut = memory_of(plans[1], shape_of(plans[1]), micro_batch=1).blocks["Train"]
    assert one <= cut < three


def test_the_command_prints_json_and_says_what_does_not_fit(llama: Path, text: Path) -> None:
    given = ["plan", str(llama), "--method", "rtn", "--samples", "2", "--calibration", str(text), "--no-time"]
    runner = CliRunner()
    good = runner.invoke(app, [*given, "--json"], catch_exceptions=False)
    assert good.exit_code == 0
    assert json.loads(good.stdout)["blocks"] == 2
    bad = runner.invoke(app, [*given, "--host-memory", "1MB"], catch_exceptions=False)
    assert bad.exit_code == 1
    assert "Does not fit: the process itself takes" in bad.stdout


def test_sizes() -> None:
    assert [parse_size(text) for text in ("20GiB", "1.5 kb", "7", "1e9")] == [20 << 30, 1500, 7, 10**9]
    for text in ("", "GiB", "-1", "3 ib", "0", "20 apples"):
        with pytest.raises(SwquantError, match="is no size"):
            parse_size(text)


PEAK = """
import sys, torch
from swquant.engine.memory import peak_bytes
from swquant.recipe import Recipe
from swquant.run import quantize
torch.set_num_threads(1)
quantize(Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3])
print(peak_bytes())
"""
SAID = """
import sys
from swquant.estimate import estimate
from swquant.recipe import Recipe
print(estimate(Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3], measure=False).host)
"""


@pytest.fixture
def large_block(make_model: MakeModel) -> Path:
    """A block whose tensors outweigh the interpreter, in the proportions of a 70B model's."""
    sizes = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 2}
    return make_model("llama", 1, torch.bfloat16, head_dim=128, max_position_embeddings=512, **sizes)


HEAVY = ("omniquant(epochs=1)", "gptq + block_ap(epochs=1)", "gptq + block_ap(epochs=1) + end_to_end(epochs=1)")


@pytest.mark.slow
@pytest.mark.parametrize("method", HEAVY)
def test_the_memory_is_known_within_15_percent(large_block: Path, text: Path, tmp_path: Path, method: str) -> None:
    recipe = replace(RECIPE, method=method, samples=3, seq_len=512, evaluation_samples=0, calibration=str(text))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    given = [str(tmp_path / "recipe.yaml"), str(large_block), str(tmp_path / "out")]
    said, found = (
        int(subprocess.run([sys.executable, "-c", code, *given], check=True, stdout=subprocess.PIPE).stdout.split()[-1])
        for code in (SAID, PEAK)
    )
    assert said == pytest.approx(found, rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an allocator that counts")
@pytest.mark.parametrize("method", HEAVY[:2])
def test_a_devices_memory_is_known_within_15_percent(
    large_block: Path, text: Path, tmp_path: Path, method: str
) -> None:
    shape = {"samples": 3, "seq_len": 512, "evaluation_samples": 0}
    recipe = replace(RECIPE, method=method, calibration=str(text), device="cuda", **shape)
    said = estimate(recipe, large_block, tmp_path / "out", measure=False).device
    torch.cuda.reset_peak_memory_stats()
    report = quantize(recipe, large_block, tmp_path / "out")
    assert said == pytest.approx(max(block["device_peak_bytes"] for block in report.blocks), rel=0.15)


@pytest.mark.slow
def test_the_time_is_known_within_30_percent(wide: Path, text: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method="gptq + block_ap(epochs=6)", samples=16, calibration=str(text))
    said = estimate(recipe, wide, tmp_path / "out").time
    assert said is not None
    began = time.perf_counter()
    quantize(recipe, wide, tmp_path / "out")
    assert said["total"] == pytest.approx(time.perf_counter() - began, rel=0.3)


def test_a_block_of_which_all_is_kept_takes_no_steps(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method="gptq + block_ap(epochs=2)", calibration=str(text))
    whole = estimate(recipe, llama, tmp_path / "out").time
    kept = estimate(replace(recipe, grids={"model.layers.0.*": None}), llama, tmp_path / "out").time
    assert whole is not None
    assert kept is not None
    assert sum(kept["steps"].values()) > 0
    assert sum(kept["block"].values()) < 0.8 * sum(whole["block"].values())  # the mean of both blocks'


@pytest.mark.slow
def test_a_long_run_is_told_what_makes_it_shorter(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each flag's time is what a plan with that flag says, of the same measurement."""
    kept: list[list[Measured]] = []
    recipe = Recipe.load("w2g64").override({"calibration": str(text), "seq_len": 16, "samples": 64, "device": "cpu"})
    monkeypatch.setattr("swquant.estimate.measured", lambda *given: kept[0] if kept else _noted(kept, measure(*given)))
    monkeypatch.setattr("swquant.estimate.timing.files_of", lambda plan: 0.0)
    short = estimate(recipe, wide, tmp_path / "out")
    assert short.time is not None
    assert short.faster == {}
    monkeypatch.setattr("swquant.estimate.LONG", 0)
    monkeypatch.setattr("swquant.estimate.shorter.LEAST", {"samples": 8, "seq_len": 4})
    long = estimate(recipe, wide, tmp_path / "out")
    assert long.time == short.time
    assert list(long.faster) == ["--preset fast", "--samples 16", "--seq-len 4", "--epochs 4"]
    assert max(long.faster.values()) < long.time["total"]
    for flag, values in (("--samples 16", {"samples": 16}), ("--epochs 4", {"epochs": 4})):
        time = estimate(recipe.override(values), wide, tmp_path / "out").time
        assert time is not None
        assert long.faster[flag] == pytest.approx(time["total"])
    fast = replace(recipe, method=Recipe.load("w2g64-fast").method, preset="fast")
    time = estimate(fast, wide, tmp_path / "out").time
    assert time is not None
    assert long.faster["--preset fast"] == pytest.approx(time["total"])
    print_estimate(long, None, "swquant quantize model")
    assert f"To take less: --preset fast {span(time['total'])}, --samples 16 " in capsys.readouterr().out


def _noted(kept: list[list[Measured]], found: list[Measured]) -> list[Measured]:
    kept.append(found)
    return found
