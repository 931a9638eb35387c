"""Cached hidden states are read in order, one part ahead in a thread, and a CPU computes on the file's own pages."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swquant.device import moved
from swquant.engine.hidden_states import create_hidden, on_device, read_ahead

PARTS = [slice(0, 2), slice(2, 4), slice(4, 5)]
WAIT = 5.0


@pytest.fixture
def cache(tmp_path: Path) -> Tensor:
    made = create_hidden(tmp_path / "cache", (5, 3, 2))
    return made.copy_(torch.arange(30.0).view(5, 3, 2))


def test_parts_come_in_order_with_their_samples(cache: Tensor) -> None:
    found = list(read_ahead(cache, PARTS, Tensor.clone))
    assert [part for part, _ in found] == PARTS
    assert all(torch.equal(rows, cache[part]) for part, rows in found)
    assert list(read_ahead(cache, [], Tensor.clone)) == []


def test_the_next_part_is_read_while_one_is_in_use_and_no_further(cache: Tensor) -> None:
    read: list[float] = []
    second = threading.Event()

    def note(rows: Tensor) -> Tensor:
        assert threading.current_thread() is not threading.main_thread()
        read.append(float(rows[0, 0, 0]))
        if len(read) == 2:
            second.set()
        return rows.clone()

    coming = read_ahead(cache, PARTS, note)
    next(coming)
    assert second.wait(WAIT), "the second part is read before it is asked for"
    assert read == [0.0, 12.0]
    next(coming)
    coming.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_a_failure_to_read_is_raised_at_its_turn(cache: Tensor) -> None:
    def fail(rows: Tensor) -> Tensor:
        if rows[0, 0, 0] == 12.0:
            raise OSError("the disk is gone")
        return rows.clone()

    coming = read_ahead(cache, PARTS, fail)
    assert torch.equal(next(coming)[1], cache[:2])
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_a_cpu_is_given_the_files_pages(cache: Tensor) -> None:
    for part, rows in on_device(cache, PARTS, torch.device("cpu")):
        assert rows.data_ptr() == cache[part].data_ptr()


def test_a_cuda_device_is_given_pinned_samples_without_waiting(cache: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pinning and moving, because there is no such device here."""
    pinned: list[int] = []
    went: list[tuple[int, str, bool]] = []

    def pin(rows: Tensor) -> Tensor:
        held = rows.clone()
        pinned.append(held.data_ptr())
        return held

    def to(rows: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        went.append((rows.data_ptr(), device.type, non_blocking))
        return rows

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    cuda = torch.device("cuda")
    held = list(on_device(cache, PARTS, cuda))
    held.append((slice(1), moved(cache[:1], cuda)))
    assert [torch.equal(rows, cache[part]) for part, rows in held] == [True] * 4
    assert went == [(place, "cuda", True) for place in pinned]
