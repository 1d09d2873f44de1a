"""The layers of the Houlsby and Pfeiffer adapters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 1e-2  # Houlsby et al., section 3.6: near the identity at the start; robust below 1e-2


class BottleneckAdapter(nn.Module):
    """x + up(activation(down(x))) over the last dimension, or another residual in place of the first x.

    The second term is near zero at the start.

    Args:
        features: size d of the last dimension. size: size m of the bottleneck. activation: class of the activation.
    """

    def __init__(self, features: int, size: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.down = nn.Linear(features, size)
        self.activation = activation()
        self.up = nn.Linear(size, features)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (…, d) → (…, d) in the residual's dtype; the bottleneck is computed in the adapter's dtype."""
        residual = x if residual is None else residual
        # Not called as modules: cast_frozen would cast the output of each to the dtype of the frozen weights.
        narrow = F.linear(x.to(self.down.weight.dtype), self.down.weight, self.down.bias)
        return residual + F.linear(self.activation(narrow), self.up.weight, self.up.bias).to(residual.dtype)


class AdaptedLayerNorm(nn.LayerNorm):
    """LN(z + up(activation(down(LN(z))))) with the parameters of a given LN, which keep their names."""

    def __init__(self, norm: nn.LayerNorm, adapter: BottleneckAdapter) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.adapter = adapter

    def forward(self, z: Tensor) -> Tensor:
        """z (…, d) → (…, d)."""
        return super().forward(self.adapter(super().forward(z), residual=z))
