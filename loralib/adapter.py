"""A model's adapter: save it, load it, start a training from it, merge it, and drop pruned singular values.

Every use of a saved adapter goes through the same steps: :func:`read_adapter` checks the folder, :func:`check_adapter`
or :func:`check_start` compares it with the model, and only then the model is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapter_checks import (
    architecture_of,
    base_fingerprint,
    check_adapter,
    check_base,
    check_start,
    factor_names,
    refuse_merging,
)
from loralib.adapter_files import VERSION, AdapterConfig, LayerGroup, read_adapter, write_adapter
from loralib.injection import KINDS, refuse_compiled, replace_modules
from loralib.interop.peft_heads import lost_in_peft
from loralib.layers import LoRALayer
from loralib.model import (
    check_shared,
    factors_of,
    head_tensors,
    keep_flags,
    layers_outside_peft,
    lora_layers,
    refuse_data_parallel,
    refuse_sharded_factors,
    unwrapped,
)

# What torch.compile(module) and torch's checkpoint_wrapper put into the names of the modules inside.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})

# ---- live singular values -------------------------------------------------------------------------------------------


def compact(model: nn.Module) -> dict[str, int]:
    """Drop the pruned singular values of all layers in place. The outputs and the scaling stay the same.

    The weights alone say what is pruned: a singular value e_i that is exactly 0. If every e of the model is 0, the
    model is untrained and keeps all. Plain LoRA has no singular values and keeps its rank.

    Each layer then has its own rank; a layer with none left has no factors at all. The shrunk factors are new
    parameters: make the optimiser and the regulariser afterwards. The rank allocator refuses a model
    whose layers differ in rank.

    Returns:
        Module name -> rank it has now.

    Raises:
        ValueError: if peft holds the layers, and for a model in DistributedDataParallel.
    """
    layers = layers_outside_peft(model, "base_model.compact()")
    refuse_data_parallel(model, "compact the model")
    for name, kept in live_singular_values(layers).items():
        layers[name].keep_singular_values(kept)
    return {name: layer.r for name, layer in layers.items()}


def live_singular_values(layers: dict[str, LoRALayer]) -> dict[str, list[int]]:
    """Module name -> indices of the singular values that are not 0; of all of them where every one is 0."""
    live = {
        name: list(range(layer.r)) if layer.lora_E is None else layer.lora_E.nonzero().flatten().tolist()
        for name, layer in layers.items()
    }
    if any(kept for name, kept in live.items() if layers[name].lora_E is not None):
        return live
    return {name: list(range(layer.r)) for name, layer in layers.items()}


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    compact: bool = True,
    save_tokenizer: Callable[[Path], Any] | None = None,
) -> Path:
    """Write the adapter: the factors of all low-rank layers and every other trainable parameter (the head).

    The model is not changed, and the adapter holds its weights as they are, between two maskings too. The model need
    not have low-rank layers: the adapter then holds the trainable parameters. Of a compiled, data-parallel or averaged
    model it is the adapter of the model inside. A kill leaves the old adapter of the folder or the new one.

    Args:
        folder: new, empty, or an adapter's, which is replaced.
        base_model, base_revision: name and revision of the base on the hub, not a path of this disk; only recorded.
        card: values of JSON, recorded under "card"; task, method, metric, score and notes also show in README.md.
        compact: leave out the singular values that are exactly 0, see :func:`loralib.compact`.
        save_tokenizer: such as ``tokenizer.save_pretrained``: writes the tokenizer's files into the folder too.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to save, peft holds the layers, the factors are on the meta device, sharded or
            no longer shared as they were made to be, a module inside the model is wrapped (compiled, checkpointed), the
            folder holds other files, or the labels are not numbered from 0.
    """
    model = unwrapped(model)
    layers = layers_outside_peft(model, "save_pretrained()")
    if any(parameter.is_meta for parameter in factors_of(model)):
        raise ValueError("the factors are on the meta device and have no values: load the weights first")
    refuse_sharded_factors(model)
    check_shared(model)
    live = live_singular_values(layers) if compact else {name: list(range(m.r)) for name, m in layers.items()}
    factors, tied = _stored_factors(layers, live)
    head = head_tensors(model)
    if not factors and not head:
        raise ValueError("nothing to save: the model has no low-rank layer and no trainable parameter")
    for name in (name for name in (*layers, *head) if not _INNER_WRAPPERS.isdisjoint(name.split("."))):
        raise ValueError(
            f"{name} lies in a wrapped module, and no plain base has that name: compile with module.compile(), which "
            "keeps the names, and take other wrappers off first"
        )
    groups = _group(layers, live)
    kinds = {group.kind for group in groups}
    lacks = lost_in_peft(model, architecture_of(model), layers, head) if layers else None
    config = AdapterConfig(
        kind="parameters" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed",
        groups=groups,
        tied=tied,
        head=sorted(head),
        architecture=architecture_of(model),
        base_config=_head_config(model),
        base_model=base_model,
        base_revision=base_revision,
        base_fingerprint=base_fingerprint(model, head),
        card=dict(card or {}) | ({"peft_lacks": lacks} if lacks else {}),
        library_version=VERSION,
        weights_sha256="",  # write_adapter fills it in
    )
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in {**factors, **head}.items()}
    write_adapter(Path(folder), config, stored, save_tokenizer)
    return Path(folder)


def _head_config(model: nn.Module) -> dict[str, Any]:
    """Labels and problem type in a transformers model's configuration; empty for any other model."""
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None)
    if not isinstance(labels, Mapping):
        return {}
    return {
        "id2label": {str(number): str(name) for number, name in labels.items()},
        "problem_type": getattr(config, "problem_type", None),
    }


