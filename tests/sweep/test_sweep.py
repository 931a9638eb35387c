"""Sweeps from the grid to the table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from swquant import Recipe, SwquantError, quantize
from swquant.cli import main
from swquant.sweep import plan_sweep, run_sweep
from swquant.sweep.executors import LocalProcesses, RayTasks, choose_executor
from swquant.sweep.plots import page
from swquant.sweep.table import columns, csv_text, write_parquet

Grid = Callable[..., Path]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_what_the_run_reports(grid: Grid, here: Any, llama: Path, text: Path, tmp_path: Path) -> None:
    rows = run_sweep(grid(bits=[2, 3]), tmp_path / "out", here, 1)
    assert [row["bits"] for row in rows] == [2, 3]
    values = {"bits": 3, "group_size": 32, "method": "rtn", "calibration": str(text), "samples": 2, "seq_len": 16}
    rest = {"evaluation": str(text), "evaluation_samples": 2, "device": "cpu"}
    report = quantize(Recipe.from_mapping(values | rest), llama, tmp_path / "alone")
    quality = report.quality
    assert quality is not None
    assert (rows[1]["perplexity"], rows[1]["kl"]) == (quality.perplexity, quality.kl)
    written = table(tmp_path / "out")
    assert [row["status"] for row in written] == ["done", "done"]
    assert float(written[1]["perplexity"]) == quality.perplexity
    assert {"trial", "model", "seed", "method", "loss", "nats_lost", "seconds", "torch", "error"} <= written[0].keys()
    blocks = [block.measured for block in report.block_reports]
    shifts = [block.after.variance_shift for block in blocks if block is not None]
    distances = [block.after.sliced_wasserstein / block.rms for block in blocks if block is not None]
    assert rows[1]["block_variance_shift"] == pytest.approx(sum(shifts) / len(shifts))
    assert float(written[1]["block_sliced_wasserstein"]) == pytest.approx(sum(distances) / len(distances))
    assert float(written[0]["block_relative_error"]) > float(written[1]["block_relative_error"]) > 0
    places = [tmp_path / "out" / "trials" / row["trial"] for row in rows]
    assert all((place / "report.json").exists() and not (place / "model").exists() for place in places)


def test_finished_trials_are_never_run_again(grid: Grid, here: Any, tmp_path: Path) -> None:
    first = run_sweep(grid(), tmp_path / "out", here, 1)
    more = run_sweep(grid(seed=[0, 1]), tmp_path / "out", here, 1)
    assert len(here.ran) == len(set(here.ran)) == 2
    assert more[0] == first[0]
    others = run_sweep(grid(seed=1), tmp_path / "out", here, 1)
    assert len(here.ran) == 2
    assert [row["seed"] for row in others] == [1, 0]


def test_equal_trials_run_once(grid: Grid, here: Any, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(llama)
    path = grid(model=[str(llama), "same"], seed=[0, 0])
    planned = plan_sweep(path, tmp_path / "out")
    assert (planned.cells, len(planned.trials)) == (4, 1)
    assert len(run_sweep(path, tmp_path / "out", here, 1)) == len(here.ran) == 1


def test_a_failed_trial_is_a_row_and_is_tried_again(
    grid: Grid, here: Any, tmp_path: Path, make_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wide = make_model("llama", 1, intermediate_size=96)
    path = grid(group_size=[64, 32], model=str(wide))
    said: list[str] = []
    failed, done = run_sweep(path, tmp_path / "out", here, 1, say=said.append)
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert "96" in failed["error"]
    assert failed["group_size"] == "64"
    assert any("failed: " in line for line in said)
    assert table(tmp_path / "out")[0]["error"] == failed["error"]
    assert "1 of them failed" in (tmp_path / "out" / "results.html").read_text()
    main(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["2", "again", "finished"]
    run_sweep(path, tmp_path / "out", here, 1)
    assert here.ran == [failed["trial"], done["trial"], failed["trial"]]


def test_what_nobody_foresaw_is_a_row_too(
    grid: Grid, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("swquant.sweep.trial.quantize", broken)
    (row,) = run_sweep(grid(), tmp_path / "out", here, 1)
    assert (row["status"], row["error"]) == ("failed", "ZeroDivisionError: by nothing")


def test_dry_run_writes_nothing(grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep", str(grid(bits=[2, 3], seed=[0, 1])), "--out", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 combinations, 4 trials, 4 to run"
    assert all(line.startswith("to run") for line in lines[1:])
    assert len({line.split()[2] for line in lines[1:]}) == 4
    assert not (tmp_path / "out").exists()


def test_models_are_kept_if_asked_for(grid: Grid, here: Any, tmp_path: Path) -> None:
    (row,) = run_sweep(grid(), tmp_path / "out", here, 1, keep=True)
    assert (tmp_path / "out" / "trials" / row["trial"] / "model" / "report.json").exists()


def test_a_grid_that_is_refused_leaves_nothing(grid: Grid, here: Any, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="did you mean 'seed'"):
        run_sweep(grid(seeds=[1]), tmp_path / "out", here, 1)
    with pytest.raises(SwquantError, match="nowhere"):
        run_sweep(grid(calibration="nowhere.txt"), tmp_path / "out", here, 1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_or_of_another_sweep_is_left_alone(grid: Grid, here: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(SwquantError, match="no sweep"):
        run_sweep(grid(), tmp_path / "full", here, 1)
    with pytest.raises(SwquantError, match="is a file"):
        run_sweep(grid(), tmp_path / "full" / "thesis.tex", here, 1)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "sweep.lock"), pytest.raises(SwquantError, match="another sweep"):
        run_sweep(grid(), tmp_path / "out", here, 1)
    assert here.ran == []


def test_a_torn_row_is_no_row(grid: Grid, here: Any, tmp_path: Path) -> None:
    (row,) = run_sweep(grid(), tmp_path / "out", here, 1)
    place = tmp_path / "out" / "trials" / row["trial"] / "row.json"
    place.write_text(place.read_text()[:40])
    assert len(plan_sweep(grid(), tmp_path / "out").todo) == 1


class Tags(HTMLParser):
    """Counts what a page holds and where it points to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def made_row(seed: int, loss: str | None, lost: float, **values: Any) -> dict[str, Any]:
    keys = {"trial": f"{seed}{loss}", "status": "done", "model": "<m>", "bits": 2, "group_size": "64"}
    numbers = {"perplexity": 10.0, "nats_lost": lost, "kl": lost / 2, "seconds": 3.0}
    return {
        **keys,
        "symmetric": True,
        "grid": "uniform",
        "seed": seed,
        "method": "rtn",
        "loss": loss,
        **numbers,
        **values,
    }


