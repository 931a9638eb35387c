"""The end-to-end stage with weights: its gradient, the codes it ends in, and how it survives being killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from closed import closed
from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.engine.block import Job
from swquant.engine.head import Heads
from swquant.engine.trained_model import EDGE, POSITION, TrainedModel
from swquant.formats import read_quantized
from swquant.model.calls import capture
from swquant.phases.scale_training import ScaleTraining
from swquant.plan import make_plan

from .stage import behind_the_last_block, calls_of

MakeModel = Callable[..., Path]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=2,
        group_size=32,
        method="rtn + end_to_end(epochs=3, batch_size=2, learning_rate=0.01, weights=True, weight_rate=0.03)",
        calibration=str(text),
        samples=8,
        seq_len=32,
        evaluation_samples=4,
        device="cpu",
    )


def by_weight(model: TrainedModel, job: Job) -> dict[str, tuple[int, str, Tensor]]:
    """Block, name within it and position by the name in the whole model."""
    return {
        f"{job.skeleton.blocks[index].prefix}.{key.removesuffix(POSITION)}": (index, key.removesuffix(POSITION), value)
        for index, theta in enumerate(model.thetas)
        for key, value in theta.items()
        if key.endswith(POSITION)
    }


def straight_through(position: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The weight of a position as the module's text has it, for autograd."""
    grouped = position.view(*scale.shape, -1)
    code = closed(grouped + (grouped.round() - grouped).detach() + zero.unsqueeze(-1), 0, 2**bits - 1)
    return ((code - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(position.shape)


def nudged(model: TrainedModel, seed: int) -> None:
    """Positions on both sides of the cells' edges, and beyond the grid."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theta in model.thetas:
            for key, value in theta.items():
                wide = 1.5 if key.endswith(POSITION) else 0.05
                value += wide * torch.randn(value.shape, generator=rng)


@pytest.mark.parametrize(("symmetric", "bits"), [(True, 2), (False, 3)])
def test_the_streamed_gradient_is_that_of_autograd_through_the_whole_model(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, symmetric: bool, bits: int
) -> None:
    source = make_model("llama", 3, torch.float32)
    recipe = replace(recipe, symmetric=symmetric, bits=bits)
    model, job, run_state = behind_the_last_block(recipe, source, tmp_path / "work")
    nudged(model, 0)
    tokens = run_state.tokens()["tokens"][:2]
    front, samples = calls_of(job, run_state).front, torch.arange(2)
    states = model.forward(torch.stack(list(capture(front, job.checkpoint, tokens, stored=True))), samples)
    loss, slope = Heads.load(front, job.checkpoint).gradient(run_state.open_hidden_states()[0][:2], states.pop())
    model.backward(states, samples, slope)

    whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    leaves: dict[str, Tensor] = {}
    params: dict[str, Tensor] = {}
    for full, (index, name, position) in by_weight(model, job).items():
        old = run_state.block(index, job.layout.grids(index)).quantized[name]
        scale = old.rescaled({"scale": model.thetas[index][name].detach().exp()}).scale
        leaves[full] = position.detach().clone().requires_grad_()
        params[full] = straight_through(leaves[full], scale, old.zero.float(), bits)
    expected = whole(input_ids=tokens).logits.log_softmax(-1).detach()
    found = functional_call(whole, params, kwargs={"input_ids": tokens}).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    divergence.backward()
    assert float(loss) == pytest.approx(float(divergence.detach()), rel=1e-5)
    greatest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())
    for full, (_, _, position) in by_weight(model, job).items():
        torch.testing.assert_close(position.grad, leaves[full].grad, rtol=1e-3, atol=1e-5 * greatest)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_trained_is_what_is_written(llama: Path, recipe: Recipe, tmp_path: Path, symmetric: bool) -> None:
    model, job, run_state = behind_the_last_block(replace(recipe, symmetric=symmetric), llama, tmp_path / "work")
    before = [run_state.block(index, job.layout.grids(index)) for index in range(run_state.done)]
    for index, block in enumerate(before):
        for name, weight in block.floats().items():
            assert torch.equal(model.floats(index)[name] * 1, weight * 1)
    nudged(model, 1)
    shape = run_state.shape
    assert shape is not None
    cache = run_state.hidden_path("trained", run_state.done)
    cache.write_bytes(bytes(4 * shape[0] * shape[1] * shape[2]))
    run_state.finish_training(model.final(), {})
    for index in range(run_state.done):
        after = run_state.block(index, job.layout.grids(index))
        assert any(
            not torch.equal(value.codes, before[index].quantized[name].codes) for name, value in after.quantized.items()
        )
        for name, weight in after.floats().items():
            assert torch.equal(model.floats(index)[name] * 1, weight * 1)


@pytest.mark.parametrize("start", ["rtn", "awq(clip=False)"])
def test_positions_begin_within_the_cells_of_their_codes(
    llama: Path, recipe: Recipe, tmp_path: Path, start: str
) -> None:
    """As near to the original as that allows; in the middle where a method has moved the weights elsewhere."""
    method = f"{start} + end_to_end(weights=True)"
    model, job, run_state = behind_the_last_block(replace(recipe, method=method), llama, tmp_path / "work")
    for full, (index, name, position) in by_weight(model, job).items():
        old = run_state.block(index, job.layout.grids(index)).quantized[name]
        middle = straight_through(old.codes.float() - old.zero.float().repeat_interleave(32, 1), old.scale, old.zero, 2)
        cells = middle / old.scale.repeat_interleave(32, 1)
        if start == "rtn":
            ratio = job.checkpoint.read(full).float() / old.scale.repeat_interleave(32, 1)
            cells = torch.minimum(torch.maximum(ratio, cells - EDGE), cells + EDGE)
        torch.testing.assert_close(position.detach(), cells, rtol=1e-5, atol=1e-5)


def test_it_changes_codes_and_lowers_the_divergence_further(
    make_model: MakeModel, recipe: Recipe, text: Path, tmp_path: Path
) -> None:
    source = make_model("llama", 2, torch.float32)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text.read_text()[-4000:])
    recipe = replace(recipe, evaluation=str(held_out))
    scales = quantize(
        replace(recipe, method="rtn + end_to_end(epochs=3, batch_size=2, learning_rate=0.01)"), source, tmp_path / "s"
    )
    report = quantize(recipe, source, tmp_path / "out")
    assert report.finish["after"] < scales.finish["after"] < scales.finish["before"] == report.finish["before"]
    measured = evaluate(tmp_path / "out", str(held_out), reference=source, context=32, windows=4, device="cpu")
    assert report.quality.kl == pytest.approx(measured.kl, rel=1e-4)
    codes = [read_quantized(tmp_path / name)[1] for name in ("s", "out")]
    one, other = ([value for part in model.parts() for value in part.values()] for model in codes)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if not isinstance(a, Tensor)]
    assert all(torch.equal(a.zero, b.zero) for a, b in pairs)
    assert all(not torch.equal(a.codes, b.codes) for a, b in pairs)


def test_the_pipeline_knows_whether_weights_were_moved(llama: Path, recipe: Recipe) -> None:
    plan = make_plan(replace(recipe, method="gptq + end_to_end(epochs=1, weights=True, weight_rate=0.5)"), llama)
    assert plan.pipeline.finish == ScaleTraining(1, 4, 0.01, weights=True, weight_rate=0.5, original=True)
    for method, original in (
        ("omniquant(transform=True)", False),
        ("omniquant(transform=False)", True),
        ("rotate + rtn", True),
    ):
        plan = make_plan(replace(recipe, method=f"{method} + end_to_end(weights=True)"), llama)
        assert plan.pipeline.finish is not None
        assert plan.pipeline.finish.original is original


def test_a_rate_of_weights_without_weights_is_refused(recipe: Recipe, llama: Path) -> None:
    with pytest.raises(SwquantError, match="weights=True"):
        make_plan(replace(recipe, method="rtn + end_to_end(weight_rate=0.1)"), llama)


def test_k_grids_are_refused(recipe: Recipe, llama: Path) -> None:
    with pytest.raises(SwquantError, match=r"q2_k.*leave weights out"):
        make_plan(Recipe(grid="q2_k", method="rtn + end_to_end(weights=True)", calibration=recipe.calibration), llama)
