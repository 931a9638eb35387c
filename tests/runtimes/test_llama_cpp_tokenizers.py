"""Tokenizers of every kind that is written, trained here, against llama.cpp's own implementations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import swquant
from swquant.errors import SwquantError
from swquant.formats.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]
VOCABULARY = 900
TRAINING = (Path(swquant.__file__).parent / "demo_assets" / "calibration.txt").read_text(encoding="utf-8")[:100_000]
VARIED = [
    "Hello, world! The quick brown fox jumps over 13 lazy dogs; it's 1234567 or 3.14159.",
    "It's we've I'LL YOU'RE don't'S 'tis o'clock\n\n\n  indented\n\ttabbed\r\nand so on   ",
    "def f(x: int) -> dict[str, list[int]]:\n    return {'a': [x**2 for _ in range(10)]}  # x² ½ Ⅷ ٣\n",
    "naïve café Ærøskøbing straße ΑΒΓ αβγ Привет мир שלום مرحبا สวัสดี नमस्ते 你好\uff0c世界 こんにちは 한국어",
    "emoji 😀 👩\u200d👩\u200d👧 🇩🇪 zero\u200bwidth nbsp\u00a0here \u3000 ideographic … “quotes” — dash\u2028line",
    "<s>begin</s> <tool>call</tool> <|x|> <0x0A> [INST] </s>",
    "x", "\n", "a  b   c    d", "9" * 20, "....!!!???", "_" * 7, "camelCaseAndSNAKE_case HTTPServer2", "ﬁ ﬂ ǅ ŉ",
]  # fmt: skip
LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)


def byte_level(
    words: str | None, *, digits: bool = False, ignore_merges: bool = False, nfc: bool = False, without: str = ""
) -> Tokenizer:
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if words is not None:
        parts.append(pre_tokenizers.Split(Regex(words), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    bpe.decoder = decoders.ByteLevel()
    if nfc:
        bpe.normalizer = normalizers.NFC()
    alphabet = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in without]
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 9, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TRAINING, *VARIED], trainer)
    return bpe


def sentencepiece(normalizer: Any, words: Any, *, listed: bool = True, first: Sequence[str] = ()) -> Tokenizer:
    """A byte-fallback BPE; ``listed`` with all pairs that make a token in its merges, as SentencePiece's have.

    Tokens of ``first`` are merged before all others.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{index:02X}>" for index in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 9, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    bpe.train_from_iterator(TRAINING.splitlines(), trainer)
    parts = json.loads(bpe.to_str())
    model = parts["model"]
    if listed:
        made = list(dict.fromkeys([*first, *("".join(pair) for pair in model["merges"])]))
        model["vocab"] |= {
            token: len(model["vocab"]) + index
            for index, token in enumerate(token for token in first if token not in model["vocab"])
        }
        known = set(made)
        model["merges"] = [
            (token[:cut], token[cut:])
            for token in made
            for cut in range(1, len(token))
            if all(len(part) == 1 or part in known for part in (token[:cut], token[cut:]))
        ]
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in fallback]
    bpe = Tokenizer.from_str(json.dumps(parts))
    bpe.normalizer, bpe.pre_tokenizer = normalizer, words
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bpe


SPACES = normalizers.Replace(" ", "▁")


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def spaced() -> Tokenizer:
    """As Gemma's: text that has no spaces any more is cut at them, and runs of spaces and newlines are added tokens."""
    runs = ["▁" * count for count in (2, 3, 4)]
    bpe = sentencepiece(SPACES, pre_tokenizers.Split(" ", "merged_with_previous"), first=runs)
    bpe.add_tokens([AddedToken(run, normalized=False) for run in (*runs, "\n\n", "\n\n\n")])
    return bpe


def llama2() -> Tokenizer:
    """As Llama 2's published file: a space put in front of each piece of a text, a begin token in front of the text."""
    bpe = sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return bpe


SMOLLM2_LACKS = "ÀÁñòõö÷øùúûüýþÿĄĆēĔĖĝ"
"""Control characters and bytes that no text has, as the byte-level alphabet writes them."""

KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(None),
    "smollm": lambda: byte_level(None, digits=True),
    "smollm, without some bytes": lambda: byte_level(None, digits=True, without=SMOLLM2_LACKS),
    "llama-bpe": lambda: byte_level(LLAMA3, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(QWEN2, nfc=True),
    "llama, prepended": lambda: sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),
    "llama, replaced": lambda: sentencepiece(SPACES, None),
    "llama, of a class that transformers builds otherwise": llama2,
    "llama, first": lambda: sentencepiece(None, metaspace("first")),
    "llama, never": lambda: sentencepiece(None, metaspace("never")),
    "llama, spaced": spaced,
}


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings)
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def trained(make_model: MakeModel) -> Callable[[str], tuple[Path, Any]]:
    """A function from a kind's name to a model directory with such a tokenizer, and the tokenizer."""

    def make(kind: str) -> tuple[Path, Any]:
        folder = make_model("llama", 1, torch.float32, fresh=True, vocab_size=VOCABULARY)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        tokenizer = save(KNOWN[kind](), folder)
        if "of a class" in kind:
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
            tokenizer = load_tokenizer(folder)
            assert tokenizer.tokenize(" x") != AutoTokenizer.from_pretrained(folder).tokenize(" x")
        return folder, tokenizer

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_llama_cpp_cuts_a_varied_text_into_the_same_tokens(
    kind: str, trained: Callable[[str], tuple[Path, Any]], write_plain: Callable[[Path], Path], llama_cpp: Any
) -> None:
    folder, tokenizer = trained(kind)
    texts = [
        *VARIED,
        TRAINING[:5000],
        " ".join(VARIED[:4]),
        " begins with a space",
        "   with three",
        "</s> after <s>one",
    ]
    if "first" in kind:  # what the note is about
        texts = [text for text in texts if not text.startswith(("<", " "))]
        texts = [text for text in texts if "<s>" not in text and "</s>" not in text]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert llama_cpp.tokens(write_plain(folder), texts) == expected
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [truth.encode(text, add_special_tokens=False).ids for text in texts] == expected
    assert len({token for tokens in expected for token in tokens}) > 250


def test_the_varied_text_tells_ways_to_cut_words_apart() -> None:
    tokenizer = byte_level(LLAMA3)
    ways = [byte_level(words, digits=digits).pre_tokenizer for words, digits in ((None, False), (None, True))]
    ways += [tokenizer.pre_tokenizer, byte_level(QWEN2).pre_tokenizer]
    seen: list[list[int]] = []
    for way in ways:
        tokenizer.pre_tokenizer = way
        seen.append([token for text in VARIED for token in tokenizer.encode(text).ids])
    assert all(a != b for index, a in enumerate(seen) for b in seen[:index])


