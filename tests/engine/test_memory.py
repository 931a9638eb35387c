"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from swquant.engine.memory import device_peak_bytes, release


def test_the_peak_is_what_was_held_at_most_also_after_it_was_let_go() -> None:
    """In a process of its own: in this one a test before may have held more."""
    code = (
        "import psutil, torch; from swquant.engine.memory import peak_bytes\n"
        "def held(): return psutil.Process().memory_info().rss\n"
        "before, some = peak_bytes(), torch.ones(50 << 20)\n"
        "full = held(); del some\n"
        "print(before, full, held(), peak_bytes())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    before, full, after, peak = (int(number) for number in found.stdout.split())
    assert after < full - (150 << 20)
    assert before < full - (150 << 20)
    assert peak == pytest.approx(full, abs=10 << 20)


def test_a_devices_peak_is_what_its_backend_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    class Backend:
        @staticmethod
        def max_memory_allocated(device: torch.device) -> int:
            asked.append(device)
            return 7

    monkeypatch.setattr(torch, "get_device_module", lambda device: Backend)
    assert device_peak_bytes(torch.device("cuda", 1)) == 7
    assert asked == [torch.device("cuda", 1)]
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.mps)
    assert device_peak_bytes(torch.device("mps")) is None
    assert device_peak_bytes(torch.device("cpu")) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_given_back() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    size, count = 64 << 10, 1600
    pieces = [library.malloc(size) for _ in range(count)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    held = psutil.Process().memory_info().rss
    for piece in pieces[:-1]:
        library.free(ctypes.c_void_p(piece))
    release()
    assert psutil.Process().memory_info().rss < held - size * count // 2
    library.free(ctypes.c_void_p(pieces[-1]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_process_that_keeps_little_gives_back_what_it_frees_at_once() -> None:
    code = (
        "import psutil, torch; from swquant.engine.memory import keep_little\n"
        "keep_little()\n"
        "torch.ones(1 << 22)\n"
        "held, wall = [torch.ones(1 << 20) for _ in range(40)], torch.ones(1000)\n"
        "full = psutil.Process().memory_info().rss; del held\n"
        "print(full - psutil.Process().memory_info().rss)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    assert int(found.stdout) > 0.9 * 40 * (4 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux hands the number of getrusage on")
def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it() -> None:
    held = torch.ones(200 << 20)  # touched, and more than the libraries take: a CUDA build of torch alone takes 533 MB
    code = "from swquant.engine.memory import peak_bytes; print(peak_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)
    assert found < held.nbytes
