"""FSDP of the frozen weights. Gains memory: each of two processes holds half of the frozen bytes.

Measured in docs/library.md with gloo on a CPU; its speed was not measured. It applies the FSDP of accelerate's launch
file to the frozen weights alone: accelerate would also split the factors and the head, which the regulariser, the
allocator and exact factors need whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nlu.errors import UsageError

_ASKED = "ACCELERATE_USE_FSDP"  # `accelerate launch` sets it if its file has distributed_type: FSDP


@contextmanager
def without_accelerates_own() -> Iterator[bool]:
    """A block in which accelerate and transformers see no request for FSDP, and set up a plain distributed run.

    It yields whether the run was launched with FSDP, on more than one process.
    """
    asked = os.environ.pop(_ASKED, None)
    try:
        yield asked is not None and asked.lower() == "true" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    finally:
        if asked is not None:
            os.environ[_ASKED] = asked


def shard(model: nn.Module, training: Any) -> None:
    """Split the frozen weights over the processes; see :func:`loralib.interop.sharding.shard_frozen`.

    Args:
        training: the run's ``TrainingArguments``, which have the device.

    Raises:
        UsageError: if the weights cannot be split.
    """
    from loralib.interop.sharding import shard_frozen

    try:
        shard_frozen(model, training.device.type)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"FSDP: {error}") from None
