"""One run in several processes: whether there are several, waiting for one another, and ending together."""

from __future__ import annotations

import torch.distributed as dist


def several() -> bool:
    """Whether other processes take part in this run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wait_for_all() -> None:
    """A barrier where there are several processes."""
    if several():
        dist.barrier()


def end_processes() -> None:
    """Leave the process group together: one that ends while another still talks to it can abort that one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
