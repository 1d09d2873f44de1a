"""Whether the losses, gradients and weights of a training are finite, looked at where a look costs little."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MOST = 1000  # values that wait on the device, at most


class FiniteWatch:
    """Losses and gradients that are still to be looked at: on a GPU, a look in each step would make the CPU wait."""

    def __init__(self, device: torch.device) -> None:
        self._waiting: list[tuple[int, str, Tensor]] = []
        self._every_step = device.type == "cpu"

    def add(self, step: int, what: str, value: Tensor) -> None:
        """Keep a scalar of that optimiser step until the next look."""
        self._waiting.append((step, what, value))

    @property
    def is_due(self) -> bool:
        """Whether to look without another reason."""
        return self._every_step or len(self._waiting) > _MOST

    def first_bad(self) -> tuple[int, str] | None:
        """The first step since the last look with a value that is not finite, and which value."""
        if not self._waiting:
            return None
        waiting, self._waiting = self._waiting, []
        values = torch.stack([value.detach().float().reshape(()) for _, _, value in waiting]).tolist()
        bad = ((step, f"the {what} is {v}") for (step, what, _), v in zip(waiting, values, strict=True)
               if not math.isfinite(v))  # fmt: skip
        return next(bad, None)


def trained_are_finite(model: nn.Module) -> bool:
    """Whether every value of every parameter that trains is finite."""
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters() if p.requires_grad]).all())
