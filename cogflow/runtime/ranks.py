"""Which process this is, and the few collectives that everything shares. Works the same without torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogflow.errors import CogflowError

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


TIMEOUT = timedelta(minutes=60)
"""For which a collective waits for another rank."""


def setup() -> None:
    """Join the process group when torchrun started more than one process; otherwise do nothing."""
    if world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank; the same answer on every rank. Goes over the hosts, so that no GPU is waited for."""
    if not dist.is_initialized() or world_size() == 1:
        return flag
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_hosts())
    return bool(box.item())


@lru_cache(maxsize=1)
def _hosts() -> Any:
    """A group of all ranks that works on host memory: the default one where that is gloo. Collective the first time."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@lru_cache(maxsize=1)
def consecutive_group(size: int) -> Any:
    """The process group of this rank among groups of ``size`` consecutive ranks, which torchrun puts on one machine where it can.

    ``size`` must divide the number of ranks. Collective the first time: every rank takes part in the making of every group.
    """
    groups = [dist.new_group(range(first, first + size), timeout=TIMEOUT) for first in range(0, world_size(), size)]
    return groups[rank() // size]


def close() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. Values must be picklable and small."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_main(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on every rank; the error that it raises there, too. Collective."""
    value: Any = None
    error: CogflowError | None = None
    if is_main():
        try:
            value = work()
        except CogflowError as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def tag_rank_errors() -> Iterator[None]:
    """Have an error that this rank alone may meet say so: it is not rank 0 that will tell it."""
    try:
        yield
    except CogflowError as error:
        error.rank = rank()
        raise


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Element-wise mean of a float tensor over the ranks."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a tensor over the ranks."""
    if not dist.is_initialized() or world_size() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed
