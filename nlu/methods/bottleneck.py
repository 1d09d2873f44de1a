"""Bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751, section 2.1) and Pfeiffer et al. 2021 (arXiv 2005.00247).

An adapter is x + up(activation(down(x))), two linear layers with biases around a bottleneck of m features:
2·d·m + m + d parameters at hidden size d. Houlsby puts one behind the attention's output projection and one behind the
feed-forward network's, Pfeiffer only the latter; each stands after the projection's dropout and before the residual
is added and the sum normalised. The layer norms stay frozen: the parameter counts of the published DeBERTaV3-base
tables (arXiv 2303.10512, Table 1) are those of the adapters alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loralib import match_modules
from nlu.errors import UsageError
from nlu.methods.low_rank import at_least_1
from nlu.methods.method import AppliedMethod, Flag, Method, train_only

PLACES = {"hadapter": ("attention.output", "layer.output"), "padapter": ("layer.output",)}
ACTIVATIONS = {"hadapter": nn.GELU, "padapter": nn.ReLU}
INIT_STD = 1e-2  # Houlsby et al., section 3.6: near the identity at the start; robust below 1e-2


class BottleneckAdapter(nn.Module):
    """x + up(activation(down(x))) over the last dimension; near the identity at the start.

    Args:
        features: size d of the last dimension. size: the bottleneck m. activation: between the two layers.
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
        """x (…, d) → (…, d), in x's dtype, the bottleneck computed in the adapter's."""
        # Not called as modules, of which each would have its output cast to the dtype of the frozen weights.
        narrow = F.linear(x.to(self.down.weight.dtype), self.down.weight, self.down.bias)
        return x + F.linear(self.activation(narrow), self.up.weight, self.up.bias).to(x.dtype)


def add_adapters(model: nn.Module, kind: str, size: int) -> list[BottleneckAdapter]:
    """Insert trainable adapters into an encoder in place; what else trains is not touched.

    Args:
        model: DeBERTa-v2/v3, RoBERTa, BERT, ELECTRA, or any model whose blocks name their parts alike.
        kind: ``"hadapter"`` or ``"padapter"``. size: the bottleneck.

    Returns:
        The adapters, in the model's order of places.

    Raises:
        UsageError: for a model without such blocks, which is unchanged then.
    """
    try:
        projections = match_modules(model, PLACES[kind])
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in projections]
        if not all(isinstance(getattr(block, "dropout", None), nn.Module) for block in blocks):
            raise ValueError(f"{projections[0]} has no dropout beside it to put the adapter behind")
        adapters = [BottleneckAdapter(block.dense.out_features, size, ACTIVATIONS[kind]) for block in blocks]
    except ValueError as error:
        raise UsageError(f"method {kind}: {error}") from None
    for block, adapter in zip(blocks, adapters, strict=True):
        adapter.to(block.dense.weight.device)
        block.dropout = nn.Sequential(OrderedDict(dropout=block.dropout, adapter=adapter))
    return adapters


ADAPTER_SIZE = Flag(
    "adapter_size", int, 16, "Bottleneck of the Houlsby and Pfeiffer adapters.",
    at_least_1, "must be at least 1",
)  # fmt: skip


def _apply(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    adapters = add_adapters(model, args.method, args.adapter_size)
    train_only(model, [p for adapter in adapters for p in adapter.parameters()])
    return AppliedMethod(model)


def _method(name: str, display: str, order: int) -> Method:
    return Method(
        name, display, order, _apply, (ADAPTER_SIZE,), card=lambda args: {},
        rebuild=lambda model, args, card: add_adapters(model, args.method, args.adapter_size),
    )  # fmt: skip


METHODS = (_method("hadapter", "Houlsby adapters", 30), _method("padapter", "Pfeiffer adapters", 40))
