"""Tasks through lm-eval itself, offline: a local model, a task file, its items."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swquant import Recipe, SwquantError, quantize, registry
from swquant.evaluation.harness import run_tasks
from swquant.evaluation.models import load_model
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]

REQUIREMENTS = ("lm-eval==0.4.13", "accelerate>=0.26", "torch<2.14")
TASK = """\
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
FORMS = [
    name
    for name in registry.names("swquant.formats")
    if name != "dequantized" and registry.load("swquant.formats", name)().refusal(QuantSpec(4, 32, True)) is None
]
WORDS = ("each", "turn", "of", "the", "text", "and", "codes", "for", "weights", "in", "block")
ITEMS = [
    {
        "question": f"the model reads {word}",
        "choices": [" a long text", " short codes", " every block"],
        "answer": at % 3,
    }
    for at, word in enumerate(WORDS)
]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SwquantError, match=r"swquant\[eval\]"):
        run_tasks(None, None, ["piqa"])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Of an environment that has lm-eval beside the test environment's packages; made once in pytest's cache."""
    home = Path(request.config.cache.mkdir("lm-eval-0.4.13"))
    found = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "ready").exists():
        shared = [place for place in sys.path if place.endswith(("site-packages", "dist-packages", "src"))]
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.run([found, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        (Path(own) / "shared.pth").write_text("\n".join([*shared, str(Path(__file__).parents[2] / "src")]) + "\n")
        installed = subprocess.run(
            [found, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=False, capture_output=True, text=True
        )
        if installed.returncode:
            pytest.skip(f"pip cannot install lm-eval: {installed.stderr.strip().splitlines()[-1]}")
        (home / "ready").touch()
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("task")
    (place / "next_word.yaml").write_text(TASK)
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return place / "next_word.yaml"


def swquant_eval(python: Path, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return offline(home, python, "-m", "swquant", "eval", *arguments, "--device", "cpu", "--json")


def offline(home: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    return subprocess.run(list(map(str, command)), cwd=home, env=settings, capture_output=True, text=True, check=False)


@torch.no_grad()
def choices(model: Path) -> list[int]:
    """The likeliest choice of each item, by the sum of its tokens' log-probabilities."""
    net, tokenizer = load_model(model, torch.device("cpu")), load_tokenizer(model)

    def likelihood(question: str, choice: str) -> float:
        start = len(tokenizer(question)["input_ids"])
        ids: Tensor = torch.tensor([tokenizer(question + choice)["input_ids"]])
        logs = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    return [
        max(range(3), key=lambda at, item=item: likelihood(item["question"], item["choices"][at])) for item in ITEMS
    ]


@pytest.mark.slow
def test_full_quantized_and_packed_models_answer_a_local_task(
    python: Path, task: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    quantize(
        Recipe(bits=4, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=32, evaluation_samples=0),
        llama,
        tmp_path / "w4",
    )
    correct = {
        model: [choice == item["answer"] for choice, item in zip(choices(model), ITEMS, strict=True)]
        for model in (llama, tmp_path / "w4")
    }
    assert len({choice for model in correct for choice in choices(model)}) > 1
    for model, flags in ((llama, ()), (tmp_path / "w4", ()), (tmp_path / "w4", ("--packed",))):
        finished = swquant_eval(python, tmp_path, model, "--tasks", task, *flags)
        assert finished.returncode == 0, finished.stderr
        (found,) = json.loads(finished.stdout)["tasks"]
        assert found["value"] == pytest.approx(sum(correct[model]) / len(ITEMS))
        assert (found["task"], found["metric"], found["items"]) == ("next_word", "acc", len(ITEMS))
        assert (found["harness"], found["version"]) == ("0.4.13", "2.0")


@pytest.fixture(scope="module")
def outputs(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same codes in every format that keeps codes."""
    out = tmp_path_factory.mktemp("formats") / "w4"
    recipe = Recipe(
        bits=4, group_size=32, symmetric=True, method="rtn", calibration=str(text), samples=2, seq_len=32,
        evaluation_samples=0, format=",".join(FORMS),
    )  # fmt: skip
    return {output.format: out / output.directory for output in quantize(recipe, llama, out).outputs}


@pytest.fixture(scope="module")
def answers(python: Path, task: Path, outputs: dict[str, Path]) -> dict[str, Any]:
    finished = offline(task.parent, python, Path(__file__).with_name("with_lm_eval.py"), task, *outputs.values())
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_hflm_takes_a_loaded_model_of_every_format(
    answers: dict[str, Any], outputs: dict[str, Path], form: str
) -> None:
    found = answers[str(outputs[form])]
    wanted = [choice == item["answer"] for choice, item in zip(choices(outputs[form]), ITEMS, strict=True)]
    assert found["packed"] == 2 * 7
    assert found["accuracy"] == pytest.approx(sum(wanted) / len(ITEMS))


@pytest.mark.slow
def test_recovered_accuracy(python: Path, task: Path, llama: Path, make_model: MakeModel, tmp_path: Path) -> None:
    other = make_model("llama", 1)
    finished = swquant_eval(
        python, tmp_path, llama, "--baseline", other, "--reference", llama, "--tasks", task, "--items", "6"
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert list(found["recovered"]) == ["next_word acc"]
    share = found["recovered"]["next_word acc"]
    assert share["units"] == 6
    assert share["value"] == (None if share["full"] == share["without"] else 1)
    wanted = [choice == item["answer"] for choice, item in zip(choices(llama)[:6], ITEMS, strict=False)]
    assert share["full"] == pytest.approx(sum(wanted) / 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "content", "part"),
    [
        ("pika", None, "no task 'pika'; did you mean"),
        ("bad.yaml", "dataset_path: json\n", "has no name"),
        ("bad.yaml", "task: [", "not valid YAML"),
        ("missing.yaml", None, "cannot be read"),
        ("bad.yaml", TASK.replace("items.jsonl", "nowhere.jsonl"), "lm-eval cannot run"),
    ],
)
def test_tasks_that_do_not_run_are_one_sentence(
    python: Path, llama: Path, tmp_path: Path, given: str, content: str | None, part: str
) -> None:
    if content is not None:
        (tmp_path / given).write_text(content)
    finished = swquant_eval(python, tmp_path, llama, "--tasks", given)
    assert finished.returncode == 2
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("swquant: ")
    assert part in last
