"""Where samples come from."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from swquant import SwquantError
from swquant.calibration import eval_windows, sample_windows
from swquant.corpus import read_text, tokenize
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


BAD_LINES = [
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("{'text': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    (
        '{"body": "x", "id": 1}',
        r"the object has no field 'text'.* \(it has body, id\)",
    ),
    ("{}", r"the object has no field 'text'.* \(it has none\)"),
    ('{"text": 3}', "'text' is '3', expected a string"),
    ('{"text": null}', "'text' is 'None', expected a string"),
    ("[1]", "a list, expected a JSON object with a 'text' field"),
    ("null", "null, expected a JSON object"),
    ("[" * 100_000, "JSON that is nested too deeply"),
    ('{"text": "\\ud83d"}', "'text' holds half of a surrogate pair"),
    ('{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
    ('{"text": "a\tb"}', "not JSON: Invalid control character at column 12"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_named_with_the_true_reason(tmp_path: Path, line: str, reason: str, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SwquantError, match=f"line 2: {reason}"):
        read_text(str(path))


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, suffix: str, ends: str) -> None:
    """U+2028, U+0085 and others that end lines in Unicode are legal in a JSON string."""
    texts = [f"before{mark}after" for mark in "\u2028\u2029\x85\xa0\ufeff"] + ["\x0b\x0c\x1c\x1d\x1e\r\n"]
    lines = ends.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + ends
    content = b"\xef\xbb\xbf" + lines.encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read_text(str(path)) == "\n\n".join(texts)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_value(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n" + json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
    assert read_text(str(path)) == "one\n\ntwo"
    path.write_text(json.dumps({"text": "one", "id": 1}, indent=indent))
    assert read_text(str(path)) == "one"
    path.write_text(json.dumps([{"text": "one"}, {"body": "two"}], indent=indent))
    with pytest.raises(
        SwquantError,
        match=r"entry 2: the object has no field 'text'.* \(it has body\)",
    ):
        read_text(str(path))
    path.write_text('[\n{"text": "one"},\n{"text": }\n]')
    with pytest.raises(SwquantError, match=r"data\.json: not JSON: Expecting value at line 3, column 10"):
        read_text(str(path))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbfthe text")
    assert read_text(str(tmp_path / "data.txt")) == "the text"


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SwquantError, match="UTF-8"):
        read_text(str(tmp_path / "data.txt"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_a_line_of_bytes_that_are_no_text_is_named(tmp_path: Path, suffix: str) -> None:
    """By its own number: a byte's place in a piece of the file that was read ahead would be a wrong one."""
    content = b'{"text": "fine"}\n' * 2000 + b'{"text": "caf\xe9"}\n'
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(SwquantError, match="line 2001, cannot be read as UTF-8: invalid continuation byte at byte 13"):
        read_text(str(path))


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:-12], "ended before the end-of-stream marker"),
    (lambda data: b"text" + data, "Not a gzipped file"),
    (lambda data: data[:30] + bytes([255]) * 30 + data[60:], "while decompressing data"),
    (lambda data: data[:-8] + bytes(8), "CRC check failed"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=["cut", "plain", "changed", "sum"])
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    rows = "\n".join(json.dumps({"text": f"{index * 7919 % 1009} words"}) for index in range(100))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(SwquantError, match=reason):
        read_text(str(path))


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

    def load_dataset(place: str, **given: object) -> Dataset:
        asked.append((place, given))
        return Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
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


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)
