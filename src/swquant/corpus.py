"""Text to calibrate and to measure on: files, datasets, mixtures of kinds, and how documents become tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.documents import CHATS, LINES, TEXTS, Document, document_of, read_plain, read_values
from swquant.errors import SwquantError, did_you_mean, reason_of
from swquant.phases.micro_batch import ran_out
from swquant.recipe import AUTO, BUNDLED, SELF

MIX = "mix"
CHARACTERS = 8
"""Of a mixture's part, so many are read for each token that is wanted of it: more than a token has in any of them."""
MIXED = 1 << 19
"""Tokens that a mixture is read for where nobody says how many."""

_C4_DOCUMENTS = 10_000
_C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class Kind:
    """A part of a mixture: a public dataset that may be used freely.

    Attributes:
        dataset: Its name on the hub.
        split: Which of its splits.
        fields: Of a row: a chat, or texts that make a document together.
        config: Which of its configurations; ``None`` is the only one.
    """

    dataset: str
    split: str
    fields: tuple[str, ...]
    config: str | None = None


KINDS: Mapping[str, Kind] = {
    "chat": Kind("HuggingFaceH4/ultrachat_200k", "train_sft", ("messages",)),  # MIT
    "reasoning": Kind("open-thoughts/OpenThoughts3-1.2M", "train", ("conversations",)),  # Apache-2.0
    "code": Kind("ise-uiuc/Magicoder-OSS-Instruct-75K", "train", ("problem", "solution")),  # MIT
    "prose": Kind("HuggingFaceFW/fineweb-edu", "train", ("text",), "sample-10BT"),  # ODC-By
    "tools": Kind("NousResearch/hermes-function-calling-v1", "train", ("conversations",), "func_calling"),  # Apache-2.0
}
"""What mixtures are made of, by the names that ``mix:`` has for them, with the licences that their cards name."""


@dataclass(frozen=True)
class Corpus:
    """Documents by kind.

    Attributes:
        parts: The documents of each kind, by its name.
        packed: An end-of-text token ends each document, and kinds get as many tokens each; otherwise there is one part,
            and its texts are joined by two newlines.
    """

    parts: Mapping[str, tuple[Document, ...]]
    packed: bool = False

    @property
    def text(self) -> str:
        """Of a corpus that is not packed."""
        return "\n\n".join(str(document) for documents in self.parts.values() for document in documents)

    def digest(self) -> str:
        """SHA-256 of all that its tokens follow from."""
        content = json.dumps(dict(self.parts)) if self.packed else self.text
        return hashlib.sha256(content.encode()).hexdigest()


def read_text(source: str) -> str:
    """The text of :func:`read_corpus` in one.

    Raises:
        SwquantError: As there, or it holds chats or kinds, which make no text without a tokenizer.
    """
    corpus = read_corpus(source)
    if corpus.packed:
        raise SwquantError(f"{source} is made of documents that only a model's tokenizer joins; give plain text")
    return corpus.text


def read_corpus(source: str, tokens: int = MIXED) -> Corpus:
    """What a file, a dataset or a mixture holds.

    Args:
        source: A path of a text file or of JSON lines, whose objects have a ``text`` or a chat; ``bundled``, the text
            that comes with swquant; ``mix``, or some of its kinds: ``mix:chat+code``; ``wikitext2`` or ``c4``, the
            latter the first 10,000 documents of the first shard; or ``name[:config][:split]`` of a dataset, e.g.
            ``wikitext:wikitext-2-raw-v1:test``. The split is ``train`` if none is given (``wikitext2:test``).
        tokens: How many are wanted of a mixture; everything else is read whole.

    Raises:
        SwquantError: If there is no such thing, or it holds no document.
    """
    path = Path(source)
    if path.is_file():
        return (
            _of_documents(read_values(path, document_of))
            if source.lower().endswith(LINES)
            else _of_documents([read_plain(path)])
        )
    if source in (AUTO, SELF):
        raise SwquantError(
            f"{source!r} is for --calibration; text to measure on is a file, a datasets name, or bundled"
        )
    if source == BUNDLED:
        return _bundled()
    if source == MIX or source.startswith(f"{MIX}:"):
        return _mixed(source, tokens)
    deep = os.sep in source.removesuffix(os.sep).partition(os.sep)[2]
    if deep or source.startswith(".") or source.lower().endswith((*LINES, *TEXTS)):
        raise SwquantError(
            f"there is no text file {source}; give a .txt or .jsonl file, a datasets name, mix, or bundled; "
            "--calibration takes auto and self, too"
        )
    return _of_documents(_read_dataset(source))


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """``int64 [tokens]``: the text tokenised once in whole, with the special tokens that the tokenizer adds.

    Raises:
        SwquantError: The tokenizer's settings are such that it cannot.
    """
    return torch.tensor(_encode(tokenizer, text), dtype=torch.long)


