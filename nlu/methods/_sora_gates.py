"""SoRA's gates inside the training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from loralib import LowRankTraining
from loralib.allocator import Ranks
from loralib.model import svd_layers


class GateTraining(LowRankTraining):
    """Takes the proximal step on every gate after each optimiser step. There is no budget of live ranks.

    Args:
        model: the e of its low-rank layers are the gates. sparsity: λ, ≥ 0; with 0 the gates train without a penalty.
    """

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        super().__init__(model, regu_weight=0)
        self.sparsity = sparsity
        self._layers = svd_layers(model)
        self._initial = sum(layer.r for layer in self._layers.values())

    @property
    def ranks(self) -> Ranks:
        """The gates; a rank is live if its gate is not 0."""
        return Ranks.of_layers(self._layers, self._initial)

    def before_step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Also notes the gates' learning rate of this step."""
        super().before_step(*optimizers)
        gates = {id(layer.lora_E) for layer in self._layers.values()}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._rate = next(group["lr"] for group in groups if gates & set(map(id, group["params"])))

    @torch.no_grad()
    def after_step(self) -> None:
        """Also takes the proximal step."""
        super().after_step()
        for layer in self._layers.values():
            layer.lora_E.copy_(F.softshrink(layer.lora_E, self.sparsity * self._rate))