def _stored_factors(
    layers: dict[str, LoRALayer], live: dict[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store by name, each parameter once, and name -> stored name for the others."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for layer_name, layer in layers.items():
        if not live[layer_name]:
            continue
        names, parameters = factor_names(layer_name, layer), layer.lora_parameters()
        for name, parameter, values in zip(names, parameters, layer.select(live[layer_name]), strict=True):
            if owners.setdefault(id(parameter), name) != name:
                tied[name] = owners[id(parameter)]
            else:
                tensors[name] = values
    for layer_name, layer in layers.items():
        if not live[layer_name]:  # nothing of it is stored, but what it shares stays shared
            for name, parameter in zip(factor_names(layer_name, layer), layer.lora_parameters(), strict=True):
                if id(parameter) in owners:
                    tied[name] = owners[id(parameter)]
    return tensors, tied


def _group(layers: dict[str, LoRALayer], live: dict[str, list[int]]) -> list[LayerGroup]:
    groups: dict[tuple, LayerGroup] = {}
    for name, layer in layers.items():
        dropout = layer.lora_dropout.p
        key = (layer.kind, layer.initial_r, layer.widths, layer.lora_alpha, dropout, layer.init, layer.fan_in_fan_out)
        group = groups.setdefault(key, LayerGroup(key[0], key[1], list(key[2]), key[3], key[4], key[5], key[6], {}))
        group.rank_pattern[name] = "".join("1" if i in live[name] else "0" for i in range(layer.r))
    return list(groups.values())


# ---- loading --------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    compact: bool = False,
    allow_other_base: bool = False,
) -> AdapterConfig:
    """Put a saved adapter on ``model`` in place. The logits are then bit for bit those of the model that was saved.

    (To rounding, where its factors had been cast to half precision: they come back in float32.) The model is the plain
    base, or has low-rank layers in exactly the adapter's places, which are replaced. Afterwards the adapter's
    parameters are trainable and all others frozen. An adapter that was trained on frozen weights in
    bfloat16 goes on the float32 base; call ``cast_frozen`` after this. Pruned singular values come back as zeros beside
    factors of zero: they get no gradient and stay pruned. :func:`start_from_adapter` lets them grow again.

    Args:
        compact: leave pruned singular values out instead of setting them to zero, as :func:`loralib.compact` does. The
            logits then agree to rounding.
        allow_other_base: accept a base with other weights than those the adapter was trained on.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged or edited folder, a base of another architecture, shape or (unless allowed) other
            weights, a merged model, or one in DistributedDataParallel. The model is unchanged then.
    """
    refuse_data_parallel(model, "load the adapter")
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    if "" in config.ranks:
        raise ValueError("the adapter's layer is the model itself, which cannot be replaced: put it into a module")
    check_adapter(model, config, tensors, allow_other_base)
    install_adapter(model, config, tensors, compact)
    return config


def install_adapter(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], compact: bool = False) -> None:
    """Change the model as :func:`load_adapter` does, after :func:`check_adapter`.

    Raises:
        ValueError: where a layer was compiled on its own. The model is unchanged then.
    """
    refuse_compiled({name: model.get_submodule(name) for name in config.ranks})
    layers = build_layers(model, config, tensors, compact)
    model.requires_grad_(False)
    replace_modules(model, layers)
    copy_head(model, config, tensors)


