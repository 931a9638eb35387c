"""Where samples come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from swquant import SwquantError
from swquant.calibration import draw_from_model, eval_windows, read_text, sample_windows, tokenize
from swquant.tokenizer import load_tokenizer


@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 40), st.integers(0, 9))
def test_windows_are_pieces_of_the_text(count: int, samples: int, seq_len: int, seed: int) -> None:
    tokens = torch.arange(count)
    try:
        windows = sample_windows(tokens, samples, seq_len, seed)
    except SwquantError:
        assert count < max(seq_len, samples * seq_len / 4)
        return
    assert windows.shape == (samples, seq_len)
    assert torch.equal(windows, windows[:, :1] + torch.arange(seq_len))
    assert torch.equal(windows, sample_windows(tokens, samples, seq_len, seed))
    if count >= samples * seq_len:
        assert len(windows.unique()) == windows.numel()


@given(st.integers(0, 100), st.integers(1, 30), st.none() | st.integers(1, 5))
def test_evaluation_windows_follow_each_other(count: int, seq_len: int, limit: int | None) -> None:
    if count < seq_len:
        with pytest.raises(SwquantError, match=f"a window needs {seq_len} tokens, it has {count}"):
            eval_windows(torch.arange(count), seq_len, limit)
        return
    windows = eval_windows(torch.arange(count), seq_len, limit)
    assert windows.flatten().tolist() == list(range(min(count // seq_len, limit or count) * seq_len))


def test_jsonl_documents_are_joined_by_two_newlines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two\nlines")) + "\n\n")
    assert read_text(str(path)) == "one\n\ntwo\nlines"


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', '{"text": 3}', "[1]", "[" * 100_000])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SwquantError, match="line 2"):
        read_text(str(path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SwquantError, match="UTF-8"):
        read_text(str(tmp_path / "data.txt"))


def test_a_dataset_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SwquantError, match=r"swquant\[datasets\]"):
        read_text("wikitext:wikitext-2-raw-v1:test")


@pytest.mark.parametrize(
    ("source", "path", "settings"),
    [
        ("wikitext2", "Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}),
        ("wikitext2:test", "Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}),
        (
            "c4",
            "allenai/c4",
            {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train[:10000]"},
        ),
        ("some/set", "some/set", {"name": None, "split": "train"}),
        ("some/set:part:test", "some/set", {"name": "part", "split": "test"}),
    ],
)
def test_what_the_datasets_library_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, source: str, path: str, settings: dict[str, object]
) -> None:
    asked: list[object] = []

    def load_dataset(place: str, **given: object) -> dict[str, list[str]]:
        asked.append((place, given))
        return {"text": ["one", "two"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text(source) == "one\n\ntwo"
    assert asked == [(path, settings)]


@pytest.mark.parametrize("source", ["wikitext2:a:b", "c4:nothing", "set:a:b:c"])
def test_datasets_that_are_asked_for_wrongly(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(SwquantError, match="expected"):
        read_text(source)


def test_the_text_is_tokenised_once_in_whole(llama: Path, text: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokens = tokenize(tokenizer, text.read_text())
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text.read_text()


def test_samples_follow_the_models_distribution(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    notes: list[str] = []
    drawn = draw_from_model(llama, 400, 2, 0, torch.device("cpu"), notes.append)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0]])).logits[0, 0].softmax(-1)
    assert (drawn[:, 0] == 0).all()
    frequency = torch.bincount(drawn[:, 1], minlength=320) / 400
    likely = expected.topk(5).indices
    torch.testing.assert_close(frequency[likely], expected[likely], atol=0.08, rtol=0)
    assert notes[-1] == "400 of 400 samples drawn"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)
