"""The end-to-end stage: its gradient, what it brings, what it writes, and how it survives being killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.engine.alive import Alive
from swquant.engine.block import Job
from swquant.engine.end_to_end import TrainedModel
from swquant.engine.head import Heads
from swquant.engine.run_state import RunState
from swquant.estimate.budget import Budget
from swquant.methods.end_to_end import LEARNING_RATE
from swquant.model.calls import Front, capture
from swquant.phases.scale_training import ScaleTraining
from swquant.plan import make_plan
from swquant.quant import deferred
from swquant.quant.qtensor import QTensor, uniform

from .stage import behind_the_last_block, calls_of

MakeModel = Callable[..., Path]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=2,
        group_size=32,
        method="rtn + end_to_end(epochs=3, batch_size=2, learning_rate=0.01)",
        calibration=str(text),
        samples=8,
        seq_len=32,
        evaluation_samples=4,
        device="cpu",
    )


def whole_model(job: Job, run_state: RunState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scales and norms as leaves, and the parameters of the model that transformers builds, made of them."""
    leaves: dict[str, Tensor] = {}
    params: dict[str, Tensor] = {}
    for index, block in enumerate(job.skeleton.blocks):
        committed = run_state.block(index, job.layout.grids(index))
        for name, old in committed.quantized.items():
            leaf = leaves[f"{block.prefix}.{name}"] = old.scale.clone().requires_grad_()
            params[f"{block.prefix}.{name}"] = uniform(old.codes, leaf, old.zero, old.spec).dequantize()
        for name, value in committed.params.items():
            if "norm" in name and name.endswith("weight"):
                params[f"{block.prefix}.{name}"] = leaves[f"{block.prefix}.{name}"] = value.clone().requires_grad_()
    return leaves, params


@pytest.mark.parametrize(
    ("family", "symmetric", "bits", "tied"),
    [("llama", True, 2, True), ("llama", False, 2, False), ("qwen3", True, 3, False), ("opt", False, 4, True)],
)
def test_the_streamed_gradient_is_that_of_autograd_through_the_whole_model(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, family: str, symmetric: bool, bits: int, tied: bool
) -> None:
    source = make_model(family, 3, torch.float32, tie_word_embeddings=tied)
    recipe = replace(recipe, symmetric=symmetric, bits=bits)
    model, job, run_state = behind_the_last_block(
        recipe, source, tmp_path / "work", ScaleTraining(1, 1, 0.01, norms=True)
    )
    tokens = run_state.tokens()["tokens"][:2]
    front, samples = calls_of(job, run_state).front, torch.arange(2)
    states = model.forward(torch.stack(list(capture(front, job.checkpoint, tokens, stored=True))), samples)
    heads = Heads.load(front, job.checkpoint)
    loss, slope = heads.gradient(run_state.open_hidden_states()[0][:2], states.pop())
    model.backward(states, samples, slope)

    whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    leaves, params = whole_model(job, run_state)
    expected = whole(input_ids=tokens).logits.log_softmax(-1).detach()
    found = functional_call(whole, params, kwargs={"input_ids": tokens}).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    divergence.backward()
    assert float(loss) == pytest.approx(float(divergence.detach()), rel=1e-5)
    gains = {
        f"{job.skeleton.blocks[i].prefix}.{name}": gain for i, t in enumerate(model.thetas) for name, gain in t.items()
    }
    assert gains.keys() == leaves.keys()
    greatest = max(float(gain.grad.abs().max()) for gain in gains.values())
    for name, gain in gains.items():
        torch.testing.assert_close(
            gain.grad, leaves[name].grad * leaves[name].detach(), rtol=1e-4, atol=1e-5 * greatest
        )


