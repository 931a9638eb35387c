"""A model's tokenizer as llama.cpp knows it, or a refusal.

llama.cpp has an implementation of its own for each kind of tokenizer and, for byte-level BPE, a name for each way of
cutting text into words. Written as another kind than it is, a tokenizer works and gives other tokens. So every part of
``tokenizer.json`` that changes tokens is compared with what is known here, and all that is unknown is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from swquant.errors import SwquantError
from swquant.formats.reading import generation_settings
from swquant.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in a GGUF file."""

LARGEST_VOCABULARY = 1 << 24
LONGEST_TOKEN = 1024

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNDERSCORE = "▁"
_NO_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's way of cutting text at spaces, of which its normalizer has left none."""
_MISSING_BYTES = (
    "the tokenizer has no tokens for %d of the 256 bytes: characters with these bytes are left out of a text, by "
    "transformers as by llama.cpp, and the tokens next to them may differ"
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: ``gpt2``, a byte-level BPE, or ``llama``, a SentencePiece BPE.
        words: Name of the way in which text is cut into words before merges.
        tokens: Texts by id.
        kinds: :data:`NORMAL` and so on, by id.
        merges: Pairs of tokens in order, with a space between them; of ``gpt2``.
        scores: By id; the higher one is merged first; of ``llama``.
        special: Ids by ``bos``, ``eos``, ``unk`` and ``pad``, and ``eot`` and ``eom`` for other tokens that end a text.
        add_bos: Whether texts begin with ``bos``.
        add_eos: Whether they end with ``eos``.
        add_space: Whether a space is put in front; of ``llama``.
        templates: Chat templates by name; the one that is used unasked is ``default``.
        notes: Where tokens may differ from the original's.
    """

    model: str
    words: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    templates: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """What the parts of a ``tokenizer.json`` say together."""

    model: str
    words: str
    add_space: bool = False
    notes: tuple[str, ...] = ()


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in ``directory`` for a model of ``config``.

    Raises:
        SwquantError: There is none, or llama.cpp has none that gives the same tokens.
    """
    tokenizer = _load(directory)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(directory, parts)
    added = {token["id"]: token for token in parts["added_tokens"]}
    tokens, kinds = _tokens(directory, parts["model"], added, int(config["vocab_size"]))
    first, last = _affixes(directory, parts["post_processor"])
    scores = _scores(directory, parts["model"], added, tokens) if kind.model == "llama" else ()
    special = _special(tokenizer, config, first, last)
    if "eos" not in special:
        raise _unknown(directory, "names no token that ends a text")
    ends = [end for end in _ends(directory, config) if end != special["eos"] and end < len(tokens)]
    special |= dict(zip(("eot", "eom"), ends, strict=False))  # where llama.cpp stops as well
    untold = (f"llama.cpp is not told that the tokens {ends[2:]} end a text, too",) if len(ends) > 2 else ()
    merges = tuple(" ".join(pair) for pair in _pairs(parts["model"])) if kind.model == "gpt2" else ()
    template: Any = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template}
    return Vocabulary(
        model=kind.model,
        words=kind.words,
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        scores=scores,
        special=special,
        add_bos=first is not None,
        add_eos=last is not None,
        add_space=kind.add_space,
        templates={name: text for name, text in templates.items() if isinstance(text, str)},
        notes=(*kind.notes, *untold),
    )


def _load(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown(directory, "has no tokenizer.json and cannot be converted to one")
    return tokenizer


def _kind(directory: Path, parts: Mapping[str, Any]) -> _Kind:
    """Recognise a tokenizer by all of its parts that change tokens."""
    model = parts["model"]
    if model.get("type") != "BPE":
        raise _unknown(directory, f"is a {model.get('type')} model")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise _unknown(directory, f"has {setting} {model[setting]!r:.40}")
    for token in parts["added_tokens"]:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag]:
                raise _unknown(directory, f"sets {flag} for the token {token['content']!r:.40}")
        if token["normalized"] and _is_spaces(token):
            raise _unknown(directory, f"sets normalized for the token {token['content']!r:.40}")
    return _sentencepiece_kind(directory, parts) if model.get("byte_fallback") else _byte_level_kind(directory, parts)