def tokens_of(corpus: Corpus, tokenizer: Any) -> Tensor:
    """``int64 [tokens]`` of a corpus.

    Packed documents follow each other, each from the part that has fewest tokens so far, until one part has run out: so
    kinds take turns and are equal, but for a document. Each ends with the end-of-text token; a chat goes through the
    model's template.

    Raises:
        SwquantError: The tokenizer's settings are such that it cannot, or it has no template for chats.
    """
    if not corpus.packed:
        return tokenize(tokenizer, corpus.text)
    end = tokenizer.eos_token_id
    joint = [end] if isinstance(end, int) else _encode(tokenizer, "\n\n", add_special_tokens=False)
    left = {name: iter(documents) for name, documents in corpus.parts.items()}
    filled = dict.fromkeys(left, 0)
    found: list[int] = []
    while True:
        name = min(filled, key=filled.__getitem__)
        document = next(left[name], None)
        if document is None:
            return torch.tensor(found, dtype=torch.long)
        ids = _of_document(tokenizer, document, name)
        ids += [] if ids[-len(joint) :] == joint else joint
        found += ids
        filled[name] += len(ids)


def _of_document(tokenizer: Any, document: Document, part: str) -> list[int]:
    if isinstance(document, str):
        return _encode(tokenizer, document)
    there = f"{part!r} has chats" if part else "the text has chats"
    if not tokenizer.chat_template:
        raise SwquantError(
            f"{there}, and the tokenizer of {tokenizer.name_or_path} has no chat template, as that of a model has none "
            f"that is no chat model: give documents with a 'text', or kinds without chats: {MIX}:code+prose"
        )
    try:
        shown = tokenizer.apply_chat_template(document["messages"], tools=document.get("tools"), tokenize=False)
    except Exception as error:  # a template raises whatever its author and jinja do
        raise SwquantError(
            f"{there} that the chat template of {tokenizer.name_or_path} refuses: {reason_of(error)}; leave them out"
        ) from error
    return _encode(tokenizer, str(shown), add_special_tokens=False)


def _encode(tokenizer: Any, text: str, **settings: bool) -> list[int]:
    try:
        return list(tokenizer(text, verbose=False, **settings)["input_ids"])
    except Exception as error:  # some settings are read only here
        if ran_out(error):
            raise
        reason = reason_of(error)
        raise SwquantError(f"the tokenizer of {tokenizer.name_or_path} does not tokenize: {reason}") from error


def _of_documents(documents: Iterable[Document]) -> Corpus:
    found = tuple(documents)
    return Corpus({"": found}, packed=not all(isinstance(document, str) for document in found))


def _bundled() -> Corpus:
    parts: dict[str, list[Document]] = {}
    with resources.as_file(resources.files("swquant") / "texts" / "calibration.jsonl.gz") as path:
        for kind, text in read_values(path, lambda row, _: (str(row["kind"]), str(row["text"]))):
            parts.setdefault(kind, []).append(text)
    return Corpus({kind: tuple(documents) for kind, documents in parts.items()}, packed=True)


