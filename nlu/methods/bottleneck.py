"""Bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751, section 2.1) and Pfeiffer et al. 2021 (arXiv 2005.00247).

An adapter is x + up(activation(down(x))), two linear layers with biases around a bottleneck of m features:
2·d·m + m + d parameters at hidden size d. Houlsby puts one after the attention's output projection and one after the
feed-forward network's; each comes after the projection's dropout, before the residual is added and the sum normalised.
Pfeiffer has only the latter. It reads the normalised sum and is added to the sum z, which is then normalised again:
LN(z + up(activation(down(LN(z))))). The layer norms stay frozen: the parameter counts of the published DeBERTaV3-base
tables (arXiv 2303.10512, Table 1) are those of the adapters alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from nlu.arguments import AT_LEAST_1, Flag
from nlu.errors import UsageError
from nlu.methods.method import Method, train_only

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training
    from nlu.methods._bottleneck_layer import BottleneckAdapter

PLACES = {"hadapter": ("attention.output", "layer.output"), "padapter": ("layer.output",)}
ACTIVATIONS = {"hadapter": "GELU", "padapter": "ReLU"}


def add_adapters(model: nn.Module, kind: str, size: int) -> list[BottleneckAdapter]:
    """Insert trainable adapters into an encoder in place; the other parameters' ``requires_grad`` is unchanged.

    Args:
        model: DeBERTa-v2/v3, RoBERTa, BERT, ELECTRA, or any model whose blocks have parts of the same names.
        kind: ``"hadapter"`` or ``"padapter"``. size: size of the bottleneck.

    Returns:
        The adapters, in the model's order.

    Raises:
        UsageError: if the model has no such blocks; it is then unchanged.
    """
    from torch import nn

    from loralib import match_modules
    from nlu.methods._bottleneck_layer import AdaptedLayerNorm, BottleneckAdapter

    host, host_type = ("dropout", nn.Module) if kind == "hadapter" else ("LayerNorm", nn.LayerNorm)
    activation = getattr(nn, ACTIVATIONS[kind])
    try:
        projections = match_modules(model, PLACES[kind])
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in projections]
        if not all(isinstance(getattr(block, host, None), host_type) for block in blocks):
            raise ValueError(f"{projections[0]} has no {host} beside it, where an adapter could be put")
        adapters = [BottleneckAdapter(block.dense.out_features, size, activation) for block in blocks]
    except ValueError as error:
        raise UsageError(f"method {kind}: {error}") from None
    for block, adapter in zip(blocks, adapters, strict=True):
        adapter.to(block.dense.weight.device)
        if kind == "hadapter":
            block.dropout = nn.Sequential(OrderedDict(dropout=block.dropout, adapter=adapter))
        else:
            block.LayerNorm = AdaptedLayerNorm(block.LayerNorm, adapter)
    return adapters


ADAPTER_SIZE = Flag("adapter_size", int, 16, "Bottleneck size of the Houlsby and Pfeiffer adapters.", AT_LEAST_1)


def _apply(model: nn.Module, args: Any, total_steps: int) -> Training:
    adapters = add_adapters(model, args.method, args.adapter_size)
    return train_only(model, [p for adapter in adapters for p in adapter.parameters()])


def _method(name: str, display: str, order: int) -> Method:
    return Method(
        name, display, order, _apply, (ADAPTER_SIZE,), card=lambda args: {"adapter_size": args.adapter_size}
    )  # fmt: skip


METHODS = (_method("hadapter", "Houlsby adapters", 30), _method("padapter", "Pfeiffer adapters", 40))
