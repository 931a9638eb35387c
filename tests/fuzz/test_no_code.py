"""No code of a model's runs, no file outside of it is read or copied, nothing is written beside the output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from swquant import Recipe, SwquantError, quantize
from swquant.inspection import inspect
from swquant.places import REPORT

MARKER = "ran.txt"


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=2, device="cpu"
    )


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("calibration", ["text", "self"])
def test_code_beside_the_weights_is_neither_run_nor_copied(
    model: Path, recipe: Recipe, tmp_path: Path, calibration: str
) -> None:
    code = f"open({str(tmp_path / MARKER)!r}, 'w').write('x')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py", "torch.py"):
        (model / name).write_text(code)
    change(
        model / "config.json",
        auto_map={"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    )
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Tokenizer", None]})
    change(model / "generation_config.json", custom_generate="modeling_evil")
    (model / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"
    )
    asked = {"calibration": "self"} if calibration == "self" else {}
    quantize(recipe.override(asked), model, tmp_path / "out")
    assert not (tmp_path / MARKER).exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text().startswith("{{ ''")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for tag in ("!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"):
        path.write_text(f"method: {tag} ['touch {tmp_path / MARKER}']\n")
        with pytest.raises(SwquantError, match="not valid YAML"):
            Recipe.load(path)
    assert not (tmp_path / MARKER).exists()


def test_yaml_that_unfolds_to_gigabytes_is_small(tmp_path: Path) -> None:
    """Aliases of aliases are one object many times over; nothing walks through all of them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines) + "\nmethod: *a11\n")
    with pytest.raises(SwquantError) as caught:
        Recipe.load(path)
    assert len(str(caught.value)) < 3000


@pytest.mark.skipif(os.name == "nt", reason="links are rare there")
@pytest.mark.parametrize("name", ["tokenizer_extra.json", "LICENSE", "chat_template.jinja"])
def test_links_out_of_a_model_are_refused_before_the_work(
    model: Path, recipe: Recipe, tmp_path: Path, name: str
) -> None:
    (tmp_path / "private.txt").write_text("secret")
    (model / name).symlink_to(tmp_path / "private.txt")
    with pytest.raises(SwquantError, match=r"is a link to .*private\.txt, outside the model"):
        quantize(recipe, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.swquant-work").exists()


def test_a_report_that_is_a_link_is_not_published(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    from swquant.convert import convert

    quantize(recipe, model, tmp_path / "out")
    shutil.move(tmp_path / "out" / REPORT, tmp_path / REPORT)
    (tmp_path / "out" / REPORT).symlink_to(tmp_path / REPORT)
    with pytest.raises(SwquantError, match="is a link to"):
        convert(tmp_path / "out", tmp_path / "mlx", format="mlx")
    assert not (tmp_path / "mlx").exists()
    assert inspect(tmp_path / "out").format == "compressed_tensors"
