"""SoRA's gates inside the training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from loralib.model import svd_layers


class ProximalGates(TrainerCallback):
    """Takes the proximal step on every gate after each optimiser step, and counts the live ranks.

    There is no target budget: ``target_total_rank`` is None.

    Args:
        model: the e of its low-rank layers are the gates. sparsity: λ, ≥ 0; with 0 the gates train without a penalty.
    """

    target_total_rank = None

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        self.sparsity = sparsity
        self._layers = svd_layers(model)
        self.initial_total_rank = sum(layer.r for layer in self._layers.values())

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Module name → which of its r ranks are live (gate ≠ 0)."""
        return {name: (layer.lora_E != 0).tolist() for name, layer in self._layers.items()}

    @property
    def live_rank(self) -> int:
        """Live ranks over all layers."""
        return sum(map(sum, self.rank_pattern.values()))

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Called between ``optimizer.step()`` and the schedule's step: the gates' rate is the one just used."""
        gates = [layer.lora_E for layer in self._layers.values()]
        own = set(map(id, gates))
        rate = next(group["lr"] for group in optimizer.param_groups if own & set(map(id, group["params"])))
        for gate in gates:
            gate.copy_(F.softshrink(gate, self.sparsity * rate))
