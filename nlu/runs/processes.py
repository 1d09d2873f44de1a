"""Helpers for distributed runs: rank-0 work, barriers and shutdown.

The launcher says in the environment how many processes there are, and which one this is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


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
