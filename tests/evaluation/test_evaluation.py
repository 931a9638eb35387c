"""Perplexity and divergence against transformers and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from swquant import Recipe, SwquantError, evaluate, quantize, registry
from swquant.evaluation import What, measure
from swquant.evaluation.divergence import divergence

MakeModel = Callable[..., Path]


def test_perplexity_is_the_fields_protocol(llama: Path, text: Path) -> None:
    measured = evaluate(llama, str(text), context=32, windows=5, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(llama)(text.read_text(), return_tensors="pt")["input_ids"][:, : 5 * 32]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids.view(5, 32)]
    assert measured.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert (measured.windows, measured.tokens, measured.kl) == (5, 5 * 31, None)


def test_a_model_does_not_diverge_from_itself(llama: Path, text: Path) -> None:
    measured = evaluate(llama, str(text), reference=llama, context=16, windows=3, device="cpu")
    assert measured.kl == pytest.approx(0, abs=1e-7)
    assert measured.top1 == 1
    assert measured.reference_perplexity == measured.perplexity


def test_divergence_is_torchs_kl() -> None:
    model, reference = torch.randn(2, 3, 7, 50, generator=torch.Generator().manual_seed(0))
    found = divergence(model, reference)
    logs = [logits.double().log_softmax(-1) for logits in (model, reference)]
    for values, pair in ((found.kl, logs), (found.reverse_kl, logs[::-1])):
        expected = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.top1, model.argmax(-1) == reference.argmax(-1))


def test_top5_is_the_share_of_the_references_first_five() -> None:
    model, reference = torch.randn(2, 3, 7, 50, generator=torch.Generator().manual_seed(0))
    firsts = [[set(row.tolist()) for row in logits.flatten(0, 1).argsort(-1)[:, -5:]] for logits in (model, reference)]
    expected = [len(ours & theirs) / 5 for ours, theirs in zip(*firsts, strict=True)]
    assert divergence(model, reference).top5.flatten().tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert divergence(model[..., :3], reference[..., :3]).top5.unique().tolist() == [1]


def test_positions_are_the_windows_columns(llama: Path, make_model: MakeModel, text: Path) -> None:
    other = make_model("llama", 1)
    found = measure(other, What(text=str(text), context=21, windows=4, device="cpu"), reference=llama)
    evaluation, scores = found.text, found.scores
    assert evaluation is not None
    assert scores is not None
    assert scores.kl is not None
    assert scores.reference_nll is not None
    assert [(one.first, one.last) for one in evaluation.positions] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 20)]
    last = evaluation.positions[-1]
    assert last.kl == pytest.approx(scores.kl[:, 15:].mean(), rel=1e-6)
    assert last.nll == pytest.approx(scores.nll[:, 15:].mean(), rel=1e-6)
    assert last.reference_nll == pytest.approx(scores.reference_nll[:, 15:].mean(), rel=1e-6)
    counts = [one.last - one.first + 1 for one in evaluation.positions]
    mean = sum(count * one.nll for count, one in zip(counts, evaluation.positions, strict=True)) / 20
    assert math.exp(mean) == pytest.approx(evaluation.perplexity)
    turned = evaluate(llama, str(text), reference=other, context=21, windows=4, device="cpu")
    assert (turned.kl, turned.reverse_kl) == pytest.approx((evaluation.reverse_kl, evaluation.kl))


def test_parts_of_a_window_do_not_change_its_scores(
    llama: Path, make_model: MakeModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = What(text=str(text), context=32, windows=2, device="cpu")
    other = make_model("llama", 1)
    whole = measure(other, what, reference=llama).scores
    monkeypatch.setattr("swquant.evaluation.scores.POSITIONS_AT_ONCE", 7)
    parts = measure(other, what, reference=llama).scores
    for name, values in vars(whole).items():
        np.testing.assert_allclose(values, vars(parts)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("values", "part"), [({}, "--tasks"), ({"text": "x", "windows": 0}, "windows is 0")])
def test_what_cannot_be_measured_is_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(SwquantError, match=part):
        What(**values)


def test_the_context_defaults_to_the_models_limit(llama: Path, text: Path) -> None:
    assert evaluate(llama, str(text), windows=1, device="cpu").context == 64


@pytest.mark.parametrize("context", [1, 65])
def test_a_context_out_of_range_is_refused(llama: Path, text: Path, context: int) -> None:
    with pytest.raises(SwquantError, match=f"context is {context} tokens, expected 2 to 64"):
        evaluate(llama, str(text), context=context, device="cpu")


def test_another_vocabulary_is_refused(llama: Path, make_model: MakeModel, text: Path) -> None:
    other = make_model("llama", 1, vocab_size=330)
    with pytest.raises(SwquantError, match="has 330 tokens"):
        evaluate(llama, str(text), reference=other, device="cpu")


def test_a_text_that_fills_no_window_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the model")
    with pytest.raises(SwquantError, match="a window needs 64 tokens"):
        evaluate(llama, str(tmp_path / "short.txt"), device="cpu")


@pytest.mark.parametrize("form", registry.names("swquant.formats"))
def test_every_format_measures_what_the_run_reported(llama: Path, text: Path, form: str, tmp_path: Path) -> None:
    recipe = Recipe(
        bits=4,
        group_size=32,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=32,
        evaluation=str(text),
        evaluation_samples=4,
        device="cpu",
        format=form,
    )
    quality = quantize(recipe, llama, tmp_path / "out").quality
    assert quality is not None
    measured = evaluate(tmp_path / "out", str(text), context=32, windows=4, device="cpu")
    assert measured.perplexity == pytest.approx(quality.perplexity, rel=2e-3)
    if form != "dequantized":
        packed = evaluate(tmp_path / "out", str(text), context=32, windows=4, device="cpu", packed=True)
        assert packed.perplexity == pytest.approx(quality.perplexity, rel=2e-3)


def test_plain_weights_have_nothing_packed(llama: Path, text: Path) -> None:
    with pytest.raises(SwquantError, match=r"holds no quantized model.*compressed_tensors, gguf, gptq") as raised:
        evaluate(llama, str(text), context=32, device="cpu", packed=True)
    assert "dequantized keeps no codes" in str(raised.value)


def test_memory_that_runs_out_while_loading_is_not_taken_for_a_broken_model(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = tmp_path / "quantized"
    recipe = Recipe(method="rtn", format="gptq", calibration=str(text), samples=2, seq_len=16, device="cpu")
    quantize(recipe, llama, quantized)

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", full)
    monkeypatch.setattr("swquant.evaluation.models.whole_model", full)
    for model in (llama, quantized):
        with pytest.raises(MemoryError):
            evaluate(model, str(text), context=16, windows=1, device="cpu")
