"""Every method on the demo model, on a device and on the CPU: a part of ``gpu.py``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import swquant.run as run
from parts import Row, Rows
from swquant.checkpoint.quantized import entries
from swquant.checkpoint.reader import open_checkpoint
from swquant.demo import ASSETS
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.quant.qtensor import QTensor
from swquant.recipe import Recipe

CPU_THREADS = 4
"""Of each of the smoke test's runs on the CPU."""

SHORT = {
    "block_ap": "block_ap(epochs=1)",
    "efficientqat": "efficientqat(epochs=1, scale_epochs=1)",
    "end_to_end": "rtn + end_to_end(epochs=1)",
    "omniquant": "omniquant(epochs=1)",
    "rotate": "rotate + rtn",
    "signround": "signround(steps=10)",
    "tesseraq": "tesseraq(rounds=2, iterations=4)",
}
"""Of methods that take long, or cannot stand alone; the others are run as they come."""


def smoke(names: Sequence[str], samples: int, tokens: int) -> Rows:
    """The CPU's runs go on beside the device's, in processes of their own."""
    workers = max(1, min(len(names), (os.cpu_count() or 1) // CPU_THREADS))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (CPU_THREADS,))
    with tempfile.TemporaryDirectory() as folder, pool:
        cpu = {
            name: pool.submit(short_run, samples, tokens, name, Path(folder) / name, "cpu", "float32") for name in names
        }
        for name in names:
            yield name, partial(beside_the_cpu, samples, tokens, name, Path(folder) / name, cpu[name])


def beside_the_cpu(samples: int, tokens: int, name: str, place: Path, cpu: Future[Row]) -> Row:
    """A method's short run on the device and on the CPU."""
    row: Row = {"method": SHORT.get(name, name)}
    for precision in ("float32", "auto"):
        row |= short_run(samples, tokens, name, place, "auto", precision)
    row |= cpu.result()
    one, other = (codes(place / f"{device}, float32") for device in ("auto", "cpu"))
    equal = sum(int((one[name] == other[name]).sum()) for name in other)
    return row | {"share of equal codes": round(equal / sum(value.numel() for value in other.values()), 5)}


def short_run(samples: int, tokens: int, name: str, place: Path, device: str, precision: str) -> Row:
    """Perplexity and seconds of a method on the demo model."""
    began, way = time.perf_counter(), f"{device}, {precision}"
    text = {"calibration": str(ASSETS / "calibration.txt"), "evaluation": str(ASSETS / "evaluation.txt")}
    shape = {"samples": samples, "seq_len": tokens, "evaluation_samples": samples}
    recipe = Recipe(
        method=SHORT.get(name, name), format="compressed-tensors", device=device, precision=precision, **shape, **text
    )
    report = run.quantize(recipe, Path(str(ASSETS / "model")), place / way)
    assert report.quality is not None
    seconds = round(time.perf_counter() - began, 1)
    return {f"perplexity, {way}": round(report.quality.perplexity, 3), f"seconds, {way}": seconds}


def codes(folder: Path) -> dict[str, Tensor]:
    """Of each quantized weight."""
    model = CompressedTensors().read(folder, open_checkpoint(folder, quantized=True).config)
    assert model is not None
    found = (entry for part in model.parts() for entry in entries(part))
    return {name: value.codes for name, value in found if isinstance(value, QTensor)}
