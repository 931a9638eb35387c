"""Samples to train on and to measure on: from text, from a dataset, or drawn from the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import ALL_CACHE_NAMES

from swquant.checkpoint.reader import read_config
from swquant.documents import LINES, TEXTS, read_documents, read_plain
from swquant.errors import SwquantError, reason_of
from swquant.model.empty import model_class
from swquant.model.empty import read_config as parse_config
from swquant.phases.micro_batch import ran_out
from swquant.seeds import generator

LEAST_SHARE = 4
"""A text must hold at least one in so many of the tokens that the samples take; windows overlap below the whole."""

DRAWN_AT_ONCE = 16
_TRIED = 6
"""Tokens on which a model's cache is tried: more than a short convolution reaches over."""
_ROUNDING = 1e-3
"""By how much of the greatest logit answers with and without a cache may differ."""
_C4_DOCUMENTS = 10_000
_C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def read_text(source: str) -> str:
    """The text of a file, of a jsonl file's ``text`` fields, or of a dataset; documents are joined by two newlines.

    Args:
        source: A path; ``wikitext2`` or ``c4``, the latter the first 10,000 documents of the first shard; or
            ``name[:config][:split]`` of a dataset, e.g. ``wikitext:wikitext-2-raw-v1:test``. The split is ``train`` if
            none is given (``wikitext2:test``).

    Raises:
        SwquantError: If there is no such thing, or it holds no text.
    """
    path = Path(source)
    if path.is_file():
        return "\n\n".join(read_documents(path)) if source.lower().endswith(LINES) else read_plain(path)
    deep = os.sep in source.removesuffix(os.sep).partition(os.sep)[2]
    if deep or source.startswith(".") or source.lower().endswith((*LINES, *TEXTS)):
        raise SwquantError(f"there is no text file {source}; give a .txt or .jsonl file, a datasets name, or 'self'")
    return _read_dataset(source)


