"""The windows that a model is measured on: a text's, or those of the sets and protocols that papers report."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swquant.calibration import begun, eval_windows
from swquant.corpus import load_dataset, read_corpus, tokenize, tokens_of
from swquant.documents import read_documents
from swquant.errors import SwquantError, reason_of

WINDOWS = 256
"""Windows that both C4 protocols measure on."""

C4_DOCUMENTS = 1100
C4_SEED = 0
_C4 = "en/c4-validation.00000-of-00008.json.gz"


@dataclass(frozen=True)
class Protocol:
    """A set as GPTQ's code (arXiv 2210.17323) reads it.

    Attributes:
        dataset: Its name on the hub.
        settings: Of ``datasets.load_dataset``.
        field: Where a row's text stands.
        cut: ``joined``: the documents joined, tokenised once, cut in windows that do not overlap. ``drawn``: 256 times
            a random document that is longer than a window, and a random window of it.
        joint: What stands between joined documents.
        documents: Only the first so many.
        windows: Only the first so many.
    """

    dataset: str
    settings: Mapping[str, Any]
    field: str = "text"
    cut: Literal["joined", "drawn"] = "joined"
    joint: str = "\n\n"
    documents: int | None = None
    windows: int | None = None


def _ptb(split: str) -> dict[str, Any]:
    # The set's own branch holds a script, which `datasets` no longer runs; this one holds what the script made.
    files = {split: f"penn_treebank/{split}/*.parquet"}
    return {"revision": "refs/convert/parquet", "data_files": files, "split": split}


_C4_SETTINGS = {"data_files": {"validation": _C4}, "split": "validation"}
PROTOCOLS: Mapping[str, Protocol] = {
    "wikitext2": Protocol("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}),
    "c4": Protocol("allenai/c4", _C4_SETTINGS, cut="drawn", windows=WINDOWS),
    "c4-new": Protocol("allenai/c4", _C4_SETTINGS, joint=" ", documents=C4_DOCUMENTS, windows=WINDOWS),
    "ptb": Protocol("ptb-text-only/ptb_text_only", _ptb("validation"), field="sentence"),
    "ptb-new": Protocol("ptb-text-only/ptb_text_only", _ptb("test"), field="sentence", joint=" "),
}


def measured_windows(source: str, tokenizer: Any, context: int, limit: int | None, begin: int | None = None) -> Tensor:
    """The windows to measure on, ``int64 [windows, context]``.

    Args:
        source: A name of :data:`PROTOCOLS`; ``NAME=FILE`` for the same protocol on a jsonl file (it may be gzipped),
            such as a shard of C4; or what :func:`swquant.corpus.read_corpus` takes.
        tokenizer: The model's.
        context: Tokens of a window.
        limit: Only the first so many windows.
        begin: See :func:`swquant.calibration.begun`.

    Raises:
        SwquantError: There is no such text, or it is too short.
    """
    name, given, file = source.partition("=")
    protocol = None if Path(source).is_file() else PROTOCOLS.get(name)
    if protocol is None:
        return eval_windows(tokens_of(read_corpus(source), tokenizer), context, limit, begin)
    documents = read_documents(Path(file), protocol.field) if given else _load(name, protocol)
    if protocol.windows is not None:
        limit = min(limit or protocol.windows, protocol.windows)
    if protocol.cut == "drawn":
        return begun(draw_windows(documents, tokenizer, context, limit or WINDOWS), begin)
    text = protocol.joint.join(documents[: protocol.documents])
    return eval_windows(tokenize(tokenizer, text), context, limit, begin)


def draw_windows(documents: Sequence[str], tokenizer: Any, context: int, count: int) -> Tensor:
    """Random windows of random documents, the same that GPTQ's code draws: Python's generator, seed 0.

    A document that is exactly as long as a window stops GPTQ's code; here it is passed over.

    Returns:
        ``int64 [count, context]``.

    Raises:
        SwquantError: No document is longer than a window.
    """
    rng = random.Random(C4_SEED)
    windows: list[Tensor] = []
    short: set[int] = set()
    while len(windows) < count:
        if len(short) == len(documents):
            raise SwquantError(
                f"none of the {len(documents)} documents has more than {context} tokens; give a shorter --context"
            )
        index = rng.randint(0, len(documents) - 1)
        if index in short:
            continue
        tokens = tokenize(tokenizer, documents[index])
        if len(tokens) <= context:
            short.add(index)
            continue
        start = rng.randint(0, len(tokens) - context - 1)
        windows.append(tokens[start : start + context])
    return torch.stack(windows)


def _load(name: str, protocol: Protocol) -> list[str]:
    try:
        rows = load_dataset(protocol.dataset, **protocol.settings)
        return list(rows[protocol.field])
    except ImportError as error:
        raise SwquantError(
            f"reading {name} from the hub needs: pip install 'swquant[datasets]'; or give a file, {name}=FILE.jsonl"
        ) from error
    except Exception as error:  # the library raises whatever its loaders, file systems and the hub do
        reason = reason_of(error)
        raise SwquantError(
            f"{name} ({protocol.dataset}) cannot be read: {reason}; give a text of your own, --text FILE.txt, "
            f"or this one as a file, --text {name}=FILE.jsonl"
        ) from error
