"""How the factors of a model's layers and the tensors of an adapter's folder belong together.

A layer's factors are stored at its live singular values; a factor that layers share is stored once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import signature

import torch
from torch import Tensor, nn

from loralib.adapter_config import AdapterConfig, LayerGroup
from loralib.injection import KINDS, check_replaceable, is_linear
from loralib.layers import LoRALayer
from loralib.model import lora_layers
from loralib.stored_weight import frozen_shape

# ---- from layers to tensors -----------------------------------------------------------------------------------------


def live_singular_values(layers: Mapping[str, LoRALayer]) -> dict[str, list[int]]:
    """Module name -> indices of the singular values that are not 0; of all of them where every one is 0."""
    live = {
        name: list(range(layer.r)) if layer.lora_E is None else layer.lora_E.nonzero().flatten().tolist()
        for name, layer in layers.items()
    }
    if any(kept for name, kept in live.items() if layers[name].lora_E is not None):
        return live
    return {name: list(range(layer.r)) for name, layer in layers.items()}


def factor_names(layer_name: str, layer: LoRALayer) -> list[str]:
    """Names of ``layer.lora_parameters()``, in that order."""
    own = {id(parameter): name for name, parameter in layer.named_parameters()}
    prefix = f"{layer_name}." if layer_name else ""
    return [prefix + own[id(parameter)] for parameter in layer.lora_parameters()]


def stored_factors(
    layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store by name, each parameter once, and name -> stored name for the others."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for layer_name in sorted(layers, key=lambda name: not live[name]):  # those of which something is stored come first
        layer, kept = layers[layer_name], live[layer_name]
        names, parameters = factor_names(layer_name, layer), layer.lora_parameters()
        for name, parameter, values in zip(names, parameters, layer.select(kept), strict=True):
            owner = owners.setdefault(id(parameter), name) if kept else owners.get(id(parameter))
            if owner == name:
                tensors[name] = values
            elif owner is not None:  # what a layer shares stays shared, also where nothing else of it is stored
                tied[name] = owner
    return tensors, tied


def grouped(layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]]) -> list[LayerGroup]:
    groups: dict[tuple, LayerGroup] = {}
    for name, layer in layers.items():
        dropout = layer.lora_dropout.p
        key = (layer.kind, layer.initial_r, layer.widths, layer.lora_alpha, dropout, layer.init, layer.fan_in_fan_out)
        group = groups.setdefault(key, LayerGroup(key[0], key[1], list(key[2]), key[3], key[4], key[5], key[6], {}))
        group.rank_pattern[name] = "".join("1" if i in live[name] else "0" for i in range(layer.r))
    return list(groups.values())


# ---- from tensors to layers -----------------------------------------------------------------------------------------


def own_layers(model: nn.Module, config: AdapterConfig) -> dict[str, LoRALayer]:
    """The model's low-rank layers.

    Raises:
        ValueError: unless they are in the adapter's places, of its rank and widths, and share no more than the
            adapter's.
    """
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model holds a merged adapter: call unmerge_adapter() first")
    saved = config.modules
    if set(saved) != set(layers):
        odd = min(set(saved) ^ set(layers))
        raise ValueError(f"the adapter adapts other modules than the model (see {odd}): adapt the same modules")
    shared_by: dict[int, str] = {}  # the model's factors -> the stored tensor for them
    for name, layer in layers.items():
        group = saved[name]
        wanted = group.kind == "lora", group.r, tuple(group.widths)
        has = layer.lora_E is None, layer.initial_r, layer.widths
        if wanted != has or len(group.rank_pattern[name]) > layer.r:
            raise ValueError(
                f"the adapter has {_settings(*wanted)} in {name}, the model {_settings(*has)}, {layer.r} of them left: "
                "give the same method, rank and widths, or load it into the plain base"
            )
        for factor, parameter in zip(factor_names(name, layer), layer.lora_parameters(), strict=True):
            stored = config.tied.get(factor, factor)
            if group.live(name) and shared_by.setdefault(id(parameter), stored) != stored:
                raise ValueError("the model's layers share outer factors, the adapter's do not: leave share_outer out")
    return layers


def _settings(plain: bool, r: int, widths: Collection[int]) -> str:
    return f"{'LoRA' if plain else 'singular values'} of rank {r}" + (f" and widths {list(widths)}" if widths else "")


def new_layers(model: nn.Module, config: AdapterConfig) -> dict[str, LoRALayer]:
    """Layers over the model's weights with the adapter's rank, widths and sharing; the model keeps its own modules."""
    modules = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    layers: dict[str, LoRALayer] = {}
    for name, group in config.modules.items():
        if name not in modules:
            raise ValueError(f"the model has no linear layer {name}: {architectures(model, config)}")
        check_replaceable(name, modules[name])
        most, flags = max(1024, *frozen_shape(modules[name])), group.rank_pattern[name]
        if max(group.r, *group.widths, 0) > most or len(flags) > group.r:  # a stranger may ask for endless memory
            raise ValueError(f"the adapter's rank or width of {name} is beyond {most}, or its pattern beyond r")
        options = {"k": next(iter(group.widths), None), "widths": group.widths, "init": group.init}
        options = {option: options[option] for option in signature(KINDS[group.kind].scales).parameters}
        layer = KINDS[group.kind].from_linear(modules[name], group.r, group.lora_alpha, group.lora_dropout, **options)
        layer.keep_singular_values(range(len(flags)))
        layers[name] = layer
    outer = {  # name -> the list that holds the factor, and its place there
        f"{name}.lora_{side}.{i}": (factors, i)
        for name, layer in layers.items()
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B))
        for i in range(len(layer.widths) if layer.r else 0)
    }
    for alias, stored in config.tied.items():
        (own, i), (factors, j) = (outer.get(name, (None, 0)) for name in (alias, stored))
        if own is None or factors is None or own[i].shape != factors[j].shape:
            raise ValueError(f"the adapter's configuration ties {alias} to {stored}, which does not fit")
        own[i] = factors[j]
    return layers


def architecture_of(model: nn.Module) -> str:
    """The name of the model's class; ``fully_shard`` has put a class of its own before it."""
    return next(c.__name__ for c in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in c.__mro__))