def _byte_level_kind(directory: Path, parts: Mapping[str, Any]) -> _Kind:
    model, normalizer = parts["model"], parts["normalizer"]
    names = _words_names(parts["pre_tokenizer"])
    if names is None:
        raise _unknown(directory, f"cuts text into words by {_shown(parts['pre_tokenizer'])}")
    words = names.get(bool(model.get("ignore_merges")))
    if words is None:
        raise _unknown(directory, f"cuts text into words as {next(iter(names.values()))} with another ignore_merges")
    if normalizer not in (None, {"type": "NFC"}):
        raise _unknown(directory, f"normalizes text by {_shown(normalizer)}")
    notes: list[str] = []
    if normalizer:
        notes.append(
            "llama.cpp does not bring text to Unicode's form NFC as this tokenizer does: give it text in that form"
        )
    missing = set(ByteLevel.alphabet()) - model["vocab"].keys()
    if missing:
        notes.append(_MISSING_BYTES % len(missing))
    return _Kind("gpt2", words, notes=tuple(notes))


def _words_names(pre_tokenizer: Any) -> dict[bool, str] | None:
    """llama.cpp's names for a way to cut text into words, by the model's ``ignore_merges``."""
    for known, names in _WORDS_NAMES:
        if _essence(pre_tokenizer) == known:
            return names
    return None


def _essence(pre_tokenizer: Any) -> Any:
    """A pre-tokenizer without what changes offsets alone."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    if pre_tokenizer.get("type") == "Sequence":
        return [_essence(part) for part in pre_tokenizer["pretokenizers"]]
    return {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}


def _byte_level(use_regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(regex: str) -> list[object]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_WORDS_NAMES: Sequence[tuple[object, dict[bool, str]]] = (
    (_byte_level(True), {False: "gpt-2"}),
    ([_byte_level(True)], {False: "gpt-2"}),
    ([{"type": "Digits", "individual_digits": True}, _byte_level(True)], {False: "smollm"}),
    (_split(_WORDS % "{1,3}"), {True: "llama-bpe", False: "smaug-bpe"}),
    (_split(_WORDS % ""), {False: "qwen2"}),
)


def _sentencepiece_kind(directory: Path, parts: Mapping[str, Any]) -> _Kind:
    model, normalizer, words = parts["model"], parts["normalizer"], parts["pre_tokenizer"]
    missing = {_byte(index) for index in range(256)} - model["vocab"].keys()
    if missing:
        raise _unknown(directory, f"has no tokens for {len(missing)} of the 256 bytes")
    if model.get("ignore_merges"):
        raise _unknown(directory, "is a SentencePiece BPE with ignore_merges")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _UNDERSCORE}
    prepend = {"type": "Prepend", "prepend": _UNDERSCORE}
    if normalizer == replace and words == _NO_SPACES:
        words = None
    if words is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return _Kind("llama", "default", add_space=True)
    if words is None and normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
        return _Kind("llama", "default")
    if normalizer is not None or not isinstance(words, dict) or words.get("type") != "Metaspace":
        raise _unknown(directory, f"normalizes text by {_shown(normalizer)} and cuts it by {_shown(words)}")
    if words.get("replacement") != _UNDERSCORE or words.get("split") is not False:
        raise _unknown(directory, f"cuts text into words by {_shown(words)}")
    scheme = words.get("prepend_scheme")
    if scheme not in ("never", "first", "always"):
        raise _unknown(directory, f"cuts text into words by {_shown(words)}")
    if scheme == "never":
        return _Kind("llama", "default")
    where = "before a text that begins with one" + (" and after special tokens" if scheme == "first" else "")
    note = f"llama.cpp puts a space, as before any text, {where} too, which this tokenizer does not"
    return _Kind("llama", "default", add_space=True, notes=(note,))


def _tokens(
    directory: Path, model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and kinds of the embedding's ``size`` rows; rows beyond the tokenizer's get names that no text has.

    Added tokens beyond the embedding, which transformers gives to some tokenizers whatever the model, are left out.
    """
    if not 0 < size <= LARGEST_VOCABULARY:
        raise SwquantError(f"config.json sets vocab_size to {size}, expected at most {LARGEST_VOCABULARY}")
    by_id = {index: text for text, index in model["vocab"].items()}
    beyond = [index for index in by_id if index >= size]
    by_id |= {index: token["content"] for index, token in added.items() if index < size}
    if beyond:
        raise SwquantError(
            f"the tokenizer in {directory} has a token {max(beyond)}, the model's vocabulary has {size}; "
            "check that the tokenizer belongs to this model"
        )
    tokens = tuple(by_id.get(index, f"[PAD{index}]") for index in range(size))
    if len(set(tokens)) < size:
        raise _unknown(directory, "has two tokens of the same text")
    bytes_ = {_byte(index) for index in range(256)} if model.get("byte_fallback") else set[str]()

    def kind(index: int) -> int:
        if index in added and not _is_spaces(added[index]):
            return CONTROL if added[index]["special"] else USER_DEFINED
        if index not in by_id:
            return UNUSED
        return BYTE if by_id[index] in bytes_ else NORMAL

    kinds = [kind(index) for index in range(size)]
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return tokens, tuple(kinds)


