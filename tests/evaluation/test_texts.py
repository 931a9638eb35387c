"""The sets that papers report, read as GPTQ's code reads them."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swquant import SwquantError, evaluate
from swquant.evaluation.texts import PROTOCOLS, measured_windows
from swquant.tokenizer import load_tokenizer

LENGTHS = [5, 90, 40, 120, 17, 60, 33, 200]


class Words:
    """A token for each word, its number."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def documents() -> list[str]:
    rng = random.Random(7)
    return [" ".join(str(rng.randint(0, 999)) for _ in range(length)) for length in LENGTHS]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What the datasets library is asked for; it answers with the documents."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **settings: Any) -> dict[str, list[str]]:
        asked.append((path, settings))
        return {"text": documents, "sentence": documents}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def as_gptq_draws(documents: list[str], length: int, count: int) -> torch.Tensor:
    """The published procedure, with the global generator that it seeds, on token lists."""
    state = random.getstate()
    random.seed(0)
    rows = []
    for _ in range(count):
        while True:
            tokens = [int(word) for word in documents[random.randint(0, len(documents) - 1)].split()]
            if len(tokens) >= length:
                break
        first = random.randint(0, len(tokens) - length - 1)
        rows.append(tokens[first : first + length])
    random.setstate(state)
    return torch.tensor(rows)


def test_c4_draws_gptqs_windows(calls: list[tuple[str, dict[str, Any]]], documents: list[str]) -> None:
    state = random.getstate()
    windows = measured_windows("c4", Words(), 32, None)
    assert random.getstate() == state
    assert windows.shape == (256, 32)
    assert torch.equal(windows, as_gptq_draws(documents, 32, 256))
    assert torch.equal(measured_windows("c4", Words(), 32, 9), windows[:9])
    assert torch.equal(measured_windows("c4", Words(), 32, 1000), windows)
    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert calls[0] == ("allenai/c4", {"data_files": shard, "split": "validation"})


def test_c4_new_is_the_first_documents_in_a_row(
    calls: list[tuple[str, dict[str, Any]]], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [" ".join(documents)] * 1100 + ["never read"]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **settings: {"text": many}))
    windows = measured_windows("c4-new", Words(), 64, None)
    tokens = [int(word) for word in " ".join(many[:1100]).split()]
    assert windows.flatten().tolist() == tokens[: 256 * 64]


@pytest.mark.parametrize(
    ("name", "dataset", "split", "joint"),
    [
        ("wikitext2", "Salesforce/wikitext", "test", "\n\n"),
        ("ptb", "ptb-text-only/ptb_text_only", "validation", "\n\n"),
        ("ptb-new", "ptb-text-only/ptb_text_only", "test", " "),
    ],
)
def test_joined_sets(
    name: str, dataset: str, split: str, joint: str, calls: list[tuple[str, dict[str, Any]]], documents: list[str]
) -> None:
    read: list[str] = []

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        read.append(text)
        return Words()(text, verbose)

    windows = measured_windows(name, tokenizer, 16, None)
    assert read == [joint.join(documents)]
    assert windows.shape == (sum(LENGTHS) // 16, 16)
    assert (calls[0][0], calls[0][1]["split"]) == (dataset, split)


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
def test_a_shard_that_lies_here(documents: list[str], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    lines = "".join(json.dumps({"text": document, "url": "x"}) + "\n" for document in documents)
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    assert torch.equal(measured_windows(f"c4={path}", Words(), 32, None), as_gptq_draws(documents, 32, 256))


def test_a_document_as_long_as_a_window_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(["7"] * count)}) + "\n" for count in (10, 11)))
    assert measured_windows(f"c4={path}", Words(), 10, 3).unique().tolist() == [7]
    with pytest.raises(SwquantError, match="none of the 2 documents has more than 11 tokens"):
        measured_windows(f"c4={path}", Words(), 11, 3)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no document"),
        (b"{}\n", "line 1: the object has no field 'text'"),
        (b'{"text": 3}\n', "'3', expected a string"),
        (b"\xff", "as UTF-8: invalid start byte at byte 0"),
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(content)
    with pytest.raises(SwquantError, match=part):
        measured_windows(f"c4={path}", Words(), 4, None)


def test_a_file_that_is_cut_short_or_missing_is_refused(tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "shard.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": documents[0]}).encode())[:-9])
    for source in (path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(SwquantError, match=r"cannot be read: (Compressed file ended|No such file)"):
            measured_windows(f"ptb={source}", Words(), 4, None)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_without_its_library_a_set_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SwquantError, match=rf"swquant\[datasets\].*{name}=FILE"):
        measured_windows(name, Words(), 4, None)


def test_what_the_library_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **settings: Any) -> None:
        raise ConnectionError("the hub\nis not reachable")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SwquantError, match=r"ptb \(ptb-text-only.*: the hub is not reachable; give a text of your own"):
        measured_windows("ptb", Words(), 4, None)


def test_a_file_of_a_sets_name_wins(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text(text.read_text())
    here = evaluate(llama, "c4", context=32, windows=2, device="cpu")
    assert here.perplexity == evaluate(llama, str(text), context=32, windows=2, device="cpu").perplexity


def test_evaluate_measures_on_a_set(
    llama: Path, text: Path, calls: list[tuple[str, dict[str, Any]]], documents: list[str]
) -> None:
    documents[:] = [text.read_text()[start : start + 700] for start in range(0, 4000, 500)]
    found = evaluate(llama, "c4", context=16, windows=3, device="cpu")
    assert (found.text, found.windows) == ("c4", 3)
    rows = measured_windows("c4", load_tokenizer(llama), 16, 3)
    assert rows.shape == (3, 16)
