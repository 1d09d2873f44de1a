"""Helpers for distributed runs: rank-0 work, barriers, FSDP asked for at launch, and shutdown.

The launcher says in the environment how many processes there are, and which one this is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_FSDP = "ACCELERATE_USE_FSDP"  # `accelerate launch` sets it if its file has distributed_type: FSDP


def is_first() -> bool:
    """Whether this is rank 0, which alone writes the run's files and prints its lines."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"  # another program's RANK says nothing


def world_size() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def start_processes(use_cpu: bool) -> None:
    """Join the process group if a launcher started several processes."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=use_cpu or not torch.accelerator.is_available())


@contextmanager
def without_accelerate_fsdp() -> Iterator[bool]:
    """A block in which accelerate and transformers see no request for FSDP, and set up a plain distributed run.

    accelerate would also split the factors and the head, which the regulariser, the allocator and exact factors need
    whole; the run splits the frozen weights alone, with :mod:`loralib.interop.sharding`. Each of two processes then
    holds half of the frozen bytes (docs/library.md: measured with gloo on a CPU; its speed was not measured).

    It yields whether the run was launched with FSDP, on more than one process.
    """
    asked = os.environ.pop(_FSDP, None)
    try:
        yield asked is not None and asked.lower() == "true" and world_size() > 1
    finally:
        if asked is not None:
            os.environ[_FSDP] = asked


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of their ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def first_computes(compute: Callable[[], T]) -> T:
    """Call ``compute`` on rank 0 alone; all processes return its result or raise its exception."""
    answer: Any = None, None
    if is_first():
        try:
            answer = compute(), None
        except Exception as error:
            answer = None, error
    result, error = gathered(answer)[0]
    if error is not None:
        raise error
    return result


def wait_for_all() -> None:
    """Wait until all processes have reached this point."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def end_processes() -> None:
    """Leave the process group together: a process that ends early can abort one that still communicates with it."""
    import torch.distributed as dist

    if world_size() > 1 and dist.is_initialized():  # not by --dry_run
        dist.barrier()
        dist.destroy_process_group()