@pytest.mark.parametrize("weights", [False, True])
def test_with_the_graph_of_all_blocks_in_memory_gradients_are_the_same_to_the_bit(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, weights: bool
) -> None:
    work = ScaleTraining(1, 1, 0.01, norms=True, weights=weights)
    model, _, run_state = behind_the_last_block(recipe, make_model("llama", 3), tmp_path / "work", work)
    samples, rng = torch.arange(2), torch.Generator().manual_seed(0)
    hidden, slope = (torch.randn(2, *run_state.shape[1:], generator=rng) for _ in range(2))
    states = model.forward(hidden, samples)
    last = states.pop()
    model.backward(states, samples, slope)
    expected = [{name: value.grad for name, value in theta.items()} for theta in model.thetas]
    for theta in model.thetas:
        for value in theta.values():
            value.grad = None
    told, live = model.graph_bytes(hidden, samples), Alive()
    with live:
        out = model.whole(hidden, samples)
    assert torch.equal(out, last)
    assert live.now == pytest.approx(told, rel=0.1)
    out.backward(slope)
    for theta, found in zip(model.thetas, expected, strict=True):
        assert all(torch.equal(value.grad, found[name]) for name, value in theta.items())


def test_memory_to_spare_decides_about_the_graph_and_not_about_the_result(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for name in ("whole", "backward"):
        own = getattr(TrainedModel, name)
        monkeypatch.setattr(TrainedModel, name, lambda *given, own=own, name=name: (taken.append(name), own(*given))[1])
    quantize(recipe, llama, tmp_path / "roomy")
    assert set(taken) == {"whole"}
    taken.clear()
    monkeypatch.setattr(Budget, "spare", lambda self, device, ranks: 0)
    quantize(recipe, llama, tmp_path / "narrow")
    assert set(taken) == {"backward"}
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("roomy", "narrow")]
    assert written[0] == written[1]


@pytest.mark.parametrize("chunk", [1, 320 * 7, 1 << 24])
def test_chunks_of_tokens_do_not_change_the_divergence(
    llama: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("swquant.engine.head.LOGITS", chunk)
    plan = make_plan(recipe, llama)
    heads = Heads.load(Front.load(plan.skeleton, plan.checkpoint, plan.device), plan.checkpoint)
    rng = torch.Generator().manual_seed(0)
    reference, hidden = (torch.randn(2, 9, 64, generator=rng) for _ in range(2))
    leaf = hidden.clone().requires_grad_()
    whole: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected, found = (whole.lm_head(whole.model.norm(side)).log_softmax(-1) for side in (reference, leaf))
    wanted = (expected.exp() * (expected - found)).sum(-1).mean()
    wanted.backward()
    loss, slope = heads.gradient(reference, hidden)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(heads.divergence(reference, hidden)) == float(loss)
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("symmetric", "norms", "tied"), [(True, False, True), (False, True, False)])
def test_it_lowers_the_divergence_and_the_output_is_the_model_it_reports(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, text: Path, symmetric: bool, norms: bool, tied: bool
) -> None:
    source = make_model("llama", 2, torch.float32, tie_word_embeddings=tied)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text.read_text()[-4000:])
    method = f"rtn + end_to_end(epochs=3, batch_size=2, learning_rate=0.01, norms={norms})"
    recipe = replace(recipe, bits=3, symmetric=symmetric, method=method, evaluation=str(held_out))
    plain = quantize(replace(recipe, method="rtn"), source, tmp_path / "plain")
    report = quantize(recipe, source, tmp_path / "out")
    assert report.finish["after"] < report.finish["before"]
    assert len(report.finish["curve"]) == len(report.finish["training"]) == 3
    assert report.quality.kl < plain.quality.kl
    measured = evaluate(tmp_path / "out", str(held_out), reference=source, context=32, windows=4, device="cpu")
    assert report.quality.perplexity == pytest.approx(measured.perplexity, rel=1e-5)
    assert report.quality.kl == pytest.approx(measured.kl, rel=1e-4)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if "weight_scale" in name or (norms and "layernorm" in name)}
    assert changed == trained
    assert all(torch.equal(before[name].sign(), after[name].sign()) for name in changed)


