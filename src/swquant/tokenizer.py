"""How a model reads text: the tokens that its own ``tokenizer.json`` makes, and what its windows begin with.

transformers 5 takes a tokenizer apart and builds for some classes and model types what such a class would have made, so
its tokens may be others than those that the model was trained on. Whoever has a ``tokenizer.json`` means it: it is read
by the library that defines it, and transformers' tokenizer is asked for names, chat templates and a second opinion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from swquant.checkpoint.own_code import CODE
from swquant.checkpoint.reader import read_config
from swquant.checkpoint.shards import read_json
from swquant.checkpoint.sidecars import is_of_tokenizer
from swquant.errors import SwquantError, reason_of
from swquant.families import begins_each_window

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"

PROBE = (
    "Hello, world! It's 1234567 or 3.14159; we've HTTPServer2 in camelCaseAndSNAKE_case.",
    " begins with a space,  has   runs of them\n\n\n\tand tabs\r\nand ends in some   ",
    "1  22   333\n\n\n4444\t5 a1b22c333 (6) $7.50 -8 +9 #10\n    v1.2.3e-4\n    0x0A",
    "def f(x: int) -> list[int]:\n    return [x**2 for _ in range(10)]  # ½ Ⅷ ٣ ﬁ e\u0301",
    "naïve café Ærøskøbing Привет мир שלום مرحبا สวัสดี नमस्ते 你好\uff0c世界 こんにちは 한국어",
    "😀 👩\u200d👧 🇩🇪 zero\u200bwidth nbsp\u00a0here \u3000 … “quotes” — dash\u2028line",
)
"""Texts on which ways to cut words, to treat digits, spaces and Unicode's forms differ."""


UNKNOWN = 0.02
"""Share of a text's tokens that may be unknown before that is said."""


@dataclass(frozen=True)
class Reading:
    """A model's tokenizer.

    Attributes:
        tokenizer: transformers' object, which cuts text as ``tokenizer.json`` says where there is one.
        begin: The token that each window begins with; ``None`` where windows are pieces of a text as they come.
        notes: What a user has to know of it, in sentences.
    """

    tokenizer: Any
    begin: int | None = None
    notes: tuple[str, ...] = ()

    def notes_on(self, tokens: Tensor) -> tuple[str, ...]:
        """What a user has to know of it on a text's ``tokens``: how many of them are the one for what is not known."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown == self.begin or not tokens.numel():
            return self.notes
        share = float((tokens == unknown).double().mean())
        if share < UNKNOWN:
            return self.notes
        shown = self.tokenizer.convert_ids_to_tokens(unknown)
        return (
            *self.notes,
            f"{share:.0%} of the text's tokens are {shown!r:.40}, which stands for what the tokenizer does not know: "
            "predictions of such text say little of the model",
        )


def open_reading(directory: Path, *, trusted: bool = False) -> Reading:
    """A model's tokenizer, what its windows begin with, and where transformers makes other tokens of a text.

    Args:
        directory: The model's.
        trusted: Run the tokenizer's own code, where it has some.

    Raises:
        SwquantError: There is no tokenizer that loads.
    """
    tokenizer = load_tokenizer(directory, trusted=trusted)
    begin, notes = None, difference(directory, tokenizer, trusted=trusted)
    config = read_config(directory)
    if begins_each_window(config):
        begin = _first(tokenizer, config)
    if begin is not None:
        shown = tokenizer.convert_ids_to_tokens(begin)
        notes += (f"each window begins with {shown!r:.40}, without which models of this kind predict badly",)
    return Reading(tokenizer, begin, notes)


def load_tokenizer(directory: Path, *, trusted: bool = False) -> Any:
    """The tokenizer in a model directory, as transformers' object.

    With a ``tokenizer.json`` its tokens are those of ``tokenizers.Tokenizer.from_file``, but for what
    ``tokenizer_config.json`` sets beside it: ``add_bos_token`` and ``add_eos_token``, and added tokens that are listed
    with ids which they get. Without one, transformers makes it from whatever there is.

    Raises:
        SwquantError: There is none that loads, or none without code from the directory and that is not trusted.
    """
    if not (directory / TOKENIZER).is_file() or (trusted and _own_code(directory)):
        return _by_transformers(directory, trusted)
    backend = _backend(directory)
    try:
        tokenizer: Any = quietly(PreTrainedTokenizerFast.from_pretrained, directory, local_files_only=True)
    except Exception as error:  # tokenizer files fail in as many ways as there are tokenizers
        raise _unloadable(directory, error) from error
    tokenizer._tokenizer = backend  # as the file has it: transformers adds to it what the settings name
    try:
        tokenizer("", verbose=False)
    except Exception as error:  # some settings are read only here, the greatest length for instance
        raise _unloadable(directory, error) from error
    return tokenizer


def difference(directory: Path, tokenizer: Any, *, trusted: bool = False) -> tuple[str, ...]:
    """A sentence where transformers' ``AutoTokenizer`` makes other tokens of a text than ``tokenizer.json``."""
    if not (directory / TOKENIZER).is_file() or (trusted and _own_code(directory)):
        return ()
    used = f"the tokens of {TOKENIZER} are used here"
    try:
        auto = _by_transformers(directory, trusted)
    except SwquantError as error:
        return (f"transformers' AutoTokenizer does not load ({error}); {used}",)
    settings = _settings(directory)
    for text in (*PROBE, *(f"a {token.content} b" for _, token in _listed(settings))):
        ours = tokenizer(text, verbose=False)["input_ids"]
        try:
            theirs = auto(text, verbose=False)["input_ids"]
        except Exception as error:  # some settings are read only here
            return (f"transformers' {type(auto).__name__} does not tokenize ({reason_of(error)}); {used}",)
        if theirs != ours:
            return (
                f"transformers' {type(auto).__name__} makes other tokens of a text than {TOKENIZER} ({len(theirs)} for "
                f"{len(ours)} of {text[:50]!r}), and so does whatever loads it that way; {used}",
            )
    return ()


