"""One run in several processes: what the first one does for all, waiting for one another, and ending together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the process that writes the run's files and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def start_processes(use_cpu: bool) -> None:
    """Join the process group of a launcher that started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=use_cpu or not torch.accelerator.is_available())


def several() -> bool:
    """Whether other processes take part in this run."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_computes(compute: Callable[[], T]) -> T:
    """In all processes what ``compute`` gives, or raises, in the first, which alone calls it."""
    if not several():
        return compute()
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = compute()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def wait_for_all() -> None:
    """A barrier where there are several processes."""
    import torch.distributed as dist

    if several():
        dist.barrier()


def end_processes() -> None:
    """Leave the process group together: one that ends while another still talks to it can abort that one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
