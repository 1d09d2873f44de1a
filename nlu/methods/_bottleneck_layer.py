"""The layer of the Houlsby and Pfeiffer adapters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 1e-2  # Houlsby et al., section 3.6: near the identity at the start; robust below 1e-2


class BottleneckAdapter(nn.Module):
    """x + up(activation(down(x))) over the last dimension; near the identity at the start.

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

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) → (…, d) in x's dtype; the bottleneck is computed in the adapter's dtype."""
        # Not called as modules: cast_frozen would cast the output of each to the dtype of the frozen weights.
        narrow = F.linear(x.to(self.down.weight.dtype), self.down.weight, self.down.bias)
        return x + F.linear(self.activation(narrow), self.up.weight, self.up.bias).to(x.dtype)
