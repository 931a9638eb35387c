"""What a user can get wrong: one sentence that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from swquant.cli import main
from swquant.engine.run_state import lock_directory

MakeModel = Callable[..., Path]
Damage = Callable[[Path], None]

SHARD, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A sound model of one's own to damage."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def flags(text: Path) -> list[str]:
    """A run of a second, if nothing were wrong."""
    return [
        *("--calibration", str(text), "--samples", "4", "--seq-len", "32", "--evaluation-samples", "2"),
        *("--method", "rtn", "--group-size", "32", "--device", "cpu"),
    ]


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def calibrated(flags: list[str], text: object) -> list[object]:
    """``flags`` with another calibration."""
    at = flags.index("--calibration") + 1
    return [*flags[:at], text, *flags[at + 1 :]]


def refused(capsys: pytest.CaptureFixture[str], place: Path, *arguments: str | Path, stages: bool = False) -> str:
    """The sentence that a command is refused with; ``stages`` allows lines of progress before it."""
    capsys.readouterr()
    before = tree(place)
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    printed, error = capsys.readouterr()
    lines = error.strip().splitlines()
    assert exit.value.code == 2, error
    assert printed == ""
    assert lines[-1].startswith("swquant: ")
    assert stages or len(lines) == 1, error
    assert lines[-1].isprintable()
    assert "Traceback" not in error
    assert tree(place) == before
    return lines[-1]


def write_config(model: Path, **values: Any) -> None:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(config | values))


def truncated(model: Path) -> None:
    os.truncate(model / SHARD, (model / SHARD).stat().st_size // 2)


def scrambled(model: Path) -> None:
    content = bytearray((model / SHARD).read_bytes())
    content[8:40] = os.urandom(32)
    (model / SHARD).write_bytes(content)


def empty(model: Path) -> None:
    (model / SHARD).write_bytes(b"")


def a_pickle_in_disguise(model: Path) -> None:
    torch.save({"w": torch.ones(2)}, model / SHARD)


def pickled(model: Path) -> None:
    torch.save(load_file(model / SHARD), model / "pytorch_model.bin")
    (model / SHARD).unlink()


def without_weights(model: Path) -> None:
    (model / SHARD).unlink()


def a_shard_short(model: Path) -> None:
    (model / SHARD).rename(model / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def a_tensor_short(model: Path) -> None:
    weights = load_file(model / SHARD)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / SHARD)


def a_pointer(model: Path) -> None:
    (model / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")


def an_index_of_another(model: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    weights = load_file(model / SHARD)
    weight_map = dict.fromkeys(weights, shard)
    del weights["model.norm.weight"]
    save_file(weights, model / shard)
    (model / SHARD).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def without_config(model: Path) -> None:
    (model / CONFIG).unlink()


def config_is_no_json(model: Path) -> None:
    (model / CONFIG).write_text("{")


def without_type(model: Path) -> None:
    config = json.loads((model / CONFIG).read_text())
    del config["model_type"]
    (model / CONFIG).write_text(json.dumps(config))


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def config_with(**values: Any) -> Damage:
    return lambda model: write_config(model, **values)


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated shard": (truncated, (SHARD, "damaged", "download it again")),
    "scrambled header": (scrambled, (SHARD, "damaged", "download it again")),
    "empty shard": (empty, (SHARD, "damaged", "download it again")),
    "pickle named safetensors": (a_pickle_in_disguise, (SHARD, "not a safetensors file")),
    "pickled weights": (
        pickled,
        ("only pickled weights ('pytorch_model.bin')", "convert", "save_pretrained", "safe_serialization=True"),
    ),
    "no weights": (without_weights, ("holds no weights", "expected model.safetensors")),
    "missing shard": (a_shard_short, ("'model-00002-of-00002.safetensors', which is missing", "download")),
    "pointer": (a_pointer, (SHARD, "is a pointer of Git LFS", "git lfs pull")),
    "index of another model": (an_index_of_another, ("lacks 'model.norm.weight', which", "they are not of one model")),
    "missing tensor": (a_tensor_short, ("no tensor 'model.layers.1.mlp.up_proj.weight'",)),
    "no config": (without_config, ("no config.json", "save_pretrained")),
    "config that is no JSON": (config_is_no_json, ("not valid JSON", "download it again")),
    "no tokenizer": (without_tokenizer, ("no tokenizer that loads",)),
    "unknown kind of model": (
        config_with(model_type="lama"),
        ("model_type 'lama' is none that transformers", transformers.__version__, "a newer release may"),
    ),
    "a head of two billion": (
        config_with(head_dim=2**31),
        ("asks for 8.6 GB of computed buffers, such as model.rotary_emb.inv_freq", "compare head_dim"),
    ),
    "a kind of a newer release": (
        config_with(model_type="llama9", architectures=["Llama9ForCausalLM"]),
        ("model_type 'llama9' is none that transformers", transformers.__version__),
    ),
    "no kind": (without_type, ("config.json has no model_type",)),
    "a kind that predicts no text": (
        config_with(model_type="vit", architectures=["ViTForImageClassification"]),
        ("no class that predicts text for model_type 'vit'",),
    ),
    "classifier": (
        config_with(architectures=["LlamaForSequenceClassification"]),
        ("'LlamaForSequenceClassification', which does not predict text",),
    ),
    "quantized already": (
        config_with(quantization_config={"quant_method": "gptq"}),
        ("already quantized, by 'gptq'", "give the original"),
    ),
    "setting of the wrong type": (config_with(hidden_size="64"), ("does not describe a model", "hidden_size")),
    "heads that do not divide": (config_with(num_attention_heads=0), ("does not describe a model",)),
    "no layers": (config_with(num_hidden_layers=0), ("num_hidden_layers is 0",)),
    "more layers than memory": (config_with(num_hidden_layers=10**12), ("num_hidden_layers is 1000000000000",)),
    "other widths": (config_with(intermediate_size=96), ("has the shape [128, 64]", "calls for [96, 64]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model(
    capsys: pytest.CaptureFixture[str], model: Path, flags: list[str], tmp_path: Path, damage: str
) -> None:
    harm, parts = DAMAGES[damage]
    harm(model)
    said = refused(
        capsys, tmp_path, "quantize", model, "--out", tmp_path / "out", *flags, stages=damage == "no tokenizer"
    )
    assert all(part in said for part in parts), said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_attention_heads": -1}, "does not describe a model that runs"),
        ({"dropout": 3}, "does not describe a model that runs"),
    ],
)
def test_settings_that_only_running_finds_wrong(
    capsys: pytest.CaptureFixture[str],
    make_model: Callable[..., Path],
    flags: list[str],
    tmp_path: Path,
    settings: dict[str, Any],
    part: str,
) -> None:
    source = make_model("opt", 1, fresh=True)
    write_config(source, **settings)
    stages = "runs" in part
    assert part in refused(capsys, tmp_path, "quantize", source, "--out", tmp_path / "out", *flags, stages=stages)


@pytest.mark.parametrize("damage", [truncated, pickled, without_config, without_tokenizer, config_is_no_json])
def test_measuring_a_damaged_model(
    capsys: pytest.CaptureFixture[str], model: Path, text: Path, tmp_path: Path, damage: Damage
) -> None:
    damage(model)
    refused(capsys, tmp_path, "eval", model, "--text", text, stages=True)


@pytest.mark.parametrize(
    ("source", "part"),
    [("./nowhere", "no such directory"), ("nowhere/", "no such directory"), ("wiki.txt", "is a file")],
)
def test_a_source_that_is_no_model(
    capsys: pytest.CaptureFixture[str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    part: str,
) -> None:
    shutil.copy(text, tmp_path / "wiki.txt")
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, tmp_path, "quantize", source, "--out", "out", "--method", "rtn")


WORDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "flag": (["--sample", "3"], ("--sample", "Did you mean", "--samples")),
    "preset": (["--preset", "fastest"], ("'fastest'", "'fast', 'default', 'best'")),
    "number": (["--bits", "two"], ("--bits", "'two'")),
    "bits below": (["--bits", "1"], ("bits is 1, expected one of 2, 3, 4, 8",)),
    "negative group": (["--group-size", "-64"], ("group size is -64, expected 32, 64, 128, or 'channel'",)),
    "width": (["--group-size", "128"], ("q_proj has 64 inputs", "does not divide", "fit: 32, 64, channel")),
    "sequence": (["--seq-len", "1"], ("seq_len is 1", "greater than or equal to 2")),
    "loss without end": (["--loss", "mse" + " + mse" * 5000], ("loss",)),
    "option in YAML": (["--option", "epochs=["], ("--option 'epochs=['", "not valid YAML")),
    "option without bottom": (["--option", "epochs=" + "[" * 5000], ("--option", "not valid YAML")),
    "dataset": (["--calibration", "no-such-data"], ("no-such-data",)),
}


@pytest.mark.parametrize("mistake", WORDS)
def test_words_and_numbers(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path, mistake: str) -> None:
    arguments, parts = WORDS[mistake]
    said = refused(capsys, tmp_path, "quantize", llama, "--out", tmp_path / "out", "--method", "rtn", *arguments)
    assert all(part in said for part in parts), said


RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "key": ("bit: 2", ("no key 'bit'", "did you mean 'bits'")),
    "far key": ("zzz: 2", ("no key 'zzz'", "known: allow_split, bits, calibration, ")),
    "a key that was": ("balance: gradient", ("no key 'balance'", "known: allow_split, bits, ")),
    "type": ("bits: '2'", ("bits is '2'", "integer")),
    "range": ("samples: 0", ("samples is 0",)),
    "list": ("- bits", ("no mapping",)),
    "nothing": ("", ("no mapping",)),
    "YAML": ("bits: [", ("not valid YAML",)),
    "code": ("bits: !!python/object/apply:os.system ['true']", ("not valid YAML",)),
    "bytes": ("\x00", ("not valid YAML",)),
}


@pytest.mark.parametrize("mistake", RECIPES)
def test_a_recipe_file(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path, mistake: str) -> None:
    content, parts = RECIPES[mistake]
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    said = refused(capsys, tmp_path, "quantize", llama, "--out", tmp_path / "out", "--recipe", path)
    assert all(part in said for part in (str(path) if "YAML" in said else "", *parts)), said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quantise", "model"], ("quantise", "quantize")),
        (["quantize"], ("SOURCE",)),
        (["quantize", "model"], ("--out",)),
        (["list", "method"], ("did you mean 'methods'",)),
        (["eval", "model"], ("--text",)),
    ],
)
def test_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], parts: tuple[str, ...]
) -> None:
    said = refused(capsys, tmp_path, *arguments)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("content", "name", "part"),
    [
        (b"", "wiki.txt", "too short: 4 samples of 32 tokens need at least 32 tokens, 0 are left"),
        (b"one two three", "wiki.txt", "too short: 4 samples of 32 tokens need at least 32 tokens"),
        (b"\xff\xfe\x00", "wiki.txt", "cannot be read as UTF-8: invalid start byte at byte 0"),
        (b'{"txt": "x"}\n', "wiki.jsonl", "and no chat in 'messages' or 'conversations' (it has txt)"),
    ],
)
def test_a_calibration_text(
    capsys: pytest.CaptureFixture[str],
    llama: Path,
    flags: list[str],
    tmp_path: Path,
    content: bytes,
    name: str,
    part: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    command = ["quantize", llama, "--out", tmp_path / "out", *calibrated(flags, tmp_path / name)]
    assert part in refused(capsys, tmp_path, *command, stages=True)


def test_an_evaluation_text_that_is_too_short(
    capsys: pytest.CaptureFixture[str], llama: Path, flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    command = ["quantize", llama, "--out", tmp_path / "out", *flags, "--evaluation", tmp_path / "short.txt"]
    assert "a window needs 32 tokens, it has" in refused(capsys, tmp_path, *command, stages=True)


def test_an_output_directory_in_use(
    capsys: pytest.CaptureFixture[str], llama: Path, flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "foreign.swquant-work").mkdir()
    (tmp_path / "foreign.swquant-work" / "thesis.tex").write_text("precious")
    expected = {
        "full": "is in use: it holds 'thesis.tex'; choose another --out",
        "file": "is in use: it is a file; choose another --out",
        "file/below": "file is a file; choose another --out",
        "foreign": "holds 'thesis.tex'; move it or choose another --out",
    }
    for out, part in expected.items():
        assert part in refused(capsys, tmp_path, "quantize", llama, "--out", tmp_path / out, *flags, stages=True)
        (tmp_path / "foreign.swquant-work" / "lock").unlink(missing_ok=True)


def test_an_output_that_another_run_is_writing(
    capsys: pytest.CaptureFixture[str], llama: Path, flags: list[str], tmp_path: Path
) -> None:
    command = ["quantize", llama, "--out", tmp_path / "out", *flags]
    with lock_directory(tmp_path / "out.swquant-work"):
        said = refused(capsys, tmp_path, *command, stages=True)
    assert "another process is writing to" in said
    assert "choose another --out" in said


def test_a_full_disk(
    capsys: pytest.CaptureFixture[str],
    llama: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = refused(capsys, tmp_path, "quantize", llama, "--out", tmp_path / "out", *flags, stages=True)
    assert "GB of disk and 0.00 GB are available; free some space or choose another --out" in said


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_bad_weights_are_found_before_samples_are_drawn(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
) -> None:
    weights = load_file(model / SHARD)
    weights[name][-1, -1] = value
    save_file(weights, model / SHARD, metadata={"format": "pt"})
    monkeypatch.setattr("swquant.run._samples", lambda *_: pytest.fail("samples were drawn"))
    command = ["quantize", model, "--out", tmp_path / "out", *calibrated(flags, "self")]
    said = refused(capsys, tmp_path, *command, stages=True)
    assert f"{name!r} in {model / SHARD} holds NaN or infinite values; download" in said


def test_weights_are_looked_at_once_for_a_run_however_often_it_stops(
    llama: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr("swquant.checkpoint.reader.Checkpoint.require_finite", lambda *_: looked.append(1))
    command = ["quantize", str(llama), "--out", str(tmp_path / "out"), *flags]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("swquant.run.quantize_block", stop)
        for _ in range(2):
            with pytest.raises(SystemExit):
                main(command)
    main(command)
    assert (tmp_path / "out" / "report.json").exists()
    assert looked == [1]


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(llama: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "swquant",
        "quantize",
        str(llama),
        "--out",
        "out",
        "--method",
        "rtn",
        "--bits",
        "5",
    ]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == "swquant: bits is 5, expected one of 2, 3, 4, 8\n"
    assert list(tmp_path.iterdir()) == []
