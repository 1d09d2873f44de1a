"""Techniques that make a training step cheaper; ``speed_up`` applies them. Apart from rounding, results differ only in
the dropout masks, and in rows that hold nothing but padding.

The first lines of each file say what it gains.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import nn

from nlu.errors import UsageError
from nlu.fast.cpu_attention import enable_cpu_attention
from nlu.fast.dropout import enable_fast_dropout
from nlu.fast.first_token import enable_first_token
from nlu.fast.process import keep_freed_memory, keep_kernels


def _enable_deberta_attention(model: nn.Module) -> None:
    if "transformers.models.deberta_v2.modeling_deberta_v2" in sys.modules:  # slow to import for others
        from nlu.fast.deberta_attention import enable_deberta_attention

        enable_deberta_attention(model)


class Technique(NamedTuple):
    """``enable(model)`` applies it in place. One that is for the CPU alone works around torch's kernels there."""

    enable: Callable[[nn.Module], Any]
    for_cpu_alone: bool


TECHNIQUES = {
    "freed_memory": Technique(lambda _: keep_freed_memory(), True),
    "kernels": Technique(lambda _: keep_kernels(), True),
    "dropout": Technique(enable_fast_dropout, True),
    "cpu_attention": Technique(enable_cpu_attention, True),
    "deberta_attention": Technique(_enable_deberta_attention, False),
    "first_token": Technique(enable_first_token, False),
}
ATTENTION = ("cpu_attention", "deberta_attention", "first_token")  # what --no_fast_attention switches off


def speed_up(model: nn.Module, without: Collection[str] = (), device: torch.device | None = None) -> None:
    """Apply every technique that covers `model` and the device, in place.

    Args:
        without: names of :data:`TECHNIQUES` to leave out.
        device: where the model will compute; by default the accelerator, or the CPU if there is none.

    Raises:
        UsageError: for an unknown name.
    """
    if unknown := sorted(set(without) - set(TECHNIQUES)):
        raise UsageError(f"no technique is called {unknown[0]!r}: there are {', '.join(TECHNIQUES)}")
    on_cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
    for name, technique in TECHNIQUES.items():
        if name not in without and (on_cpu or not technique.for_cpu_alone):
            technique.enable(model)
