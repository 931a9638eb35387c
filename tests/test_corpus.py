"""Chats, packed documents and mixtures of public datasets, and the tokens that they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset

from swquant import Recipe, SwquantError, quantize
from swquant.corpus import KINDS, Corpus, read_corpus, read_text, tokens_of
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('only users and assistants') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if tools %}[{{ tools[0].name }}]{% endif %}"
)
CHAT = [{"role": "user", "content": "reads a text?"}, {"role": "assistant", "content": "writes codes"}]
SHARED = [{"from": "human", "value": "reads a text?"}, {"from": "gpt", "value": "writes codes"}]


@pytest.fixture
def chatting(make_model: MakeModel) -> Path:
    model = make_model("llama", fresh=True)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHARED}, {"id": 1, "conversations": CHAT}])
def test_a_chat_goes_through_the_models_template_and_ends_with_its_token(
    chatting: Path, tmp_path: Path, row: dict[str, Any]
) -> None:
    corpus = read_corpus(lines(tmp_path / "chats.jsonl", row, {**row, "tools": [{"name": "clock"}]}))
    tokens = tokens_of(corpus, load_tokenizer(chatting))
    shown = "<user>reads a text?<assistant>writes codes"
    assert load_tokenizer(chatting).decode(tokens) == f"{shown}</s>{shown}[clock]</s>"


def test_texts_alone_are_joined_as_ever_and_beside_chats_they_are_packed(chatting: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chatting)
    texts = read_corpus(lines(tmp_path / "texts.jsonl", {"text": "one"}, {"text": "two", "messages": CHAT}))
    assert not texts.packed
    assert tokenizer.decode(tokens_of(texts, tokenizer)) == "one\n\ntwo"
    both = read_corpus(lines(tmp_path / "both.jsonl", {"text": "one</s>"}, {"messages": CHAT}))
    assert tokenizer.decode(tokens_of(both, tokenizer)) == "one</s><user>reads a text?<assistant>writes codes</s>"
    with pytest.raises(SwquantError, match="only a model's tokenizer joins"):
        read_text(str(tmp_path / "both.jsonl"))


def test_chats_without_a_template_are_refused_before_anything_is_trained(
    llama: Path, chatting: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "chats.jsonl", *[{"messages": CHAT}] * 20)
    recipe = Recipe(4, 32, method="rtn", calibration=path, samples=4, seq_len=16, evaluation_samples=2, device="cpu")
    with pytest.raises(SwquantError, match=r"has no chat template.*give documents with a 'text'"):
        quantize(recipe, llama, tmp_path / "out")
    assert not (tmp_path / "out.swquant-work").exists()
    report = quantize(recipe, chatting, tmp_path / "out")
    assert report.quality is not None
    system = lines(tmp_path / "chats.jsonl", {"messages": [{"role": "system", "content": "be brief"}, *CHAT]})
    with pytest.raises(SwquantError, match=r"the chat template of .* refuses: only users and assistants"):
        tokens_of(read_corpus(system), load_tokenizer(chatting))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, r"'messages' is '\[\]', expected a list of messages"),
        ({"messages": "hello"}, "'messages' is 'hello', expected a list of messages"),
        ({"messages": ["hello"]}, "line 1, message 1: a string, expected an object with role and content"),
        ({"messages": [*CHAT, {"role": "user"}]}, "line 1, message 3: .* has no role and content"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1: .* has no role and content, or no from"),
        (
            {"message": CHAT},
            r"the object has no field 'text'.* \(it has message\)",
        ),
    ],
)
def test_a_bad_chat_is_named_with_the_true_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SwquantError, match=reason):
        read_corpus(lines(tmp_path / "chats.jsonl", row))


def row_of(kind: str, number: int) -> dict[str, Any]:
    """A row with the columns that the dataset of a kind has, and some others of it."""
    word = f"{kind} {number} " * (1 + number % 3)
    return {
        "chat": {"prompt": word, "prompt_id": "x", "messages": [{"content": word, "role": "user"}, CHAT[1]]},
        "reasoning": {"difficulty": 7, "conversations": [{"from": "human", "value": word}, SHARED[1]]},
        "code": {"lang": "python", "problem": word, "solution": "def f(): ..."},
        "prose": {"text": word, "id": "x", "score": 3.5},
        "tools": {"conversations": [{"from": "human", "value": word}, SHARED[1]], "tools": "[]", "category": "x"},
    }[kind]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The datasets of all kinds, of 4000 rows each; what is asked for is noted, the rows that are read too."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **settings: Any) -> IterableDataset:
        name = next(name for name, kind in KINDS.items() if kind.dataset == path)
        asked.append((path, settings))
        return Dataset.from_list([row_of(name, number) for number in range(4000)]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_mixture_has_as_many_tokens_of_each_kind_in_turns(
    chatting: Path, hub: list[tuple[str, dict[str, Any]]]
) -> None:
    tokenizer, wanted = load_tokenizer(chatting), 4000
    corpus = read_corpus("mix", wanted)
    assert [path for path, _ in hub] == [kind.dataset for kind in KINDS.values()]
    assert all(settings["streaming"] for _, settings in hub)
    assert max(map(len, corpus.parts.values())) < 4000
    tokens = tokens_of(corpus, tokenizer)
    documents = tokenizer.decode(tokens).split("</s>")
    assert len(tokens) >= wanted
    for start in (0, len(documents) // 2):
        half = documents[start : start + len(documents) // 2]
        counts = [sum(len(tokenizer(text)["input_ids"]) + 1 for text in half if f"{kind} " in text) for kind in KINDS]
        assert max(counts) - min(counts) < 100
    assert sum("def f(): ..." in text for text in documents) == sum(text.startswith("code") for text in documents)


def test_kinds_are_named(chatting: Path, hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    assert list(read_corpus("mix:prose+code", 100).parts) == ["prose", "code"]
    assert hub[0] == ("HuggingFaceFW/fineweb-edu", {"name": "sample-10BT", "split": "train", "streaming": True})
    for bad, reason in {
        "mix:": "no kind ''",
        "mix:chats": "did you mean 'chat'",
        "mix:code+code": "name it once",
    }.items():
        with pytest.raises(SwquantError, match=reason):
            read_corpus(bad)
    recipe = Recipe(4, 32, method="rtn", calibration="mix:chat+code", samples=4, seq_len=16, device="cpu")
    report = quantize(recipe, chatting, tmp_path / "out")
    assert report.recipe["calibration"] == "mix:chat+code"
    assert report.quality is not None


def test_a_row_without_a_kinds_field_and_a_hub_out_of_reach_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"content": "x"}]))
    with pytest.raises(
        SwquantError, match="'HuggingFaceFW/fineweb-edu', for 'prose' of a mixture, cannot be read: 'text'"
    ):
        read_corpus("mix:prose")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SwquantError, match="no route to the hub"):
        read_corpus("mix:prose")


def test_a_repository_on_disk_is_streamed_no_further_than_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own streaming of parquet files, as they lie in a repository."""
    place = tmp_path / "fineweb" / "sample-10BT"
    place.mkdir(parents=True)
    for part in range(2):
        rows = Dataset.from_list([row_of("prose", number) for number in range(part * 100, part * 100 + 100)])
        rows.to_parquet(place / f"train-{part:05d}.parquet")
    real = datasets.load_dataset

    def local(path: str, *, name: str, split: str, streaming: bool) -> Any:
        return real(
            "parquet", data_files=str(tmp_path / "fineweb" / name / "*.parquet"), split=split, streaming=streaming
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    found = read_corpus("mix:prose", 20).parts["prose"]
    assert found == tuple(row_of("prose", number)["text"] for number in range(len(found)))
    assert 160 <= sum(map(len, map(str, found))) < 200
    assert len(read_corpus("mix:prose", 10**6).parts["prose"]) == 200


def test_a_dataset_of_chats_is_read_by_its_name(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list([row_of("chat", 1)]))
    corpus = read_corpus("some/chats")
    assert "<user>chat 1 chat 1 <assistant>" in load_tokenizer(chatting).decode(
        tokens_of(corpus, load_tokenizer(chatting))
    )


def test_the_same_documents_have_one_digest_and_others_another() -> None:
    corpora = [
        Corpus({"a": ("x", "y")}, packed=True),
        Corpus({"a": ("x", {"messages": CHAT})}, packed=True),
        Corpus({"a": ("x",), "b": ("y",)}, packed=True),
        Corpus({"": ("x", "y")}),
    ]
    assert len({corpus.digest() for corpus in corpora}) == len(corpora)
    assert corpora[0].digest() == Corpus({"a": ("x", "y")}, packed=True).digest()
