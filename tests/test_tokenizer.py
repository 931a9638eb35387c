"""Which tokens a model reads: those of its own ``tokenizer.json``, whatever transformers' classes make of it."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant
from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.calibration import begun, eval_windows, sample_windows
from swquant.corpus import tokenize
from swquant.evaluation import What, measure
from swquant.families import begins_each_window
from swquant.formats.gguf_tokenizer import read_vocabulary
from swquant.tokenizer import PROBE, digest, load_tokenizer, open_reading

MakeModel = Callable[..., Path]
ASSETS = Path(swquant.__file__).parent / "demo_assets"
TEXT = (ASSETS / "evaluation.txt").read_text(encoding="utf-8")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_tokenizer(folder: Path, model_type: str = "llama", **settings: object) -> Path:
    """The demo model's tokenizer and a configuration, without weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(ASSETS / "model" / name, folder / name)
    change(folder / "config.json", model_type=model_type)
    change(folder / "tokenizer_config.json", **settings)
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Qwen2: the same but for biases, which are zero."""
    folder = shutil.copytree(ASSETS / "model", tmp_path_factory.mktemp("qwen2") / "model")
    change(folder / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensors[name].shape[0], dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_qwen2_reads_its_own_tokens(qwen2: Path, tmp_path: Path) -> None:
    reading = open_reading(qwen2)
    tokens = tokenize(reading.tokenizer, TEXT)
    assert len(tokens) == 59_029
    assert tokens.tolist() == Tokenizer.from_file(str(qwen2 / "tokenizer.json")).encode(TEXT).ids
    assert len(AutoTokenizer.from_pretrained(qwen2)(TEXT, verbose=False)["input_ids"]) != 59_029
    (note,) = reading.notes
    assert "transformers' Qwen2Tokenizer makes other tokens of a text than tokenizer.json" in note
    assert read_vocabulary(qwen2, {"vocab_size": 2560}).words == "smollm"
    settings = {"context": 256, "windows": 4, "device": "cpu"}
    right = evaluate(ASSETS / "model", str(ASSETS / "evaluation.txt"), **settings).perplexity
    found = measure(qwen2, What(text=str(ASSETS / "evaluation.txt"), **settings))
    assert found.text is not None
    assert found.text.perplexity == pytest.approx(right)
    assert found.to_mapping()["notes"] == [note]


def test_a_run_says_once_what_transformers_reads_otherwise(qwen2: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", bits=4, calibration=str(ASSETS / "evaluation.txt"), samples=4, seq_len=64)
    report = quantize(recipe.override({"evaluation_samples": 2, "device": "cpu"}), qwen2, tmp_path / "out")
    (note,) = report.reading
    assert note in html.unescape((tmp_path / "out" / "report.html").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (qwen2 / name).read_bytes()
    assert report.key["tokenizer"] == digest(qwen2)


def test_a_text_of_unknown_tokens_is_said_to_be_one(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "model", tmp_path / "model")
    words = Tokenizer(WordLevel({"[UNK]": 0, "the": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save(str(source / "tokenizer.json"))
    settings = {"unk_token": "[UNK]", "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    text = str(ASSETS / "evaluation.txt")
    recipe = Recipe(method="rtn", bits=4, calibration=text, samples=4, seq_len=64)
    report = quantize(recipe.override({"evaluation_samples": 2, "device": "cpu"}), source, tmp_path / "out")
    assert re.search(r"9\d% of the text's tokens are '\[UNK\]'", report.reading[-1])
    found = measure(tmp_path / "out", What(text=text, context=64, windows=2, device="cpu"))
    assert "'[UNK]', which stands for what the tokenizer does not know" in found.to_mapping()["notes"][-1]
    assert open_reading(source).notes_on(torch.tensor([1, 2] * 100 + [0])) == open_reading(source).notes
    assert open_reading(ASSETS / "model").notes_on(torch.zeros(8, dtype=torch.long)) == ()


@pytest.mark.parametrize(
    ("model_type", "cls"),
    [("llama", "GPT2Tokenizer"), ("starcoder2", "GPT2Tokenizer"), ("llama", "LlamaTokenizerFast"),
     ("mistral", "LlamaTokenizer"), ("qwen3", "Qwen2Tokenizer"), ("llama", "TokenizersBackend"), ("phi3", "Nobodys")],
)  # fmt: skip
def test_classes_change_no_tokens(model_type: str, cls: str, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", model_type, tokenizer_class=cls)
    reading = open_reading(folder)
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [reading.tokenizer(text)["input_ids"] for text in PROBE] == [truth.encode(text).ids for text in PROBE]
    auto = AutoTokenizer.from_pretrained(folder)
    assert bool(reading.notes) == (auto(TEXT, verbose=False)["input_ids"] != truth.encode(TEXT).ids)
    assert reading.tokenizer.decode(reading.tokenizer(TEXT[:500])["input_ids"], skip_special_tokens=True) == TEXT[:500]


@pytest.mark.parametrize(
    ("settings", "template", "expected"),
    [
        ({}, "$A", (False, False)),
        ({}, "<s> $A", (True, False)),
        ({"add_bos_token": True}, "$A", (True, False)),
        ({"add_bos_token": False}, "<s> $A </s>", (False, True)),
        ({"add_eos_token": True}, "<s> $A", (True, True)),  # transformers 5 forgets the begin token here
        ({"add_eos_token": False}, "<s> $A </s>", (True, False)),
        ({"add_bos_token": True, "bos_token": None}, "$A", (False, False)),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}}, "$A", (True, False)),
    ],
)
def test_what_stands_before_and_after_a_text(
    settings: dict[str, object], template: str, expected: tuple[bool, bool], tmp_path: Path
) -> None:
    """Settings beside ``tokenizer.json`` are the last word where they are given, as for all readers of both."""
    folder = with_tokenizer(tmp_path / "model", **settings)
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "$A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in template.split()
    ]
    special = {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in enumerate(("<s>", "</s>"))}
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    change(folder / "tokenizer.json", post_processor=processor)
    tokenizer = load_tokenizer(folder)
    bare = tokenizer("some text", add_special_tokens=False)["input_ids"]
    first, last = expected
    assert tokenizer("some text")["input_ids"] == [*([0] if first else []), *bare, *([1] if last else [])]
    found = read_vocabulary(folder, {"vocab_size": 2560})
    assert (found.add_bos, found.add_eos) == expected


def test_added_tokens_that_only_the_settings_list(tmp_path: Path) -> None:
    listed = {"2560": "<tool>", "2561": "<|im_end|>", "9999": "<elsewhere>"}
    rows = {index: {"content": content, "special": True, "normalized": False} for index, content in listed.items()}
    folder = with_tokenizer(tmp_path / "model", added_tokens_decoder=rows)
    reading = open_reading(folder)
    assert reading.tokenizer("a<tool>b<|im_end|>")["input_ids"].count(2560) == 1
    assert reading.tokenizer("<|im_end|>")["input_ids"][-1] == 2561
    assert reading.tokenizer("<elsewhere>", add_special_tokens=False)["input_ids"] == (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("<elsewhere>", add_special_tokens=False).ids
    )
    (note,) = reading.notes  # transformers gives it another id than the settings
    assert "<elsewhere>" in note


def test_lengths_in_the_file_cut_and_fill_nothing(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<s>"}  # fmt: skip
    change(folder / "tokenizer.json", truncation=truncation, padding=padding)
    assert len(tokenize(load_tokenizer(folder), TEXT)) == 59_029
    assert len(tokenize(load_tokenizer(folder), "short")) < 8


def test_without_the_file_transformers_reads_what_there_is(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", tokenizer_class="GPT2Tokenizer")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    reading = open_reading(folder)
    assert reading.notes == ()
    expected = AutoTokenizer.from_pretrained(folder)(TEXT[:3000])["input_ids"]
    assert reading.tokenizer(TEXT[:3000])["input_ids"] == expected
    assert len(expected) > 500


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(SwquantError, match="no tokenizer that loads"):
        load_tokenizer(folder)


def test_settings_that_fail_only_on_a_text_are_refused_before_one_is_read(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    change(folder / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(SwquantError, match="no tokenizer that loads"):
        open_reading(folder)


def test_a_file_that_transformers_does_not_load_is_read_and_it_is_said(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", auto_map={"AutoTokenizer": ["nobody.Tokenizer", None]})
    change(folder / "tokenizer_config.json", tokenizer_class="NobodysTokenizer")
    (folder / "nobody.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    reading = open_reading(folder)
    assert len(tokenize(reading.tokenizer, TEXT)) == 59_029
    assert not (tmp_path / "ran").exists()
    assert all("AutoTokenizer does not load" in note for note in reading.notes)


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    expected = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert load_tokenizer(folder).chat_template == expected
    assert read_vocabulary(folder, {"vocab_size": 2560}).templates == expected


def test_which_models_need_a_token_that_begins_each_window() -> None:
    for kind in ("gemma", "gemma2", "gemma3_text", "gemma3n", "gemma4", "recurrent_gemma"):
        assert begins_each_window({"model_type": kind})
    assert begins_each_window({"model_type": "paired", "text_config": {"model_type": "gemma3_text"}})
    assert not begins_each_window({"model_type": "llama", "text_config": None})


def test_windows_that_begin_with_a_token() -> None:
    tokens = torch.tensor([7, 1, 2, 3, 4, 5, 6, 8, 9])
    assert eval_windows(tokens, 3, None, 7).tolist() == [[7, 1, 2], [7, 3, 4], [7, 6, 8]]
    assert eval_windows(tokens, 3, None).tolist() == [[7, 1, 2], [3, 4, 5], [6, 8, 9]]
    drawn, plain = sample_windows(tokens, 2, 3, 0, 7), sample_windows(tokens, 2, 3, 0)
    assert torch.equal(drawn, begun(plain, 7))
    assert (drawn[:, 0] == 7).all()


def test_a_gemma_is_calibrated_and_measured_on_windows_that_begin(
    make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    folder = make_model("gemma3")
    recipe = Recipe(method="rtn", bits=4, group_size=32, calibration=str(text), evaluation=str(text), samples=2)
    report = quantize(
        recipe.override({"seq_len": 16, "evaluation_samples": 3, "device": "cpu"}), folder, tmp_path / "out"
    )
    assert report.reading == ("each window begins with '<s>', without which models of this kind predict badly",)
    assert report.key["begin_each_window"] is True
    windows = eval_windows(tokenize(load_tokenizer(folder), text.read_text()), 16, 3, 0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        right = float(model(input_ids=windows, labels=windows).loss.exp())
    assert report.quality is not None
    assert report.quality.perplexity_reference == pytest.approx(right, rel=1e-4)
    found = measure(folder, What(text=str(text), context=16, windows=3, device="cpu"))
    assert found.text is not None
    assert found.text.perplexity == pytest.approx(right, rel=1e-4)
    assert found.notes == report.reading
