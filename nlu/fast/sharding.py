"""FSDP of the frozen weights. Gains memory: each of two processes holds half of the frozen bytes.

Measured in docs/library.md with gloo on a CPU; its speed was not measured. It applies the FSDP of accelerate's launch
file to the frozen weights alone: accelerate would also split the factors and the head, which the regulariser, the
allocator and exact factors need whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nlu.runs.processes import world_size

_ASKED = "ACCELERATE_USE_FSDP"  # `accelerate launch` sets it if its file has distributed_type: FSDP


@contextmanager
def without_accelerate_fsdp() -> Iterator[bool]:
    """A block in which accelerate and transformers see no request for FSDP, and set up a plain distributed run.

    It yields whether the run was launched with FSDP, on more than one process.
    """
    asked = os.environ.pop(_ASKED, None)
    try:
        yield asked is not None and asked.lower() == "true" and world_size() > 1
    finally:
        if asked is not None:
            os.environ[_ASKED] = asked
