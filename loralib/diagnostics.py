"""How far an update has come: its norm, its singular values, and how orthonormal its factors are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralib.exact_factors import deviations, svd_layers
from loralib.layers import LoRALayer, lora_layers


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
    """Norms from k×k Grams, ‖ΔW‖² = tr(C A₀A₀ᵀ Cᵀ B₀ᵀB₀) with ΔW = B₀ C A₀: the dense ΔW is never formed."""
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
    """Module name → ‖ΔW‖_F of every low-rank layer; layers of one shape in one batched product."""
    layers = lora_layers(model)
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        if layer.r > 0:
            factors = layer.lora_parameters()
            groups[(factors[0].device, factors[0].dtype, *(f.shape for f in factors))].append(name)
    found = dict.fromkeys(layers, 0.0)
    for names in groups.values():
        found |= dict(zip(names, _norms([layers[name] for name in names]).tolist(), strict=True))
    return found


def _norms(layers: list[LoRALayer]) -> Tensor:
    b = torch.stack([layer.lora_B[0].detach() for layer in layers])
    a = torch.stack([layer.lora_A[0].detach() for layer in layers])
    core = torch.stack([layer.folded_core().detach() for layer in layers])
    squares = (core @ (a @ a.mT) @ core.mT * (b.mT @ b)).sum((1, 2))
    return squares.clamp_(min=0).sqrt()