def vocabulary_of(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    save(tokenizer, folder, **settings)
    return read_vocabulary(folder, {"vocab_size": VOCABULARY})


def test_tokens_kinds_and_special_ids(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = vocabulary_of(tmp_path / "gpt2", tokenizer, chat_template="{{ messages }}")
    assert (found.model, found.words, found.add_bos, found.add_eos) == ("gpt2", "gpt-2", True, True)
    assert found.templates == {"default": "{{ messages }}"}
    assert found.special == {"bos": 0, "eos": 1}
    assert len(found.tokens) == len(found.kinds) == VOCABULARY
    assert found.kinds[:3] == (CONTROL, CONTROL, NORMAL)
    assert found.kinds[found.tokens.index("<tool>")] == USER_DEFINED
    assert (found.tokens[-1], found.kinds[-1]) == (f"[PAD{VOCABULARY - 1}]", UNUSED)
    pieces = vocabulary_of(tmp_path / "spm", KNOWN["llama, first"](), unk_token="<unk>")
    assert (pieces.model, pieces.add_space, pieces.add_bos, pieces.merges) == ("llama", True, False, ())
    assert pieces.kinds[:4] == (UNKNOWN, CONTROL, CONTROL, BYTE)
    assert pieces.special == {"bos": 1, "eos": 2, "unk": 0}
    assert len(pieces.scores) == VOCABULARY
    assert "begins with one and after special tokens" in pieces.notes[0]
    assert "NFC" in vocabulary_of(tmp_path / "qwen", KNOWN["qwen2"]()).notes[0]


def test_every_token_that_ends_a_text_is_told(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#9606: of several, the first alone was in the file, and models went on after the others."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7, 9]}')
    found = vocabulary_of(tmp_path, byte_level(None))
    assert found.special == {"bos": 0, "eos": 1, "eot": 7, "eom": 9}
    assert found.notes == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9, 11]}')
    found = vocabulary_of(tmp_path, byte_level(None))
    assert (found.special["eot"], found.special["eom"]) == (7, 9)
    assert "not told that the tokens [11] end a text" in found.notes[0]


def test_what_cannot_be_encoded_is_noted(tmp_path: Path) -> None:
    (note,) = vocabulary_of(tmp_path / "few", KNOWN["smollm, without some bytes"]()).notes
    assert "no tokens for 21 of the 256 bytes" in note
    assert vocabulary_of(tmp_path / "all", KNOWN["smollm"]()).notes == ()


def test_runs_of_spaces_are_pieces_though_they_are_added(tmp_path: Path) -> None:
    found = vocabulary_of(tmp_path, spaced())
    kinds = {token: found.kinds[found.tokens.index(token)] for token in ("▁▁", "▁▁▁▁", "\n\n", "<tool>")}
    assert kinds == {"▁▁": NORMAL, "▁▁▁▁": NORMAL, "\n\n": USER_DEFINED, "<tool>": USER_DEFINED}
    assert (found.add_space, found.notes) == (False, ())
    assert found.scores[found.tokens.index("▁▁")] == 0


@pytest.mark.parametrize("kind", KNOWN)
def test_every_kind_is_recognised(kind: str, tmp_path: Path) -> None:
    found = vocabulary_of(tmp_path, KNOWN[kind]())
    assert kind.startswith("llama," if found.model == "llama" else found.words)
    assert found.add_space == ("prepended" in kind or "first" in kind or "of a class" in kind)


def lowered() -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def stripped() -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def spaced_otherwise() -> Tokenizer:
    tokenizer = sentencepiece(SPACES, None)
    tokenizer.add_tokens([AddedToken("▁▁", normalized=True)])
    return tokenizer


def doubled() -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def twice() -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A $A")
    return tokenizer


UNKNOWNS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "unigram": (lambda: Tokenizer(models.Unigram([("a", 0.0)], None, False)), "is a Unigram model"),
    "words": (lambda: byte_level(r"\s+"), "cuts text into words by"),
    "ignored merges": (lambda: byte_level(QWEN2, ignore_merges=True), "as qwen2 with another ignore_merges"),
    "lower case": (lowered, "normalizes text by"),
    "stripped": (stripped, "sets lstrip for the token '<mask>'"),
    "spaces": (spaced_otherwise, "sets normalized for the token '▁▁'"),
    "two in front": (doubled, "more than one special token"),
    "text twice": (twice, "puts a text 2 times among special tokens"),
    "no end": (lambda: byte_level(None), "names no token that ends a text"),
    "other merges": (lambda: sentencepiece(None, metaspace("first"), listed=False), "does not make the token"),
    "split pieces": (
        lambda: sentencepiece(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)),
        "cuts text into words by",
    ),
    "few bytes": (lambda: Tokenizer(models.BPE({"a": 0}, [])), "cuts text into words by null"),
}


@pytest.mark.parametrize("name", UNKNOWNS)
def test_an_unknown_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    make, message = UNKNOWNS[name]
    tokenizer = make()
    tmp_path.joinpath("tokenizer.json").write_text(tokenizer.to_str())
    tmp_path.joinpath("tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tmp_path.joinpath("config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SwquantError, match=message) as caught:
        read_vocabulary(tmp_path, {"vocab_size": VOCABULARY})
    assert "choose another format" in str(caught.value)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="no tokenizer that loads"):
        read_vocabulary(tmp_path, {"vocab_size": VOCABULARY})
    save(byte_level(None), tmp_path)
    with pytest.raises(SwquantError, match="the model's vocabulary has 100"):
        read_vocabulary(tmp_path, {"vocab_size": 100})
    with pytest.raises(SwquantError, match="expected at most 16777216"):
        read_vocabulary(tmp_path, {"vocab_size": 10**12})