def _read_dataset(source: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise SwquantError(
            f"{source!r} is no file, and reading it as a dataset needs: pip install 'swquant[datasets]'"
        ) from error
    path, settings = _dataset(source)
    try:
        rows: Any = datasets.load_dataset(path, **settings)
        documents: list[str] = list(rows["text"])
    except Exception as error:  # the library raises whatever its loaders, file systems and the hub do
        reason = reason_of(error)
        raise SwquantError(f"the dataset {source!r} cannot be read: {reason}") from error
    return "\n\n".join(documents)


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


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """``int64 [tokens]``: the text tokenised once in whole, with the special tokens that the tokenizer adds.

    Raises:
        SwquantError: The tokenizer's settings are such that it cannot.
    """
    try:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    except Exception as error:  # some settings are read only here
        if ran_out(error):
            raise
        reason = reason_of(error)
        raise SwquantError(f"the tokenizer of {tokenizer.name_or_path} does not tokenize: {reason}") from error


def begun(windows: Tensor, begin: int | None) -> Tensor:
    """Windows of a text, ``int64 [windows, tokens]``, each of which begins with the token ``begin``, if that is given.

    It takes the place of the last token, so that the windows stay as long as they are; one that begins with it already
    stays as it is.
    """
    if begin is None:
        return windows
    first = torch.full_like(windows[:, :1], begin)
    return torch.where(windows[:, :1] == begin, windows, torch.cat((first, windows[:, :-1]), 1))


def sample_windows(tokens: Tensor, samples: int, seq_len: int, seed: int, begin: int | None = None) -> Tensor:
    """Random windows of a text, ``int64 [samples, seq_len]``; they overlap only where the text is too short not to.

    Args:
        tokens: Of the text.
        samples: How many.
        seq_len: Tokens of each.
        seed: Of the draws.
        begin: See :func:`begun`.

    Raises:
        SwquantError: If the text has fewer than a quarter of the tokens that the samples take, or than one window.
    """
    needed = max(seq_len, -(-samples * seq_len // LEAST_SHARE))
    if len(tokens) < needed:
        raise SwquantError(
            f"the calibration text is too short: {samples} samples of {seq_len} tokens need at least {needed} tokens, "
            f"{len(tokens)} are left for them; give more text, or fewer or shorter samples"
        )
    rng = generator(seed, "windows")
    windows = len(tokens) // seq_len
    if windows >= samples:
        starts = torch.randperm(windows, generator=rng)[:samples] * seq_len
    else:
        starts = torch.randint(len(tokens) - seq_len + 1, (samples,), generator=rng)
    return begun(torch.stack([tokens[start : start + seq_len] for start in starts.tolist()]), begin)


def eval_windows(tokens: Tensor, seq_len: int, limit: int | None, begin: int | None = None) -> Tensor:
    """Consecutive windows from the start, ``int64 [windows, seq_len]``; what does not fill a window is dropped.

    Args:
        tokens: Of the text.
        seq_len: Tokens of a window.
        limit: Only the first so many windows.
        begin: See :func:`begun`.

    Raises:
        SwquantError: If the text does not fill one.
    """
    count = len(tokens) // seq_len
    if not count:
        raise SwquantError(
            f"the evaluation text is too short: a window needs {seq_len} tokens, it has {len(tokens)}; "
            "give more text or a shorter context"
        )
    return begun(tokens[: count * seq_len].view(count, seq_len)[:limit], begin)


@torch.no_grad()
def draw_from_model(
    source: Path | Callable[[], Any],
    samples: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    note: Callable[[str], None],
) -> Tensor:
    """Samples that the model writes itself, at temperature 1 from its full distribution (LLM-QAT, arXiv 2305.17888).

    Each begins with the token that the model begins texts with, or a random one if it has none, and does not stop at
    the token that ends texts. This one step holds the whole model in memory.

    Args:
        source: The model's directory, or what makes the model in float32.
        samples: How many.
        seq_len: Tokens of each.
        seed: Of the draws.
        device: Where to compute.
        note: Is told how far it is.

    Returns:
        ``int64 [samples, seq_len]``.
    """
    model: Any
    if not isinstance(source, Path):
        model = source()
    else:
        values = read_config(source)
        model = model_class(values, parse_config(values, source), source).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    model = model.to(device).eval()
    text_config = model.config.get_text_config(decoder=True)
    first = text_config.bos_token_id
    cache = _cache(model, device)
    drawn: list[Tensor] = []
    for start in range(0, samples, DRAWN_AT_ONCE):
        rng = generator(seed, "self", start)
        count = min(DRAWN_AT_ONCE, samples - start)
        token = torch.randint(text_config.vocab_size, (count, 1), generator=rng)
        if isinstance(first, int):
            token = torch.full((count, 1), first)
        text, past = token, None
        while text.shape[1] < seq_len:
            out = _answer(model, token if cache else text, device, cache, past)
            past = out[cache] if cache else None
            token = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=rng)
            text = torch.cat((text, token), 1)
        drawn.append(text)
        note(f"{start + count} of {samples} samples drawn")
    return torch.cat(drawn)


def _answer(model: Any, tokens: Tensor, device: torch.device, cache: str | None = None, past: Any = None) -> Any:
    """The model's output for ``tokens`` after what ``past`` holds; logits of the last one, where it can."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    given = {cache: past} if cache and past is not None else {}
    return model(input_ids=tokens.to(device), use_cache=cache is not None, **given, **last)


def _cache(model: Any, device: torch.device) -> str | None:
    """The name by which a model hands out and takes back what it keeps of a text, if it then answers as to the whole.

    State-space models have another name than attention. A few keep nothing, or come to another answer with what they
    keep: these read the whole text anew for each token.
    """
    tokens = torch.arange(1, 1 + _TRIED)[None] % model.config.get_text_config(decoder=True).vocab_size
    whole: Tensor = _answer(model, tokens, device).logits[:, -1]
    for name in ALL_CACHE_NAMES:
        past: Any = None
        logits = torch.full_like(whole, torch.nan)
        try:
            for token in tokens.split(1, 1):
                out = _answer(model, token, device, name, past)
                past, logits = out[name], out.logits[:, -1]
        except Exception as error:  # a name that the model does not know, or a cache that it cannot go on with
            if ran_out(error):
                raise
            continue
        if past is not None and torch.allclose(logits, whole, rtol=0, atol=float(whole.abs().max()) * _ROUNDING):
            return name
    return None