def test_it_follows_a_rotation_and_a_trained_method(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    method = "rotate + omniquant(epochs=1) + end_to_end(epochs=1, learning_rate=0.01)"
    report = quantize(replace(recipe, method=method), llama, tmp_path / "out")
    assert report.finish["after"] <= report.finish["before"]
    assert len(report.blocks[0]["phases"]) == 1


@pytest.mark.parametrize("rate", [2.0, 1e6])
def test_a_stage_that_does_not_help_keeps_the_start(llama: Path, recipe: Recipe, tmp_path: Path, rate: float) -> None:
    """The first rate makes the model worse, the second makes the loss infinite."""
    method = f"rtn + end_to_end(epochs=5, learning_rate={rate})"
    report = quantize(replace(recipe, method=method), llama, tmp_path / "out")
    plain = quantize(replace(recipe, method="rtn"), llama, tmp_path / "plain")
    assert report.finish["kept_epoch"] == 0
    assert report.finish["after"] == report.finish["before"]
    assert any(event.startswith("end to end: ") for event in report.events)
    assert report.quality == plain.quality
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "out"))
    assert one == other


@pytest.mark.slow
def test_killed_within_the_stage_it_ends_in_the_same_bits(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, method="rtn + end_to_end(epochs=10, batch_size=2, learning_rate=0.002)")
    expected = quantize(recipe, llama, tmp_path / "whole")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "swquant", "quantize", str(llama), "--recipe", str(path)]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    manifest = tmp_path / "out.swquant-work" / "manifest.json"
    while process.poll() is None and _epochs(manifest) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= _epochs(manifest) < 10
    resumed = quantize(recipe, llama, tmp_path / "out")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other
    assert resumed.quality == expected.quality
    assert {**resumed.finish, "seconds": 0} == {**expected.finish, "seconds": 0}


def _epochs(manifest: Path) -> int:
    training = json.loads(manifest.read_text())["training"] if manifest.exists() else None
    return 0 if training is None else int(training["epoch"])


@pytest.mark.parametrize("weights", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["save_training", "finish_training", "advance"])
def test_stopped_at_a_commit_it_goes_on_to_the_same_bits(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, weights: bool
) -> None:
    if weights:
        recipe = replace(recipe, options={"weights": True, "weight_rate": 0.03})
    expected = quantize(recipe, llama, tmp_path / "whole")
    calls: list[int] = []
    owner = TrainedModel if moment == "advance" else RunState
    original = getattr(owner, moment)

    def stopping(self: Any, *arguments: Any) -> None:
        """In place of the second save, or of the only call of the others."""
        calls.append(1)
        if moment == "save_training" and len(calls) == 1:
            original(self, *arguments)
        else:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, llama, tmp_path / "out")
    resumed = quantize(recipe, llama, tmp_path / "out")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other
    assert resumed.quality == expected.quality
    assert resumed.finish["curve"] == expected.finish["curve"]
    assert resumed.finish["training"] == expected.finish["training"]
    assert not (tmp_path / "out.swquant-work").exists()


def test_no_more_than_one_weight_is_dequantized_at_a_time(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", 5)
    model, _, run_state = behind_the_last_block(recipe, source, tmp_path / "work")
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = QTensor.dequantize

    def counted(self: QTensor) -> Tensor:
        nonlocal most
        out = original(self)
        alive.append(weakref.ref(out))
        most = max(most, sum(tensor() is not None for tensor in alive))
        return out

    monkeypatch.setattr(QTensor, "dequantize", counted)
    monkeypatch.setattr(deferred, "SMALL", 0)
    samples = torch.arange(2)
    states = model.forward(torch.randn(2, *run_state.shape[1:]), samples)
    model.backward(states[:-1], samples, torch.randn_like(states[-1]))
    assert len(alive) == 3 * 5 * 7
    assert most == 1


def test_efficientqat_is_block_ap_and_the_stage(llama: Path, recipe: Recipe) -> None:
    plan = make_plan(replace(recipe, method="efficientqat(epochs=1, scale_epochs=3)"), llama)
    assert [part.name for part in plan.pipeline.parts] == ["block_ap", "end_to_end"]
    assert len(plan.pipeline.phases) == 1
    assert plan.pipeline.finish == ScaleTraining(3, 4, LEARNING_RATE, norms=False)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("end_to_end + omniquant", "put omniquant first"),
        ("efficientqat + end_to_end", "is listed twice"),
        ("block_ap + end_to_end(norms=True)", "both learn the norms"),
    ],
)
def test_what_cannot_be(llama: Path, recipe: Recipe, method: str, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        make_plan(replace(recipe, method=method), llama)
