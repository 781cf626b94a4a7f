"""Collectives that all packages share, and the rank of this process. Everything works in one process, too."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cogflow.errors import CogflowError, RankLost
from cogflow.rank_identity import local_rank as local_rank
from cogflow.rank_identity import rank as rank
from cogflow.rank_identity import world_size as world_size

T = TypeVar("T")


def is_main() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """Return the GPU of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


TIMEOUT = timedelta(minutes=60)
"""Longest wait of a collective for another rank."""
JOIN_TIMEOUT = timedelta(minutes=10)
"""Longest wait for all ranks to start."""
PATIENCE = 15.0
"""Seconds after which rank 0 prints that it waits for the other ranks."""


def setup() -> None:
    """Join the process group when there are several processes; otherwise do nothing.

    Raises :class:`RankLost` when not all ranks have started within :data:`JOIN_TIMEOUT`.
    """
    if world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_meet(), rank=rank(), world_size=world_size(), timeout=TIMEOUT)


def _meet() -> Store:
    """Return the store through which the ranks find each other, when all of them have started."""
    place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    waiting = threading.Timer(PATIENCE, print, [f"waiting for {world_size()} ranks at {place}"], {"flush": True})
    if is_main():
        waiting.start()
    try:
        store, _, _ = next(rendezvous("env://", rank(), world_size(), timeout=JOIN_TIMEOUT))
    except RuntimeError as error:
        lost = RankLost(
            f"The {world_size()} ranks did not meet at {place} within {JOIN_TIMEOUT.total_seconds() / 60:g} minutes: "
            f"{str(error).splitlines()[0]}",
            "Check that every task has started (its log), that the others reach rank 0's node at this address "
            "(MASTER_ADDR), and that the port is free and open (MASTER_PORT).",
        )
        lost.rank = rank()
        raise lost from error
    finally:
        waiting.cancel()
    store.set_timeout(TIMEOUT)
    return PrefixStore("default_pg", store)


def any_rank(flag: bool) -> bool:
    """Return whether ``flag`` is set on any rank; the same answer on every rank.

    It uses host memory, so it waits for no GPU. Collective.
    """
    if not dist.is_initialized() or world_size() == 1:
        return flag
    combined = torch.tensor([int(flag)])
    dist.all_reduce(combined, op=dist.ReduceOp.MAX, group=_host_group())
    return bool(combined.item())


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """Return a group of all ranks that works on host memory: the default group where that is gloo.

    Collective the first time.
    """
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@lru_cache(maxsize=1)
def consecutive_group(size: int) -> Any:
    """Return this rank's process group among groups of ``size`` consecutive ranks, which torchrun puts on one machine
    where it can.

    ``size`` must divide the number of ranks. Collective the first time: every rank takes part in the creation of every
    group.
    """
    groups = [dist.new_group(range(first, first + size), timeout=TIMEOUT) for first in range(0, world_size(), size)]
    return groups[rank() // size]


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Return ``value`` of every rank, in rank order, on every rank. Values must be picklable and small. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank. It must be picklable and small. Collective."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def run_on_main(work: Callable[[], T]) -> T:
    """Call ``work`` on rank 0 and return its result on every rank; a :class:`CogflowError` of it is raised on every
    rank. Collective.
    """
    result: Any = None
    error: CogflowError | None = None
    if is_main():
        try:
            result = work()
        except CogflowError as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    value: T = result
    return value


@contextlib.contextmanager
def tag_rank_errors() -> Iterator[None]:
    """Set the rank of a :class:`CogflowError` that only this rank may raise: this rank reports it, not rank 0."""
    try:
        yield
    except CogflowError as error:
        error.rank = rank()
        raise


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of a tensor over the ranks. Collective."""
    if not dist.is_initialized() or world_size() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed
