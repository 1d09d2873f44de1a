"""Statistics of an update: its norm, its singular values, and how close its factors are to orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralib.fused import without_autocast
from loralib.model import lora_layers, svd_layers
from loralib.recipes.exact_factors import deviations, svd_factors
from loralib.update import LowRankUpdate


@dataclass(frozen=True)
class UpdateStatistics:
    """The updates of one model at one moment.

    Attributes:
        delta_norms: module name → ‖ΔW‖_F, s included.
        largest_value, smallest_value: of |e| over all layers, without pruned ones (e = 0); None if there are no others.
        deviation: the largest ‖Gram − I‖_F of any factor, on its smaller side; None without singular values.
    """

    delta_norms: dict[str, float]
    largest_value: float | None
    smallest_value: float | None
    deviation: float | None


@torch.no_grad()
def update_statistics(model: nn.Module) -> UpdateStatistics:
    """‖ΔW‖_F of every layer, the range of |e|, and how far the factors are from orthonormal.

    ‖ΔW‖² = tr(A Aᵀ Bᵀ B) for ΔW = B A, from two Grams of the narrowest width. The dense ΔW is never formed.
    """
    layers = svd_layers(model)
    largest = smallest = deviation = None
    if layers:
        values = torch.cat([layer.lora_E.detach().abs().cpu() for layer in layers.values()])
        live = values[values > 0]
        largest, smallest = (float(live.max()), float(live.min())) if len(live) else (None, None)
        deviation = float(deviations(svd_factors(model)).max())
    squares = {name: _squared_norm(layer).cpu() for name, layer in lora_layers(model).items()}
    norms = {name: float(square.clamp(min=0).sqrt()) for name, square in squares.items()}
    return UpdateStatistics(norms, largest, smallest, deviation)


def _squared_norm(layer: LowRankUpdate) -> Tensor:
    if layer.r == 0:
        return torch.zeros(())
    a, b = layer.folded()
    with without_autocast(a.device.type):
        return ((a @ a.T) * (b.T @ b)).sum()
