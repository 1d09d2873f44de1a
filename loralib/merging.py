"""Merge an adapter into the weights of its base, reversibly (for speed) or permanently."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from loralib.injection import put_in_place
from loralib.layers import LoRALayer
from loralib.model import own_layers, unwrapped


def merge_adapter(model: nn.Module) -> None:
    """Put W + ΔW into the weight of every low-rank layer. A second call changes nothing.

    The state dict still holds W and the factors: use :func:`merge_and_unload` for a model to save.

    Raises:
        ValueError: if a weight is quantised, sharded, computed by a hook or tied to another module's, or if peft holds
            the layers. Nothing is merged then.
    """
    layers = own_layers(model)
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in unwrapped(model).named_modules():
        for own, parameter in module.named_parameters(name, recurse=False):
            users[id(parameter)].append(own)
    for name, layer in layers.items():
        try:
            if len(tied := users[id(layer.weight)]) > 1:
                raise ValueError(f"{' is tied to '.join(sorted(tied))}, which a merge would change too")
            layer.merge()
        except ValueError as error:
            for merged in layers.values():
                merged.unmerge()
            raise ValueError(f"{name} cannot be merged: {error}") from None


def unmerge_adapter(model: nn.Module) -> None:
    """Undo :func:`merge_adapter` bit for bit."""
    for layer in own_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the adapter and replace the low-rank layers with plain linear layers that hold W + ΔW, in place.

    Save the adapter first: afterwards ``save_adapter`` finds only the head. Raises as :func:`merge_adapter`.

    Returns:
        The :func:`unwrapped <loralib.model.unwrapped>` model, which other tools can save and load.
    """
    merge_adapter(model)
    model = unwrapped(model)
    plain = {id(layer): _plain_linear(layer) for layer in own_layers(model).values()}
    put_in_place(model, plain)
    return plain.get(id(model), model)


def _plain_linear(layer: LoRALayer) -> nn.Module:
    """A linear layer of the class that ``layer`` was made from, with the same weight and bias parameters."""
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
