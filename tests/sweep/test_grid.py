"""From a file to combinations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swquant import Recipe, SwquantError
from swquant.sweep.grid import read_grid
from swquant.sweep.trial import Identities

Grid = Callable[..., Path]


def test_every_combination_once_in_the_order_of_the_file(grid: Grid) -> None:
    losses = [None, "0.9*mse + 0.1*sliced_wasserstein"]
    cells = read_grid(grid(method=["omniquant", "block_ap(epochs=1)"], loss=losses, bits=[2, 3], seed=[0, 1]))
    found = [(cell.recipe.method, cell.recipe.loss, cell.recipe.bits, cell.recipe.seed) for cell in cells]
    assert found == list(itertools.product(["omniquant", "block_ap(epochs=1)"], losses, [2, 3], [0, 1]))
    assert {cell.recipe.group_size for cell in cells} == {32}


def test_cases_vary_together(grid: Grid) -> None:
    path = grid(cases=[{"bits": 2, "symmetric": [True, False]}, {"bits": 3, "seed": 7}])
    found = [(cell.recipe.bits, cell.recipe.symmetric, cell.recipe.seed) for cell in read_grid(path)]
    assert found == [(2, True, 0), (2, False, 0), (3, True, 7)]


def test_a_recipe_is_the_base_and_keys_override_it(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(Recipe(bits=3, symmetric=False, seed=5).to_yaml())
    cells = read_grid(grid(recipe=["mine.yaml", "w2g64"], seed=9))
    assert [(cell.recipe.bits, cell.recipe.symmetric, cell.recipe.seed) for cell in cells] == [
        (3, False, 9),
        (2, Recipe.load("w2g64").symmetric, 9),
    ]


def test_without_a_method_the_usual_recipe_is_taken(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("model: m\nbits: [2, 3]\n")
    cells = read_grid(tmp_path / "grid.yaml")
    usual = [Recipe.recommended({"bits": bits})[1] for bits in (2, 3)]
    # No trial chooses for itself what it is calibrated on.
    assert [cell.recipe for cell in cells] == [replace(recipe, calibration="self") for recipe in usual]


def test_paths_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "model").symlink_to(llama)
    (place / "wiki.txt").write_text("words")
    (place / "grid.yaml").write_text("model: [./model, hub/name]\nmethod: rtn\ncalibration: wiki.txt\n")
    cells = read_grid(Path("elsewhere/grid.yaml"))
    assert [cell.source for cell in cells] == [str(llama.resolve()), "hub/name"]
    assert [cell.model for cell in cells] == ["./model", "hub/name"]
    assert {cell.recipe.calibration for cell in cells} == {str(place / "wiki.txt")}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"losses": ["mse"]}, "no key 'losses'; did you mean 'loss'"),
        ({"cases": [{"bit": 2}]}, "no key 'bit'; did you mean 'bits'"),
        ({"cases": [{"cases": []}]}, "a case of .* has no key 'cases'"),
        ({"cases": {"bits": 2}}, "expected a list of mappings"),
        ({"cases": [{"method": "rtn"}]}, "'method' stands both in a case"),
        ({"seed": []}, "seed is an empty list"),
        ({"model": None}, "model is None"),
        ({"bits": "two"}, "bits is 'two'"),
        ({"bits": [2, 5]}, "5"),
        ({"method": "omniqant"}, "did you mean 'omniquant'"),
        ({"loss": "mze"}, "did you mean 'mse'"),
        ({"recipe": 3}, "recipe is 3"),
        ({"recipe": "w2g65"}, "did you mean"),
    ],
)
def test_what_is_no_grid_is_refused(grid: Grid, values: dict[str, Any], part: str) -> None:
    with pytest.raises(SwquantError, match=part):
        read_grid(grid(**values))


@pytest.mark.parametrize(("content", "part"), [(b"- a", "no mapping"), (b"a: [", "YAML"), (b"\xff", "cannot be read")])
def test_files_that_hold_none_are_refused(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "grid.yaml").write_bytes(content)
    with pytest.raises(SwquantError, match=part):
        read_grid(tmp_path / "grid.yaml")


def test_a_trial_is_its_recipe_model_and_texts(grid: Grid, text: Path, make_model: Callable[..., Path]) -> None:
    (base,) = read_grid(grid())
    found = Identities().trial(base).id
    moved = text.with_name("moved.txt")
    moved.write_text(text.read_text())
    (same,) = read_grid(grid(calibration=str(moved)))
    assert Identities().trial(same).id == found
    moved.write_text(text.read_text() + "more")
    others: list[dict[str, Any]] = [
        {"calibration": str(moved)},
        {"evaluation": None},
        {"seed": 1},
        {"model": str(make_model("llama", 1))},
        {"method": "gptq"},
    ]
    ids = {Identities().trial(read_grid(grid(**values))[0]).id for values in others}
    assert len(ids | {found}) == 6
