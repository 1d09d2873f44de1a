"""Find the low-rank layers and the trainable parameters of a model, and drop pruned singular values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from loralib.layers import LoRALayer
from loralib.update import LowRankUpdate

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, data-parallel modules, ``AveragedModel``, activation checkpoints and
    Lightning Fabric's module, whose prefixes must not appear in saved names."""
    inside = ("_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
    names = ("module",) if isinstance(model, _WRAPPERS) else inside
    inner = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    return model if inner is None else unwrapped(inner)


def lora_layers(model: nn.Module) -> dict[str, LowRankUpdate]:
    """All low-rank layers of the :func:`unwrapped` model by module name, found by type; in peft's wrappers, the updates
    beside the frozen layers."""
    return {name: module for name, module in unwrapped(model).named_modules() if isinstance(module, LowRankUpdate)}


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    """The factors of all low-rank layers. One that layers share is listed once."""
    return list(dict.fromkeys(factor for layer in lora_layers(model).values() for factor in layer.lora_parameters()))


def own_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """:func:`lora_layers` of a model in which peft does not hold them. Raises ValueError if it does: then it saves,
    merges and shrinks them."""
    found = lora_layers(model)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, LoRALayer)}
    if len(layers) < len(found):
        raise ValueError("peft holds the low-rank layers: use the PeftModel's methods")
    return layers


def svd_layers(model: nn.Module) -> dict[str, LowRankUpdate]:
    """The low-rank layers that have singular values, by module name; ``compact`` may leave a layer without any."""
    return {name: layer for name, layer in lora_layers(model).items() if layer.lora_E is not None}


def trained_svd_layers(model: nn.Module, purpose: str) -> dict[str, LowRankUpdate]:
    """The low-rank layers whose singular values are trainable. A frozen adapter is neither pruned nor regularised.

    Raises:
        ValueError: if there is none; the message names the ``purpose``.
    """
    found = {name: layer for name, layer in svd_layers(model).items() if layer.lora_E.requires_grad}
    if not found:
        advice = "unfreeze their lora_E" if svd_layers(model) else "inject such layers; for LoRA give regu_weight=0"
        raise ValueError(f"no trainable layers with singular values (AdaLoRA, LoRA²) to {purpose}: {advice}")
    return found


def compact(model: nn.Module) -> dict[str, int]:
    """Drop the pruned singular values, those that are exactly 0, of all layers in place. The outputs stay the same.

    A model whose singular values are all 0 counts as untrained and keeps them all. Plain LoRA keeps its rank. A layer
    with no singular value left has no factors at all. The shrunk factors are new parameters: create the optimiser
    afterwards. A pruning that has begun cannot go on with them.

    Returns:
        Module name -> new rank.

    Raises:
        ValueError: if peft holds the layers.
    """
    return drop_pruned(own_layers(model))


def drop_pruned(layers: Mapping[str, LowRankUpdate]) -> dict[str, int]:
    """:func:`compact` for these layers alone."""
    for name, kept in live_ranks(layers).items():
        layers[name].keep_singular_values(kept)
    return {name: layer.r for name, layer in layers.items()}


def live_singular_values(values: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """For each tensor of singular values by name, which of them are live: not 0. If all of a model's are 0, as before
    the training, none was pruned, and all are live."""
    if not values:
        return {}
    flat = [value.detach().flatten() for value in values.values()]
    live = torch.cat([each.to(flat[0].device) for each in flat]) != 0
    flags = iter((live | ~live.any()).tolist())  # one wait for the device
    return {name: [next(flags) for _ in each] for name, each in zip(values, flat, strict=True)}


def live_ranks(layers: Mapping[str, LowRankUpdate]) -> dict[str, list[int]]:
    """Module name -> indices of the :func:`live_singular_values`; those of all ranks of plain LoRA."""
    flags = live_singular_values({name: layer.lora_E for name, layer in layers.items() if layer.lora_E is not None})
    return {n: [i for i in range(layer.r) if n not in flags or flags[n][i]] for n, layer in layers.items()}


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Make the factors of all low-rank layers trainable, and freeze everything else. The name is that of Microsoft's
    ``loralib``; :func:`loralib.inject` freezes the base by itself."""
    model.requires_grad_(False)
    for factor in factors_of(model):
        factor.requires_grad_(True)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors of all low-rank layers by their (first) name in the :func:`unwrapped` model. The name is that of
    Microsoft's ``loralib``; :func:`loralib.save_adapter` writes a file, with the head."""
    factors = set(map(id, factors_of(model)))
    return {name: p.detach() for name, p in unwrapped(model).named_parameters() if id(p) in factors}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All factors, frozen or not (the base has none of them), and all trainable parameters of the :func:`unwrapped`
    model, each under one name; and the saved buffers that training changes: running statistics, and the buffers of
    modules that own such a parameter. The weight of a merged layer is the one without the update, as in its state
    dict."""
    model = unwrapped(model)
    state, factors = model.state_dict(keep_vars=True), set(map(id, factors_of(model)))
    named = model.named_parameters()
    found = {name: state.get(name, p) for name, p in named if p.requires_grad or id(p) in factors}
    owners = {name.rpartition(".")[0] for name in found}
    owners |= {name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)}
    return found | {n: b for n, b in model.named_buffers() if n in state and n.rpartition(".")[0] in owners}


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """:func:`trained_tensors` without the low-rank factors."""
    factors = set(map(id, factors_of(model)))
    return {name: tensor for name, tensor in trained_tensors(model).items() if id(tensor) not in factors}