def test_plots_have_a_dot_for_each_seed_and_need_no_network() -> None:
    rows = [made_row(seed, loss, lost) for seed in (0, 1, 2) for loss, lost in (("mse", 0.5), (None, 0.3 + seed / 10))]
    rows.append(made_row(0, "mse", 0.1, bits=3))
    rows.append({**made_row(9, "mse", 0.1), "status": "failed"})
    text = page(rows, "a & b")
    assert "<th>ΔNLL</th>" in text
    assert "ΔNLL, nats per token" in text
    tags = Tags()
    tags.feed(text)
    names = [name for name, _ in tags.found]
    assert names.count("h2") == 2
    assert names.count("circle") == 2 * 7
    assert not any("src" in values or "href" in values for _, values in tags.found)
    assert "&lt;m&gt;, 2 bits, groups of 64, symmetric" in text
    assert text.index("own loss") < text.index("rtn, mse")
    assert "0.4000 ± 0.1000" in text


def test_the_table_takes_rows_of_any_kind(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"trial": "a", "status": "failed", "error": 'a "comma", a line\nend', "group_size": "channel"},
        {"trial": "b", "status": "done", "error": None, "group_size": "64", "kl": 1, "lost": 2, "more": True},
        {"trial": "c", "status": "done", "error": None, "group_size": "64", "kl": 0.5, "lost": None, "more": None},
    ]
    assert columns(rows) == ["trial", "status", "error", "group_size", "kl", "lost", "more"]
    read = list(csv.DictReader(csv_text(rows).splitlines(keepends=True)))
    assert read[0]["error"] == rows[0]["error"]
    assert [row["kl"] for row in read] == ["", "1", "0.5"]
    assert csv_text([]) == "\n"
    if write_parquet(rows, tmp_path / "t.parquet"):
        from pyarrow import parquet

        assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [
            {name: row.get(name) for name in columns(rows)} for row in rows
        ]


def test_without_pyarrow_the_csv_stands_alone(
    grid: Grid, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said: list[str] = []
    run_sweep(grid(), tmp_path / "out", here, 1, say=said.append)
    assert (tmp_path / "out" / "results.csv").exists()
    assert not (tmp_path / "out" / "results.parquet").exists()
    assert any("swquant[sweep]" in line for line in said)


def test_the_executor_is_ray_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_executor("auto", None, None, None, 1) == (LocalProcesses(1, 1), 8)
    assert choose_executor("local", 3, None, None, 0) == (LocalProcesses(3, 0), 2)
    assert choose_executor("local", 99, None, None, 0)[1] == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray", object())
    assert choose_executor("auto", None, 2, None, 1) == (RayTasks(2, None, 1, None), 2)
    assert choose_executor("auto", 2, 2, None, 1) == (LocalProcesses(2, 1), 2)
    assert choose_executor("ray", 2, 2, 0.5, 1) == (RayTasks(2, 0.5, 1, 2), 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SwquantError, match=r"swquant\[ray\]"):
        choose_executor("ray", None, None, None, 1)


@pytest.mark.parametrize(
    ("values", "part"), [((0, None, 1), "workers is 0"), ((1, 0, 1), "threads"), ((1, 1, -1), "-1")]
)
def test_numbers_out_of_range_are_refused(values: tuple[int, int | None, int], part: str) -> None:
    workers, threads, retries = values
    with pytest.raises(SwquantError, match=part):
        choose_executor("local", workers, threads, None, retries)


def test_a_ray_that_does_not_start_is_said_in_a_sentence(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **_: object) -> None:
        if address == "auto":
            raise ConnectionError
        raise Exception("The current node timed out during startup.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(SwquantError, match=r"Ray does not start .*: The current node .* --executor local$"):
        run_sweep(grid(), tmp_path / "out", RayTasks(1, None, 0, 1), 1)
