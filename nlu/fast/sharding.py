"""FSDP of the frozen weights. Gains memory: each of two processes holds half of the frozen bytes.

Measured in docs/library.md with gloo on a CPU; its speed was not measured. It does what accelerate's launch file asks
for, for the frozen weights alone: accelerate would split factors and head too, which regulariser, allocator and exact
factors need whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nlu.errors import UsageError

_ASKED = "ACCELERATE_USE_FSDP"  # `accelerate launch` sets it, for a file with distributed_type: FSDP


@contextmanager
def without_accelerates_own() -> Iterator[bool]:
    """A block in which accelerate and transformers see no request for FSDP, and make a plain distributed run.

    It gives whether the run was launched with FSDP, on more than one process.
    """
    asked = os.environ.pop(_ASKED, None)
    try:
        yield asked is not None and asked.lower() == "true" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    finally:
        if asked is not None:
            os.environ[_ASKED] = asked


def shard(model: nn.Module, training: Any) -> None:
    """Split the frozen weights over the processes, see :func:`loralib.interop.sharding.shard_frozen`.

    Args:
        training: the run's ``TrainingArguments``, which know the device.

    Raises:
        UsageError: where that cannot be done.
    """
    from loralib.interop.sharding import shard_frozen

    try:
        shard_frozen(model, training.device.type)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"FSDP: {error}") from None