def _mixed(source: str, tokens: int) -> Corpus:
    names = source.partition(":")[2].split("+") if ":" in source else list(KINDS)
    for name in names:
        if name not in KINDS or names.count(name) > 1:
            hint = did_you_mean(name, KINDS) if name not in KINDS else "; name it once"
            raise SwquantError(f"the mixture {source!r} has no kind {name!r}{hint}")
    wanted = CHARACTERS * -(-tokens // len(names))
    return Corpus({name: tuple(_until(_of_kind(name), wanted)) for name in names}, packed=True)


def _until(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    """The first documents that have so many characters together."""
    total = 0
    for document in documents:
        yield document
        total += len(document) if isinstance(document, str) else len(json.dumps(document))
        if total >= characters:
            return


def _of_kind(name: str) -> Iterator[Document]:
    """A part's documents in the dataset's order; no more rows are fetched than are asked for."""
    kind = KINDS[name]
    where = f"the dataset {kind.dataset!r}, for {name!r} of a mixture,"
    try:
        rows = _load(kind.dataset, where, name=kind.config, split=kind.split, streaming=True)
        for number, row in enumerate(rows, 1):
            place = f"{kind.dataset}, row {number}"
            if kind.fields[0] in CHATS:
                yield document_of({field: row[field] for field in kind.fields}, place)
            else:
                yield "\n\n".join(str(document_of({"text": row[field]}, place)) for field in kind.fields)
    except SwquantError:
        raise
    except Exception as error:  # rows are fetched while they are asked for
        raise _unreadable(where, error) from error


def load_dataset(path: str, **settings: Any) -> Any:
    """``datasets.load_dataset``, out of its cache at once where the hub does not answer.

    Raises:
        ImportError: The library is not installed.
        Exception: Whatever its loaders, file systems and the hub raise.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    libraries: tuple[Any, ...] = (constants, import_module("datasets.config"))
    before = [library.HF_HUB_OFFLINE for library in libraries]
    try:
        if not any(before):
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whichever client the hub's library has
        # Not told, both try again for half a minute, in lines of their own, before they look into their caches.
        for library in libraries:
            library.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(path, **settings)
    finally:
        for library, offline in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = offline


def _load(path: str, where: str, **settings: Any) -> Any:
    try:
        return load_dataset(path, **settings)
    except ImportError as error:
        raise SwquantError(f"reading {where} needs: pip install 'swquant[datasets]'") from error
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> SwquantError:
    return SwquantError(f"{where} cannot be read: {reason_of(error)}")


def _read_dataset(source: str) -> list[Document]:
    path, settings = _dataset(source)
    where = f"the dataset {source!r}, which is no file,"
    rows = _load(path, where, **settings)
    try:
        field = next((name for name in ("text", *CHATS) if name in rows.column_names), "text")
        if field == "text":
            return list(rows["text"])
        return [document_of({"text": None, **row}, f"{source}, row {at}") for at, row in enumerate(rows, 1)]
    except SwquantError:
        raise
    except Exception as error:  # a split that is not there, a file that breaks off
        raise _unreadable(where, error) from error


def _dataset(source: str) -> tuple[str, dict[str, Any]]:
    """The name on the hub and the settings of ``datasets.load_dataset``."""
    name, *rest = source.split(":")
    most = 1 if name in ("wikitext2", "c4") else 2
    if len(rest) > most:
        form = f"{name}[:split]" if most == 1 else "name[:config][:split]"
        raise SwquantError(f"the dataset {source!r} has too many parts, expected {form}")
    split = rest[-1] if len(rest) == most else "train"
    if name == "wikitext2":
        return "Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": split}
    if name == "c4":
        if split not in _C4_SHARDS:
            raise SwquantError(f"c4 has no split {split!r}, expected {' or '.join(_C4_SHARDS)}")
        return "allenai/c4", {"data_files": {split: _C4_SHARDS[split]}, "split": f"{split}[:{_C4_DOCUMENTS}]"}
    return name, {"name": (rest[0] if rest else None) or None, "split": split}
