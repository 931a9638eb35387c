"""`swquant eval A --baseline B --reference ORIGINAL`: models with and without, measured and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from swquant import SwquantError, evaluate
from swquant.calibration import sample_windows
from swquant.cli import main
from swquant.corpus import tokenize
from swquant.evaluation.gain import recovered_by_metric
from swquant.evaluation.harness import TaskRun, TaskScore
from swquant.evaluation.results import Measured
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]
WORDS = ("the", "model", "reads", "a", "long", "text", "and", "writes", "short", "codes", "for", "each", "weight")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words whose order can be learnt."""
    path = tmp_path_factory.mktemp("text") / "rounds.txt"
    path.write_text(" ".join(WORDS[index % len(WORDS)] for index in range(1000)))
    return path


@pytest.fixture(scope="module")
def trained(make_model: MakeModel, text: Path) -> Path:
    """A model that knows the text, so that quantization has something to lose."""
    folder = make_model("llama", 2, fresh=True)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    tokens = tokenize(load_tokenizer(folder), text.read_text())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        rows = sample_windows(tokens, 16, 16, step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original, and what noise in its weights left of it: two seeds of much (w2) and of little (w3)."""
    found = {"full": trained}
    for bits, noise in ((2, 0.9), (3, 0.6)):
        for seed in (0, 1):
            model = AutoModelForCausalLM.from_pretrained(trained)
            rng = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(noise * value.std() * torch.randn(value.shape, generator=rng))
            found[f"w{bits}-{seed}"] = tmp_path_factory.mktemp("models") / "out"
            model.save_pretrained(found[f"w{bits}-{seed}"])
            load_tokenizer(trained).save_pretrained(found[f"w{bits}-{seed}"])
    return found


def command(models: dict[str, Path], text: Path, with_: list[str], without: list[str], *extra: str) -> list[str]:
    baselines = [part for name in without for part in ("--baseline", str(models[name]))]
    shared = ["--reference", str(models["full"]), "--text", str(text), "--context", "32", "--windows", "9"]
    return ["eval", *(str(models[name]) for name in with_), *baselines, *shared, "--device", "cpu", *extra]


def test_recovered_is_the_formula_on_log_perplexity(
    models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(models, text, ["w3-0", "w3-1"], ["w2-0", "w2-1"], "--json"))
    found = json.loads(capsys.readouterr().out)
    single = {
        name: evaluate(path, str(text), reference=models["full"], context=32, windows=9, device="cpu")
        for name, path in models.items()
    }
    logs = {name: math.log(one.perplexity) for name, one in single.items()}
    with_, without = ((logs[f"w{bits}-0"] + logs[f"w{bits}-1"]) / 2 for bits in (3, 2))
    share = found["recovered"]["log-perplexity"]
    assert share["value"] == pytest.approx((with_ - without) / (logs["full"] - without), rel=1e-5)
    assert (share["units"], share["seeds"]) == (9, [2, 2])
    kl = found["recovered"]["KL"]
    assert kl["value"] == pytest.approx(1 - kl["with_"] / kl["without"])
    assert kl["with_"] == pytest.approx((single["w3-0"].kl + single["w3-1"].kl) / 2, rel=1e-5)
    assert found["models"][0]["kl"] == pytest.approx(single["w3-0"].kl)
    single_seed = command(models, text, ["w3-0"], ["w2-0"], "--json")
    printed = [json.loads((main(single_seed), capsys.readouterr().out)[1]) for _ in range(2)]
    assert printed[0] == printed[1]
    share = printed[0]["recovered"]["log-perplexity"]
    assert 0 < share["low"] < share["value"] < share["high"] < 1.5, share


def test_the_original_recovers_all_and_the_baseline_nothing(
    models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("full", 1), ("w2-0", 0)):
        main(command(models, text, [name], ["w2-0"], "--json"))
        share = json.loads(capsys.readouterr().out)["recovered"]["log-perplexity"]
        assert [share["value"], share["low"], share["high"]] == pytest.approx([value] * 3, abs=1e-9)


def test_the_table_says_what_the_interval_is_over(
    models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(models, text, ["w3-0"], ["w2-0"]))
    out = capsys.readouterr().out
    assert "log-perplexity" in out
    assert "not over seeds" in out
    main(command(models, text, ["full"], ["full"]))
    assert "nothing was lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["a", "--baseline", "b", "--text", "x"], "--baseline needs --reference"),
        (["a", "b", "--text", "x"], "2 models and no --baseline"),
        (["a"], "--tasks"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", *arguments])
    assert part in capsys.readouterr().err


def asked(task: str, values: list[float], items: int | None = None) -> TaskRun:
    score = TaskScore(task, "0", "1", items or len(values), "acc", float(np.mean(values)), {})
    return TaskRun(score, np.array(values))


def measured(*runs: TaskRun) -> Measured:
    return Measured("m", None, tuple(run.score for run in runs), runs=runs)


def test_tasks_are_contrasted_one_by_one_and_on_average() -> None:
    full = measured(asked("one", [1, 1, 1, 1]), asked("two", [1, 0]))
    without = measured(asked("one", [0, 0, 1, 1]), asked("two", [0, 0]))
    with_ = measured(asked("one", [1, 0, 1, 1]), asked("two", [0, 0]))
    found: dict[str, Any] = recovered_by_metric([with_], [without], full)
    assert list(found) == ["one acc", "two acc", "mean of tasks"]
    assert [share.value for share in found.values()] == pytest.approx([0.5, 0, 0.25])


def test_other_items_do_not_compare() -> None:
    full = measured(asked("one", [1, 1]))
    with pytest.raises(SwquantError, match="not asked the same items of one"):
        recovered_by_metric([full], [measured(asked("one", [1, 1], 3))], full)
