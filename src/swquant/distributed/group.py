"""Ranks on torch.distributed: gloo between CPUs, the accelerator's own library between accelerators."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from swquant.distributed.ranks import Alone, Ranks
from swquant.errors import LeaderStoppedError, RankLostError, SwquantError

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=30)
"""Longest wait for a rank that neither answers nor has closed its connections."""

LEADER_PATIENCE = timedelta(days=2)
"""Longest wait for what rank 0 does alone."""

GLANCE = 0.02
"""Seconds between two looks of a rank that waits for rank 0; a wait within torch would keep signals from it."""

BUCKET = 1 << 18
"""Tensors with fewer elements are summed together."""

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process in its environment."""


@dataclass(frozen=True)
class Group:
    """The ranks of a process group; see :class:`swquant.distributed.ranks.Ranks`.

    Attributes:
        rank: This process's number.
        size: How many there are.
        store: Where rank 0 leaves what it did alone.
    """

    rank: int
    size: int
    store: Any
    _turns: Iterator[int] = field(default_factory=itertools.count)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Each rank's rows filled up to equal length, and the filling cut off the whole's end."""
        each = -(-count // self.size)
        own = rows.detach()
        if len(own) < each:
            own = torch.cat((own, own.new_zeros(each - len(own), *own.shape[1:])))
        whole = own.new_empty(self.size * each, *own.shape[1:])
        with self._connected():
            dist.all_gather(list(whole.split(each)), own.contiguous())
        return whole[:count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Large tensors one by one, in place; small ones of one kind as one."""
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= BUCKET and tensor.is_contiguous():
                self._reduce(tensor)
            else:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for some in small.values():
            whole = torch.cat([tensor.detach().flatten() for tensor in some])
            self._reduce(whole)
            for tensor, part in zip(some, whole.split([tensor.numel() for tensor in some]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """A sum of nothing much."""
        self.sum([torch.zeros(1)])

    def leave(self) -> None:
        """Sign in the store: after a collective the interpreter could end while its thread lets go of a tensor."""
        signs = [f"swquant/left/{rank}" for rank in range(1, self.size)]
        if self.rank > 0:
            with self._connected():
                self.store.set(signs[self.rank - 1], "")
            return
        deadline = time.monotonic() + PATIENCE.total_seconds()
        with self._connected():
            while not self.store.check(signs):
                if time.monotonic() > deadline:
                    raise RuntimeError("it has not finished its part")
                time.sleep(GLANCE)

    def lead(self, work: Callable[[], Result]) -> Result:
        """Rank 0 leaves the result in the store, or that there is none; the others look for it there."""
        key = f"swquant/{next(self._turns)}"
        if self.rank == 0:
            return self._leading(key, work)
        found = json.loads(self._awaited(key))
        if "result" not in found:
            raise LeaderStoppedError(f"rank 0 has stopped: {found['stopped']}")
        return found["result"]

    def _reduce(self, tensor: Tensor) -> None:
        with self._connected():
            dist.all_reduce(tensor.detach())

    def _leading(self, key: str, work: Callable[[], Result]) -> Result:
        try:
            result = work()
        except BaseException as error:
            with self._connected():
                self.store.set(key, json.dumps({"stopped": str(error)}))
            raise
        with self._connected():
            self.store.set(key, json.dumps({"result": result}))
        return result

    def _awaited(self, key: str) -> bytes:
        deadline = time.monotonic() + LEADER_PATIENCE.total_seconds()
        with self._connected():
            while not self.store.check([key]) and time.monotonic() < deadline:
                time.sleep(GLANCE)
            return self.store.get(key)

    @contextmanager
    def _connected(self) -> Generator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-160:]
            raise RankLostError(
                f"rank {self.rank} of {self.size} lost another rank, which was killed or failed ({reason}); "
                "the same command goes on from the last finished block, with any number of ranks"
            ) from error


@contextmanager
def joined(environment: Mapping[str, str], device: str) -> Generator[Ranks]:
    """The ranks that torchrun has started, while the context lasts; a process on its own where it has not.

    Args:
        environment: The process's environment.
        device: The device that was asked for; each rank takes its machine's accelerator of the number ``LOCAL_RANK``.

    Raises:
        SwquantError: The environment tells of other ranks and not how to reach them, ``device`` is a single one, there
            are fewer accelerators than ranks on this machine, or the others do not come.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        yield Alone()
        return
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise SwquantError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} and {missing[0]} is not set: start the ranks with torchrun"
        )
    rank, size, local = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        raise SwquantError(f"RANK is {rank} of {size}, and ranks count from 0: start the ranks with torchrun")
    _take_device(device, local)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise RankLostError(f"rank {rank} did not find the others ({reason}): start them again") from error
    yield Group(rank, size, store)
    dist.destroy_process_group()


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise SwquantError(f"{name} is {value!r} and should be a number from 0 on: start the ranks with torchrun")
    return int(value)


def _take_device(device: str, index: int) -> None:
    """Make the accelerator number ``index`` that of this process, unless it computes on the CPU."""
    if device.startswith("cpu") or not torch.accelerator.is_available():
        return
    if ":" in device:
        raise SwquantError(f"each rank takes a device of its own, and {device!r} is a single one: leave the number out")
    count = torch.accelerator.device_count()
    if index >= count:
        raise SwquantError(
            f"there are {count} devices and a rank number {index} on this machine: "
            f"start at most {count} with --nproc-per-node, or take --device cpu"
        )
    torch.accelerator.set_device_index(index)
