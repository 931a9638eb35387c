"""Grids of tiny models, and an executor that stays in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swquant.sweep.executors import Finished
from swquant.sweep.trial import Order, run_trial

Grid = Callable[..., Path]


class Here:
    """Runs trials in this process, and remembers which."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, orders: Sequence[Order], finished: Finished) -> None:
        for order in orders:
            run_trial(order)
            self.ran.append(order.id)
            finished(order)


@pytest.fixture
def here() -> Iterator[Here]:
    threads = torch.get_num_threads()
    yield Here()
    torch.set_num_threads(threads)


@pytest.fixture
def grid(llama: Path, text: Path, tmp_path: Path) -> Grid:
    """Writes a grid's file, over what all of them share."""

    def write(name: str = "grid.yaml", **values: Any) -> Path:
        shared = {
            "model": str(llama),
            "group_size": 32,
            "method": "rtn",
            "calibration": str(text),
            "samples": 2,
            "seq_len": 16,
            "evaluation": str(text),
            "evaluation_samples": 2,
            "device": "cpu",
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(shared | values, sort_keys=False))
        return path

    return write