def digest(directory: Path) -> str:
    """SHA-256 over all files of a model's tokenizer, names and contents."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if is_of_tokenizer(path.name) and path.is_file():
            content = path.read_bytes()
            found.update(json.dumps([path.name, len(content)]).encode() + content)
    return found.hexdigest()


def _backend(directory: Path) -> Tokenizer:
    """``tokenizer.json`` as its library reads it; a length to cut or to fill texts to is no part of how they read."""
    settings = _settings(directory)
    try:
        backend = Tokenizer.from_file(str(directory / TOKENIZER))
        backend.no_truncation()
        backend.no_padding()
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for index, token in _listed(settings):
            here = backend.token_to_id(token.content)
            if token.content not in known and (here if here is not None else backend.get_vocab_size()) == index:
                backend.add_tokens([token])
        _set_affixes(backend, settings)
    except Exception as error:  # the library raises bare exceptions
        raise _unloadable(directory, error) from error
    return backend


def _settings(directory: Path) -> Mapping[str, Any]:
    path = directory / SETTINGS
    return read_json(path) if path.is_file() else {}


def _listed(settings: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """Added tokens of ``tokenizer_config.json`` by their ids, in order."""
    listed = settings.get("added_tokens_decoder")
    rows = listed.items() if isinstance(listed, dict) else ()
    found = {int(key): row for key, row in rows if str(key).isdecimal() and isinstance(row, dict)}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for index, row in sorted(found.items()):
        if isinstance(row.get("content"), str) and row["content"]:
            yield index, AddedToken(row["content"], **{flag: bool(row[flag]) for flag in flags if flag in row})


def _set_affixes(backend: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Put before and after each text what ``add_bos_token`` and ``add_eos_token`` say, where they say anything."""
    bare, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    before, after = whole[:at], whole[at + len(bare) :]
    wanted = (_affix(backend, settings, "bos", before), _affix(backend, settings, "eos", after))
    if wanted == (before, after):
        return
    names = {index: backend.id_to_token(index) for index in (*wanted[0], *wanted[1])}
    single = [*(names[index] for index in wanted[0]), "$A", *(names[index] for index in wanted[1])]
    special = [(name, index) for index, name in names.items()]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=special)


def _affix(backend: Tokenizer, settings: Mapping[str, Any], name: str, now: list[int]) -> list[int]:
    asked, token = settings.get(f"add_{name}_token"), settings.get(f"{name}_token")
    text = token.get("content") if isinstance(token, dict) else token
    index = backend.token_to_id(text) if isinstance(text, str) else None
    if not isinstance(asked, bool) or index is None or (index in now) == asked:
        return now
    return [index] if asked else [other for other in now if other != index]


def _first(tokenizer: Any, config: Mapping[str, Any]) -> int | None:
    """The token that texts begin with, as the tokenizer or the model's configuration names it."""
    named = tokenizer.bos_token_id
    for part in (config, config.get("text_config")):
        if named is None and isinstance(part, dict):
            named = part.get("bos_token_id")
    return named if isinstance(named, int) else None


def _own_code(directory: Path) -> bool:
    """Whether ``tokenizer_config.json`` names code of the model's author."""
    named = _settings(directory).get(CODE)
    return bool(named.get("AutoTokenizer")) if isinstance(named, dict) else bool(named)


def _by_transformers(directory: Path, trusted: bool) -> Any:
    try:
        return quietly(AutoTokenizer.from_pretrained, directory, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # tokenizer files fail in as many ways as there are tokenizers
        if _own_code(directory) and not trusted:
            raise SwquantError(
                f"{directory} has no tokenizer that loads without the Python code that comes with it: read that code, "
                "and give --trust-remote-code to run it"
            ) from error
        raise _unloadable(directory, error) from error


def quietly(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Run what transformers comments on, in words and bars; what matters of it is said here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load(*args, **kwargs)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _unloadable(directory: Path, error: Exception) -> SwquantError:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return SwquantError(
            f"{directory} has no tokenizer that loads, and no tokenizer.json; put the original's tokenizer files there"
        )
    return SwquantError(f"{directory} has no tokenizer that loads: {reason_of(error)}")
