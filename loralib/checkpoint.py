"""What of a model is the adapter: the state that is saved, loaded and counted."""

from __future__ import annotations

from torch import Tensor, nn

from loralib.injection import check_bias
from loralib.layers import lora_layers


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The adapter's tensors by name, each parameter once: a factor that layers share has its first layer's name.

    Load it back with ``model.load_state_dict(state, strict=False)`` into a model injected alike.

    Args:
        bias: biases to add: ``"none"``, ``"all"``, or ``"lora_only"``, those of the low-rank layers.

    Raises:
        ValueError: for another ``bias``.
    """
    check_bias(bias)
    layers = lora_layers(model)
    wanted = {id(parameter) for layer in layers.values() for parameter in layer.lora_parameters()}
    if bias == "lora_only":
        wanted |= {id(layer.bias) for layer in layers.values() if layer.bias is not None}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()  # gives a shared parameter once
        if id(parameter) in wanted or (bias == "all" and name.split(".")[-1] == "bias")
    }