def architectures(model: nn.Module, config: AdapterConfig) -> str:
    if config.architecture == architecture_of(model):
        return "the adapter's base has more layers, or its method adds modules, which this model lacks"
    return f"the adapter was made for a {config.architecture}, this is a {architecture_of(model)}"


def stored_shapes(layers: Mapping[str, LoRALayer], config: AdapterConfig) -> dict[str, torch.Size]:
    """Name -> shape of every factor that the adapter's file must hold, by the layers' own selection."""
    shapes: dict[str, torch.Size] = {}
    for name, group in config.modules.items():
        live = group.live(name)
        values = layers[name].select(live) if live else []
        for factor, value in zip(factor_names(name, layers[name]) if live else [], values, strict=True):
            stored = config.tied.get(factor, factor)
            if shapes.setdefault(stored, value.shape) != value.shape:
                raise ValueError(f"the adapter's configuration ties {factor} to {stored}, which does not fit")
    return shapes


@torch.no_grad()
def write_factors(layers: Mapping[str, LoRALayer], config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Give layers the adapter's settings and factors; what was pruned is zero, its factors too."""
    for layer in layers.values():
        for parameter in layer.lora_parameters():
            parameter.zero_()
    for name, group in config.modules.items():
        layer, live = layers[name], group.live(name)
        layer.lora_alpha, layer.lora_dropout.p, layer.init = group.lora_alpha, group.lora_dropout, group.init
        if live:
            layer.scatter(live, read_factors(name, layer, config, tensors))


def read_factors(name: str, layer: LoRALayer, config: AdapterConfig, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The stored values of ``layer.lora_parameters()`` at the live singular values."""
    return [tensors[config.tied.get(factor, factor)] for factor in factor_names(name, layer)]
