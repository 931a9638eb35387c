"""What is refused is refused before the work, and what has been trained is written in any format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swquant import Recipe, SwquantError, quantize
from swquant.convert import convert
from swquant.formats import read_quantized
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.formats.gguf import Gguf
from swquant.quant.qtensor import QTensor

MakeModel = Callable[..., Path]
STRAY = {"model.rotary_emb.inv_freq": (8,), "v_head.summary.weight": (1, 64), "model.mtp.0.proj.weight": (2, 64, 64)}


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4,
        group_size=32,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=16,
        evaluation_samples=2,
        device="cpu",
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that are trained from now on."""
    from swquant import run

    blocks: list[int] = []
    whole = run.quantize_block

    def counted(job: Any, run_state: Any, *others: Any) -> Any:
        blocks.append(run_state.done)
        return whole(job, run_state, *others)

    monkeypatch.setattr(run, "quantize_block", counted)
    return blocks


def codes(directory: Path) -> dict[str, QTensor]:
    _, model = read_quantized(directory)
    return {name: value for part in model.parts() for name, value in part.items() if isinstance(value, QTensor)}


def require_equal(one: dict[str, QTensor], other: dict[str, QTensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 0
    for name, value in one.items():
        assert all(torch.equal(part, other[name].parts[key]) for key, part in value.parts.items())
        assert torch.equal(value.codes, other[name].codes)


@pytest.fixture
def stray(make_model: MakeModel) -> Path:
    """A model whose file holds tensors that no module of it reads."""
    source = make_model("llama", 2, fresh=True)
    tensors = load_file(source / "model.safetensors")
    extra = {name: torch.ones(shape) for name, shape in STRAY.items()}
    save_file({**tensors, **extra, "steps": torch.ones(1, dtype=torch.int64)}, source / "model.safetensors")
    return source


@pytest.mark.parametrize(
    "form", ["compressed_tensors", "gptq", "auto_round", "mlx", "gguf", "onnx", "dequantized", "for llama.cpp"]
)
def test_what_no_module_reads_is_copied_where_there_is_a_place_for_it(
    stray: Path, recipe: Recipe, form: str, tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnx"}.get(form, "gguf"))
    wanted = {"runtime": form.removeprefix("for ")} if form.startswith("for ") else {"format": form}
    report = quantize(replace(recipe, **wanted), stray, tmp_path / "out")
    notes = [note for note in report.outputs[0].notes if "no module" in note]
    written = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    if form in ("mlx", "gguf", "onnx", "for llama.cpp"):
        assert len(notes) == 1
        assert all(name in notes[0] for name in (*STRAY, "steps"))
        assert not written.keys() & {*STRAY, "steps"}
    else:
        assert not notes
        assert written["steps"].dtype == torch.int64
        assert all(tuple(written[name].shape) == shape for name, shape in STRAY.items())
    assert report.outputs[0].verification["weights"] == (0 if form == "dequantized" else 14)


def test_convert_leaves_them_out_too(stray: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Another program may have kept them."""
    pytest.importorskip("gguf")
    quantize(recipe, stray, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file({**load_file(file), "v_head.summary.weight": torch.ones(1, 64)}, file)
    (output,) = convert(tmp_path / "out", tmp_path / "gguf", format="gguf")
    assert "v_head.summary.weight" in output.notes[0]
    require_equal(codes(tmp_path / "gguf"), codes(tmp_path / "out"))


@pytest.mark.parametrize("other", [{"format": "mlx"}, {"runtime": "llama.cpp"}, {"format": "gptq,compressed_tensors"}])
def test_a_run_whose_first_format_fails_is_finished_in_another(
    make_model: MakeModel,
    recipe: Recipe,
    other: dict[str, str],
    trained: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")
    source = make_model("llama", 2)

    def fails(*_: object) -> None:
        raise SwquantError("proj.weight_scale holds 7e4")

    with monkeypatch.context() as patch:
        patch.setattr(CompressedTensors, "write", fails)
        for _ in range(2):
            with pytest.raises(SwquantError, match=r"holds 7e4. The trained blocks stay in .*another --format"):
                quantize(recipe, source, tmp_path / "out")
    assert trained == [0, 1]
    report = quantize(replace(recipe, **other), source, tmp_path / "out")
    assert trained == [0, 1]
    assert report.recipe["runtime"] == other.get("runtime")
    whole = quantize(recipe, source, tmp_path / "whole")
    assert whole.quality == report.quality
    directory = tmp_path / "out" / report.outputs[0].directory
    require_equal(codes(directory), codes(tmp_path / "whole"))
    assert not (tmp_path / "out.swquant-work").exists()


def test_a_run_stopped_before_it_has_written_is_finished_in_another_format(
    make_model: MakeModel, recipe: Recipe, trained: list[int], tmp_path: Path
) -> None:
    class Stop:
        begin = step = block = staticmethod(lambda *_: None)

        def stage(self, text: str) -> None:
            if text.startswith("Writing"):
                raise KeyboardInterrupt

    source = make_model("llama", 2)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, source, tmp_path / "out", observer=Stop())  # type: ignore[arg-type]
    quantize(replace(recipe, format="mlx"), source, tmp_path / "out")
    assert trained == [0, 1]


def test_a_finished_output_in_another_format_says_how_to_write_it_anew(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 2)
    quantize(recipe, source, tmp_path / "out")
    with pytest.raises(SwquantError, match=r"written as compressed_tensors;.*swquant convert .*/out --out NEW .*mlx"):
        quantize(replace(recipe, format="mlx"), source, tmp_path / "out")
    with pytest.raises(SwquantError, match=r"--for mlx"):
        quantize(replace(recipe, runtime="mlx"), source, tmp_path / "out")
    quantize(replace(recipe, format="dequantized"), source, tmp_path / "plain")
    with pytest.raises(SwquantError, match=r"written as dequantized; choose another --out$"):
        quantize(replace(recipe, format="mlx"), source, tmp_path / "plain")


def test_a_disk_too_small_for_the_other_format_is_noticed_before_it_is_written(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", 2)
    with monkeypatch.context() as patch:
        patch.setattr(CompressedTensors, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(recipe, source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(SwquantError, match="GB are available"):
            quantize(replace(recipe, format="dequantized"), source, tmp_path / "out")
    quantize(replace(recipe, format="dequantized"), source, tmp_path / "out")


def test_a_loss_that_samples_of_this_length_do_not_suit_is_refused_before_they_are_drawn(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.run._samples", lambda *_: 1 / 0)
    recipe = replace(recipe, method="omniquant", loss="sliced_wasserstein(block=3)")
    with pytest.raises(SwquantError, match=r"block 3 .* must divide the 16 tokens"):
        quantize(recipe, make_model("llama", 2), tmp_path / "out")


@pytest.mark.parametrize("old", [True, False])
def test_gguf_is_refused_before_the_work_where_the_package_would_fail(
    make_model: MakeModel,
    recipe: Recipe,
    trained: list[int],
    old: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package older than the architecture; a chat template that is no text, as JSON may hold it."""
    gguf: Any = pytest.importorskip("gguf")
    source = make_model("llama", 2, fresh=True)
    if old:
        names = {arch: name for arch, name in gguf.MODEL_ARCH_NAMES.items() if name != "llama"}
        monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", names)
    else:
        path = source / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "\ud800"}))
    with pytest.raises(SwquantError, match="pip install -U gguf" if old else "does not write this model's metadata"):
        quantize(replace(recipe, format="gguf"), source, tmp_path / "out")
    assert not trained


def test_software_that_fails_on_the_output_or_does_not_start_loses_nothing(
    make_model: MakeModel, recipe: Recipe, trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    source, error = make_model("llama", 2), ValueError("no such\nmodel")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("swquant.verification.gguf.Gguf.weight", fails)
    with pytest.raises(SwquantError, match=r"gguf .* does not open the gguf output \(no such model\).*trained blocks"):
        quantize(replace(recipe, format="gguf"), source, tmp_path / "out")
    error = ImportError("no backend")
    report = quantize(replace(recipe, format="gguf"), source, tmp_path / "out")
    assert report.outputs[0].verification["reader"] is None
    assert trained == [0, 1]
    assert Gguf().read(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())) is not None
