"""Ranks that are threads of the test, for speed, and ranks that torchrun starts, for truth."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks


@dataclass
class Crew:
    size: int
    barrier: threading.Barrier = field(init=False)
    left: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.left = threading.Barrier(self.size), [None] * self.size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.left[rank] = value
        self.barrier.wait()
        found = list(self.left)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Member:
    rank: int
    size: int
    crew: Crew

    def gather(self, rows: Tensor, count: int) -> Tensor:
        found = self.crew.exchange(self.rank, rows.detach().clone())
        assert {part.dtype for part in found} == {rows.dtype}
        whole = torch.cat(found)
        assert len(whole) == count
        return whole

    def sum(self, tensors: Sequence[Tensor]) -> None:
        found = self.crew.exchange(self.rank, [tensor.detach().clone() for tensor in tensors])
        for index, tensor in enumerate(tensors):
            parts = [theirs[index] for theirs in found]
            assert {(part.shape, part.dtype) for part in parts} == {(tensor.shape, tensor.dtype)}
            tensor.detach().copy_(torch.stack(parts).sum(0))

    def barrier(self) -> None:
        self.crew.exchange(self.rank, None)

    def leave(self) -> None:
        self.crew.exchange(self.rank, None)

    def lead(self, work: Callable[[], Any]) -> Any:
        return self.crew.exchange(self.rank, work() if self.rank == 0 else None)[0]


def run_crew(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks; a rank that raises ends the others."""
    crew = Crew(size)

    def run(rank: int) -> Any:
        try:
            return work(Member(rank, size, crew))
        except BaseException:
            crew.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


def start(size: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """torchrun, with all that its processes print in one stream."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def torchrun(size: int, *arguments: str | Path, timeout: float = 300) -> tuple[int, str]:
    """The exit code and the output of a run of ``size`` processes."""
    process = start(size, *arguments)
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RunCrew = Callable[[int, Callable[[Ranks], Any]], list[Any]]


@pytest.fixture(scope="session")
def crew() -> RunCrew:
    return run_crew


@pytest.fixture(scope="session")
def launch() -> Callable[..., tuple[int, str]]:
    return torchrun


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., subprocess.Popen[str]]:
    return start