def _is_spaces(token: Mapping[str, Any]) -> bool:
    """Whether an added token stands for spaces alone, as some of Gemma's do.

    These are found by merges after all, since text has no such letters before it is normalized. Written as added ones
    llama.cpp would not turn them back into spaces.
    """
    return not token["special"] and set(token["content"]) == {_UNDERSCORE}


def _byte(index: int) -> str:
    return f"<0x{index:02X}>"


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges in order; older files hold them as one string."""
    merges: list[Any] = model["merges"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _scores(
    directory: Path, model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], tokens: Sequence[str]
) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a token.

    llama.cpp merges any two neighbours that make a token, best score first, where ``tokenizer.json`` lists pairs. Both
    are one if all pairs that make a token are listed, next to each other.
    """
    pairs = _pairs(model)
    ranks: dict[str, int] = {}
    previous = ""
    for left, right in pairs:
        made = left + right
        if made != previous and made in ranks:
            raise _unknown(directory, f"makes the token {made!r:.40} in pieces that are not next to each other")
        ranks.setdefault(made, len(ranks))
        previous = made
    listed, vocabulary = set(pairs), model["vocab"]
    extra = {token["content"] for token in added.values() if not _is_spaces(token)}
    for token in vocabulary.keys() - extra:
        if len(token) > LONGEST_TOKEN:
            raise _unknown(directory, f"has a token of {len(token)} letters")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            reachable = all(len(part) == 1 or part in ranks for part in (left, right))
            if reachable and (left, right) not in listed:
                raise _unknown(
                    directory, f"does not make the token {token!r:.40} of its parts {left!r:.40} and {right!r:.40}"
                )
    return tuple(float(-ranks[token]) if token in ranks else -1e6 for token in tokens)


def _affixes(directory: Path, processor: Any) -> tuple[int | None, int | None]:
    """The tokens that are put before a text and after it."""
    if isinstance(processor, dict) and processor.get("type") == "Sequence":
        kept = [part for part in processor["processors"] if part.get("type") != "ByteLevel"]
        processor = kept[0] if len(kept) == 1 else kept or None
    if processor is None or (isinstance(processor, dict) and processor.get("type") == "ByteLevel"):
        return None, None
    if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
        raise _unknown(directory, f"puts special tokens into texts by {_shown(processor)}")
    names = [next(iter(piece.items())) for piece in processor["single"]]
    places = [index for index, (kind, _) in enumerate(names) if kind == "Sequence"]
    if len(places) != 1:
        raise _unknown(directory, f"puts a text {len(places)} times among special tokens")
    before, after = names[: places[0]], names[places[0] + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise _unknown(directory, "puts more than one special token before a text or after it")

    def token(pieces: list[tuple[str, Any]]) -> int | None:
        ids = [processor["special_tokens"][piece["id"]]["ids"] for _, piece in pieces]
        if ids and len(ids[0]) != 1:
            raise _unknown(directory, "puts a special token of several ids into texts")
        return ids[0][0] if ids else None

    return token(before), token(after)


def _special(
    tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any], first: int | None, last: int | None
) -> dict[str, int]:
    """Ids of special tokens: those that the tokenizer puts into texts, those that it names, those of the model."""
    found: dict[str, int] = {}
    for name, used in (("bos", first), ("eos", last), ("unk", None), ("pad", None)):
        named: Any = used
        for source in (_named(tokenizer, name), config.get(f"{name}_token_id")):
            if named is None:
                named = source[0] if isinstance(source, list) and source else source
        if isinstance(named, int) and 0 <= named < int(config["vocab_size"]):
            found[name] = named
    if "bos" not in found and "eos" in found:
        found["bos"] = found["eos"]  # without it llama.cpp assumes a number
    return found


def _ends(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text by ``generation_config.json``, which counts for generating, and by ``config.json``."""
    found: dict[int, None] = {}
    for settings in (generation_settings(directory), config):
        ends = settings.get("eos_token_id")
        found |= dict.fromkeys(end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int)
    return [end for end in found if end >= 0]


def _named(tokenizer: PreTrainedTokenizerFast, name: str) -> int | None:
    """The id that a tokenizer gives to ``bos``, ``eos``, ``unk`` or ``pad``."""
    ids: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return ids[name]


def _shown(part: object) -> str:
    return f"{json.dumps(part, ensure_ascii=False):.200}"


def _unknown(directory: Path, what: str) -> SwquantError:
    return SwquantError(
        f"the tokenizer in {directory} {what}, which llama.cpp has no equal for; gguf takes byte-level BPE with the "
        "words of GPT-2, SmolLM, Llama 3 or Qwen2, and SentencePiece BPE with byte fallback: choose another format"
    )
