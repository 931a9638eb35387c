"""Where trials run: in processes of this machine, or on Ray."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from swquant.errors import SwquantError, reason_of
from swquant.sweep.trial import Order, failed_row, read_row, run_trial, write_row

AUTO, LOCAL, RAY = "auto", "local", "ray"
Finished = Callable[[Order], None]
T = TypeVar("T")


class Executor(Protocol):
    """Runs trials; each leaves a row in its place, whatever becomes of it."""

    def run(self, orders: Sequence[Order], finished: Finished) -> None:
        """Run all of them, and say of each when its row is there."""
        ...


@dataclass(frozen=True)
class LocalProcesses:
    """A new process for each trial, so that one that is killed takes no other with it, and memory comes back.

    Attributes:
        workers: Trials at a time.
        retries: How often a trial whose process died is started again; it goes on after its last finished block.
    """

    workers: int
    retries: int

    def run(self, orders: Sequence[Order], finished: Finished) -> None:
        """See :class:`Executor`."""
        attempts = Counter[str]()

        def ended(order: Order, code: int | None, _: float) -> bool:
            attempts[order.id] += 1
            if read_row(Path(order.place)) is None:
                if attempts[order.id] <= self.retries:
                    return True
                write_row(order, failed_row(order, _death(code, attempts[order.id])))
            finished(order)
            return False

        in_processes(_trial, orders, self.workers, ended)


@dataclass(frozen=True)
class RayTasks:
    """A Ray task for each trial, on as many machines as the cluster has; they share the sweep's directory.

    Attributes:
        threads: CPUs that a trial asks for.
        gpus: GPUs that it asks for; ``None`` is one where the cluster has any.
        retries: How often a trial whose worker died is started again.
        workers: CPUs, in trials, of a cluster that is started here; ``None`` takes all.
    """

    threads: int
    gpus: float | None
    retries: int
    workers: int | None

    def run(self, orders: Sequence[Order], finished: Finished) -> None:
        """See :class:`Executor`."""
        ray: Any = _import_ray()
        mine = not ray.is_initialized()
        if mine:
            self._start(ray)
        try:
            gpus = self.gpus if self.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
            self._require_room(ray, gpus)
            task: Any = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=self.retries)(run_trial)
            running = {task.remote(order): order for order in orders}
            while running:
                ready, _ = ray.wait(list(running), num_returns=1)
                for reference in ready:
                    order = running.pop(reference)
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayError as error:
                        reason = reason_of(error)
                        write_row(order, failed_row(order, f"its Ray worker died: {reason}"))
                    finished(order)
        finally:
            if mine:
                ray.shutdown()

    def _require_room(self, ray: Any, gpus: float) -> None:
        """Refuse what no machine has; Ray would wait for it."""
        for node in ray.nodes():
            has = node["Resources"]
            if node["Alive"] and has.get("CPU", 0) >= self.threads and has.get("GPU", 0) >= gpus:
                return
        raise SwquantError(
            f"no machine of the Ray cluster has {self.threads} CPUs and {gpus:g} GPUs, which --threads and --gpus ask "
            "for a trial; ask for less"
        )

    def _start(self, ray: Any) -> None:
        """Join the cluster that runs on this machine or that Ray's own means point to, or start one here."""
        shared = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(address="auto", **shared)
            return
        except ConnectionError:
            own = {} if self.workers is None else {"num_cpus": self.workers * self.threads}
        try:
            ray.init(address="local", include_dashboard=False, **own, **shared)
        except Exception as error:  # Ray raises that itself, of no class of its own
            raise SwquantError(
                f"Ray does not start on this machine: {reason_of(error)} Where it is busy, Ray's processes take longer "
                "than the 15 seconds that it gives them: try again, or choose --executor local"
            ) from error


def choose_executor(
    name: str, workers: int | None, threads: int | None, gpus: float | None, retries: int
) -> tuple[Executor, int]:
    """The executor and the threads of each trial.

    Args:
        name: ``auto`` is Ray where it is installed, unless ``workers`` asks for local processes.
        workers: Trials at a time in local processes.
        threads: Of each trial; by default the machine's cores over the workers.
        gpus: Of each trial on Ray.
        retries: Of trials whose process died.

    Raises:
        SwquantError: A number is out of range, or Ray is asked for and not installed.
    """
    for what, value, least in (("workers", workers, 1), ("threads", threads, 1), ("retries", retries, 0)):
        if value is not None and value < least:
            raise SwquantError(f"{what} is {value}, expected {least} or more")
    if name == AUTO:
        name = RAY if workers is None and importlib.util.find_spec("ray") is not None else LOCAL
    threads = threads or max(1, (os.cpu_count() or 1) // (workers or 1))
    if name == LOCAL:
        return LocalProcesses(workers or 1, retries), threads
    _import_ray()
    return RayTasks(threads, gpus, retries, workers), threads


def _import_ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SwquantError("--executor ray needs: pip install 'swquant[ray]'") from error
    return ray


def in_processes(
    work: Callable[[T, int], None], orders: Iterable[T], workers: int, ended: Callable[[T, int | None, float], bool]
) -> None:
    """Run each order in a new process, some at a time; none of them outlives this one, however it ends.

    Args:
        work: What a process does, with its order and its slot, which no other has at the time.
        orders: Plain values.
        workers: Processes at a time.
        ended: Hears of each with its exit code and how many seconds it took; ``True`` runs it again after the others.
    """
    context = multiprocessing.get_context("spawn")
    waiting, free = deque(orders), deque(range(workers))
    running: dict[int, tuple[BaseProcess, T, int, float]] = {}
    while waiting or running:
        while waiting and free:
            order, slot = waiting.popleft(), free.popleft()
            process = context.Process(target=_live, args=(work, order, slot), daemon=True)
            process.start()
            running[process.sentinel] = (process, order, slot, time.monotonic())
        for sentinel in connection.wait(list(running)):
            assert isinstance(sentinel, int)
            process, order, slot, began = running.pop(sentinel)
            process.join()
            free.append(slot)
            if ended(order, process.exitcode, time.monotonic() - began):
                waiting.append(order)


def _live(work: Callable[[T, int], None], order: T, slot: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    work(order, slot)


def _trial(order: Order, slot: int) -> None:
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(slot % torch.accelerator.device_count())
    run_trial(order)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _death(code: int | None, attempts: int) -> str:
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return f"its process {how}, at {attempts} of {attempts} attempts; the machine may be short of memory"
