"""How far an update has come: its norm, its singular values, and how orthonormal its factors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralib.fused import without_autocast
from loralib.layers import LoRALayer
from loralib.model import lora_layers, svd_layers
from loralib.recipes.exact_factors import deviations


@dataclass(frozen=True)
class UpdateStatistics:
    """Of one model at one moment.

    Attributes:
        delta_norms: module name → ‖ΔW‖_F, s included.
        largest_value, smallest_value: of |e| over all layers, without the pruned ones (e = 0); None where none is left.
        deviation: the largest ‖Gram − I‖_F of any factor, on its smaller side; None without singular values.
    """

    delta_norms: dict[str, float]
    largest_value: float | None
    smallest_value: float | None
    deviation: float | None


@torch.no_grad()
def update_statistics(model: nn.Module) -> UpdateStatistics:
    """‖ΔW‖_F of every layer, the range of |e|, and how far the factors are from orthonormal.

    ‖ΔW‖² = tr(C A₀A₀ᵀ Cᵀ B₀ᵀB₀) for ΔW = B₀ C A₀, from k×k Grams: the dense ΔW is never formed.
    """
    layers = svd_layers(model)
    largest = smallest = deviation = None
    if layers:
        values = torch.cat([layer.lora_E.detach().abs().cpu() for layer in layers.values()])
        live = values[values > 0]
        largest, smallest = (float(live.max()), float(live.min())) if len(live) else (None, None)
        deviation = float(deviations(model).max())
    return UpdateStatistics(delta_norms(model), largest, smallest, deviation)


@torch.no_grad()
def delta_norms(model: nn.Module) -> dict[str, float]:
    """Module name → ‖ΔW‖_F of every low-rank layer."""
    layers = lora_layers(model)
    squares = {name: _squared_norm(layer) for name, layer in layers.items() if layer.r > 0}
    if not squares:
        return dict.fromkeys(layers, 0.0)
    one_device = next(iter(squares.values())).device  # layers may lie on several; one wait for each
    norms = torch.stack([square.to(one_device) for square in squares.values()]).clamp_(min=0).sqrt().tolist()
    return dict.fromkeys(layers, 0.0) | dict(zip(squares, norms, strict=True))


def _squared_norm(layer: LoRALayer) -> Tensor:
    b, core, a = layer.lora_B[0], layer.folded_core(), layer.lora_A[0]
    with without_autocast(b.device.type):
        return (core @ (a @ a.T) @ core.T * (b.T @ b)).sum()