@torch.no_grad()
def copy_head(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Copy the adapter's other parameters and buffers into the model's, and make the parameters trainable."""
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        state[name].copy_(tensors[name])
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)


def build_layers(
    model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], compact: bool = False
) -> dict[str, LoRALayer]:
    """The adapter's layers by name, over the model's weights; the model keeps its own modules."""
    layers: dict[str, LoRALayer] = {}
    parameters: dict[str, nn.Parameter] = {}
    for group in config.groups:
        options = {"k": next(iter(group.widths), None), "widths": group.widths, "init": group.init}
        options = {name: options[name] for name in KINDS[group.kind].arguments}
        for name, flags in group.rank_pattern.items():
            old, live = model.get_submodule(name), group.live(name)
            layer = layers[name] = KINDS[group.kind].from_linear(
                old, group.r, group.lora_alpha, group.lora_dropout, **options
            )
            layer.keep_singular_values(live if compact else range(len(flags)))
            for parameter in layer.lora_parameters():
                parameter.data.zero_()
            if live:
                layer.scatter(range(layer.r) if compact else live, _read_factors(name, layer, config, tensors))
            parameters.update(zip(factor_names(name, layer), layer.lora_parameters(), strict=True))
    for alias, stored in config.tied.items():
        layer_name, _, factor = alias.rpartition(".lora_")
        side, index = factor.split(".")
        if layers[layer_name].r == 0:
            continue  # compact, and wholly pruned
        getattr(layers[layer_name], f"lora_{side}")[int(index)] = parameters[stored]
    return layers


def _read_factors(name: str, layer: LoRALayer, config: AdapterConfig, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The stored values of ``layer.lora_parameters()`` at the live singular values."""
    return [tensors[config.tied.get(factor, factor)] for factor in factor_names(name, layer)]


# ---- warm start -----------------------------------------------------------------------------------------------------


def start_from_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> AdapterConfig:
    """Start a training from the update of a saved adapter: copy its factors into the model's own low-rank layers.

    ΔW is then the adapter's. If lora_alpha differs, the singular values (LoRA: B) make up for it. Singular values that
    were pruned start anew with e = 0 and the model's own initial factors, so that they can grow again. The head and
    the ``requires_grad`` flags are left alone.

    Args:
        model: after :func:`loralib.inject`, with the adapter's modules, kind of layers, rank and widths.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged folder, other layers, or a base with other weights. The model is unchanged then.
    """
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    check_start(model, config, tensors)
    start(model, config, tensors)
    return config


def start(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Change the model as :func:`start_from_adapter` does, after :func:`check_start`.

    Raises:
        ValueError: for a base with other weights. The model is unchanged then.
    """
    check_base(model, config)
    for group in config.groups:
        for name in group.rank_pattern:
            layer, live = model.get_submodule(name), group.live(name)
            if live:
                amplitude = layer.lora_B[0] if layer.lora_E is None else layer.lora_E
                rescale = group.lora_alpha / group.r / layer.scaling
                pairs = zip(layer.lora_parameters(), _read_factors(name, layer, config, tensors), strict=True)
                layer.scatter(live, [values * rescale if p is amplitude else values for p, values in pairs])


# ---- merging --------------------------------------------------------------------------------------------------------


def merge_adapter(model: nn.Module) -> None:
    """Put W + ΔW into the weight of every low-rank layer. A second call changes nothing.

    Raises:
        ValueError: if a weight is quantised or sharded, another module uses it too, or peft holds the layers; nothing
            is merged then.
    """
    layers = layers_outside_peft(model, "merge_and_unload()")
    refuse_merging(unwrapped(model), layers)
    for layer in layers.values():
        layer.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """Undo :func:`merge_adapter` bit for bit.

    Raises:
        ValueError: if peft holds the layers.
    """
    for layer in layers_outside_peft(model, "unmerge_adapter()").values():
        layer.unmerge()


def merge_into(model: nn.Module, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
    """Add a saved adapter's updates to the weights of the plain base ``model``, in place, and copy its head.

    Unlike :func:`load_adapter` with :func:`merge_adapter` this leaves no low-rank layer in the model.

    Raises:
        ValueError: as :func:`load_adapter` and :func:`merge_adapter`, and for a model with low-rank layers. The model
            is unchanged then.
    """
    if lora_layers(model):
        raise ValueError("the model has low-rank layers already: merge into the plain base")
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    check_adapter(model, config, tensors, allow_other_base)
    refuse_merging(model, config.ranks)
    with keep_flags(model):
        layers = build_layers(model, config, tensors, compact=True)
        copy_head(model, config, tensors)  # before the merge: a layer's own weight may have been trained too
        for layer in layers.values():
            layer.merge()  # the layer's weight is the model's own parameter
    return config
