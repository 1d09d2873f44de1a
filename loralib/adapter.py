"""A model's adapter: save it, load it, and start a training from it. :mod:`loralib.adapter_folder` has the files.

Stored is the part of each factor that belongs to live singular values (those that are not exactly 0), once if layers
share it, and the head: all other trainable parameters, and the buffers that training changes. Before a model is
changed, the folder's checksums, its fit to the model and the base's weights are checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapter_folder import AdapterConfig, LayerGroup, base_config_of, name_on_hub, read_adapter, write_adapter
from loralib.checks import check_choice
from loralib.fingerprint import base_fingerprint
from loralib.injection import KINDS, check_replaceable, is_linear, put_in_place
from loralib.layers import LoRALayer, frozen_shape
from loralib.model import head_tensors, live_ranks, mark_only_lora_as_trainable, own_layers, unwrapped
from loralib.model_card import adapter_card

# ---- saving ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    save_tokenizer: Callable[[Path], Any] | None = None,
) -> Path:
    """Write the factors of all low-rank layers, and the head, to a folder.

    Without low-rank layers the adapter holds the trainable parameters. Wrappers of the model or its parts
    (``torch.compile``, data-parallel, averaged, activation checkpoints) leave no trace in the names. All processes of a
    group, or only one of them, may call this: they take turns, and each returns after the folder has been written.

    Args:
        folder: an adapter's files in it are replaced; other files stay.
        base_model, base_revision: name (of a path, the last part) and revision of the base on the hub, only recorded;
            by default those in the ``config`` of a transformers model (5.24 writes no revision there).
        card: JSON values, recorded under "card"; README.md shows task, method, metric, score and notes, and how_to_load
            (Markdown) in place of its own text.
        save_tokenizer: called to write the tokenizer's files into the folder too, e.g. ``tokenizer.save_pretrained``.

    Returns:
        The folder.

    Raises:
        ValueError: if no parameter is trainable, peft holds the layers, a file would replace one that
            is not an adapter's, a value is NaN or a factor infinite, or JSON cannot hold ``card``.
    """
    with _unwrapped_throughout(model) as model:
        layers = own_layers(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("nothing to save: no parameter is trainable; unfreeze the factors and the head first")
        live, head = live_ranks(layers), head_tensors(model)
        stored, tied = _stored_tensors(model, layers, live, head)
        groups = _groups(layers, live)
        of_transformers = getattr(model, "config", None)
        if base_model is None:
            base_model = getattr(of_transformers, "_name_or_path", None)
            base_revision = base_revision or getattr(of_transformers, "_commit_hash", None)
        config = AdapterConfig(
            kind="+".join(sorted({group.kind for group in groups})) or "parameters",
            groups=groups,
            tied=tied,
            head=sorted(head),
            architecture=type(model).__name__.removeprefix("FSDP"),  # a prefix of fully_shard
            base_config=base_config_of(of_transformers),
            base_model=name_on_hub(base_model),
            base_revision=base_revision,
            base_fingerprint=base_fingerprint(model, head),
            card=dict(card or {}),
        )
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    write_adapter(folder, config, stored, adapter_card(config), save_tokenizer)
    return Path(folder)


@contextmanager
def _unwrapped_throughout(model: nn.Module) -> Iterator[nn.Module]:
    """The :func:`unwrapped <loralib.model.unwrapped>` model; within the block, its parts are unwrapped too."""
    model = unwrapped(model)
    parts = [(parent._modules, *part) for parent in model.modules() for part in parent._modules.items()]
    wrapped = [(children, name, part) for children, name, part in parts if unwrapped(part) is not part]
    try:
        for children, name, part in wrapped:
            children[name] = unwrapped(part)
        yield model
    finally:
        for children, name, part in wrapped:
            children[name] = part


def _live_factors(layer_name: str, layer: LoRALayer, live: Sequence[int]) -> list[tuple[str, nn.Parameter, Tensor]]:
    """(Name in the model, factor, its part for the live singular values) of each factor; empty if none is live."""
    names = {id(parameter): name for name, parameter in layer.named_parameters(layer_name)}
    parts = zip(layer.lora_parameters(), layer.select(live), strict=True) if live else ()
    return [(names[id(parameter)], parameter, values) for parameter, values in parts]


def _stored_tensors(
    model: nn.Module, layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]], head: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(Tensors to store by name, each of the model's once; other names of these in the model -> stored name)."""
    stored, owners = dict(head), {id(tensor): name for name, tensor in head.items()}
    for layer_name, layer in layers.items():
        for name, parameter, values in _live_factors(layer_name, layer, live[layer_name]):
            if owners.setdefault(id(parameter), name) == name:
                stored[name] = values
    names = model.state_dict(keep_vars=True).items()
    return stored, {name: owners[id(tensor)] for name, tensor in names if owners.get(id(tensor), name) != name}


def _groups(layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]]) -> list[LayerGroup]:
    groups: dict[str, LayerGroup] = {}
    for name, layer in layers.items():
        widths, dropout = list(layer.widths), layer.lora_dropout.p
        key = (layer.kind, layer.initial_r, widths, layer.lora_alpha, dropout, layer.init, layer.fan_in_fan_out)
        group = groups.setdefault(str(key), LayerGroup(*key, {}))
        group.rank_pattern[name] = "".join("1" if i in live[name] else "0" for i in range(layer.r))
    return list(groups.values())


# ---- loading --------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
    """Put a saved adapter on ``model`` in place. The logits are then bit for bit those of the model that was saved.

    The model is the plain base, or its low-rank layers are for exactly the adapter's modules, with the same rank and
    widths; their factors are then overwritten. Afterwards only the adapter's parameters are trainable, and the
    ``config`` of a transformers model has the labels, the problem type and the padding token of the saved one.

    Load an adapter that was trained on frozen bfloat16 weights onto the float32 base and call ``cast_frozen``
    afterwards. A pruned singular value is loaded as 0, and so are its column of B and row of A, so that it gets no
    gradient. :func:`loralib.compact` drops it, and :func:`start_from_adapter` lets it grow again.

    Args:
        allow_other_base: accept a base with other weights than those the adapter was trained on.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged or edited folder; a base without the adapter's modules or with other shapes; a base
            with other weights, unless allowed; other low-rank layers; a merged model. The model is unchanged then.
    """
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    layers = _fitting_layers(model, config, tensors)
    if not allow_other_base:
        _check_base(model, config)
    _install(model, config, tensors, layers)
    return config


def _fitting_layers(model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoRALayer]:
    """The layers for an adapter by module name: the model's own, or new ones over its weights. Nothing is changed.

    Raises:
        ValueError: if a layer is merged; if the adapter has other modules, initial ranks or shapes than the model; if a
            tensor is missing or left over; or if tensors are one in the model and two in the adapter. The base's
            weights are not checked here.
    """
    layers = own_layers(model) or _new_layers(model, config, tensors)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model holds a merged adapter: call unmerge_adapter() first")
    if odd := set(config.modules) ^ set(layers):
        raise ValueError(f"the adapter adapts other modules than the model (see {min(odd)}): adapt the same modules")
    state = model.state_dict(keep_vars=True)
    needed = {name: (state[name], tuple(state[name].shape)) for name in config.head if name in state}
    for name, group in config.modules.items():
        layer = layers[name]
        if group.r != layer.initial_r or len(group.rank_pattern[name]) > layer.r:
            here = f"{layer.initial_r} (now {layer.r})"
            raise ValueError(f"{name}: rank {group.r} in the adapter, {here} in the model: {_origin(config)}")
        for factor, parameter, values in _live_factors(name, layer, group.live(name)):
            if factor not in config.head:
                needed[factor] = parameter, tuple(values.shape)
    _check_tensors(config, tensors, needed)
    return layers


def _check_tensors(
    config: AdapterConfig, tensors: Mapping[str, Tensor], needed: Mapping[str, tuple[Tensor, tuple[int, ...]]]
) -> None:
    """Raises ValueError unless the adapter holds the ``needed`` tensors (name -> the model's own, shape) and no others,
    and those that are one in the model are equal."""
    for name in sorted((tensors.keys() - config.tied.keys()) | needed.keys() | set(config.head)):
        there = tuple(tensors[name].shape) if name in tensors else "nothing"
        here = needed[name][1] if name in needed else "nothing"
        if not config.groups and here == "nothing":
            raise ValueError(
                f"the model has no {name}: the adapter's method has modules of its own, which cannot be loaded or "
                f"merged here (its README.md tells how to use it), or the base is another: {_origin(config)}"
            )
        if there != here or name not in needed:
            raise ValueError(f"{name}: the adapter holds {there}, the model needs {here}: {_origin(config)}")
    names: dict[int, str] = {}  # id of a tensor of the model -> its first name
    for name, (tensor, _) in needed.items():
        first = names.setdefault(id(tensor), name)
        if tensors[first] is not tensors[name] and not torch.equal(tensors[first], tensors[name]):
            raise ValueError(
                f"{first} and {name} are one tensor in the model and two in the adapter: untie the weights, or leave "
                "share_outer out"
            )


def _new_layers(model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoRALayer]:
    """New layers over the model's weights with the adapter's rank, widths and sharing; the model is not changed."""
    modules = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    layers: dict[str, LoRALayer] = {}
    owned: dict[int, nn.Parameter] = {}  # id of a stored tensor -> the outer factor for it
    for name, group in config.modules.items():
        if name not in modules:
            raise ValueError(f"the model has no linear layer {name}: {_origin(config)}")
        check_replaceable(name, modules[name])
        check_choice("kind", group.kind, KINDS)
        flags = group.rank_pattern[name]
        most = max(1024, *frozen_shape(modules[name]))
        # A folder from an untrusted source must not make this allocate unbounded memory.
        if max(group.r, len(flags), *group.widths) > most or len(group.widths) > 16:
            raise ValueError(f"the adapter's rank or a width of {name} is beyond {most}, or it has more than 16 widths")
        settings = (group.r, group.lora_alpha, group.lora_dropout, group.widths, group.init)
        layer = KINDS[group.kind].from_linear(modules[name], *settings)
        layer.keep_singular_values(range(min(len(flags), group.r)))
        layers[name] = layer
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
            for i, factor in enumerate(factors[:-1]):
                stored = tensors.get(f"{name}.lora_{side}.{i}")
                if stored is not None and owned.setdefault(id(stored), factor).shape == factor.shape:
                    factors[i] = owned[id(stored)]
    return layers


def _check_base(model: nn.Module, config: AdapterConfig) -> None:
    """Raises ValueError unless the base's weights are those that the adapter was trained on."""
    if base_fingerprint(model, config.head) != config.base_fingerprint:
        raise ValueError(
            f"the base's weights are not those the adapter was trained on: {_base_of(config)} (a new head that was "
            "left frozen counts as base: unfreeze it before the training; allow_other_base accepts another base)"
        )


def _base_of(config: AdapterConfig) -> str:
    base = ", revision ".join(filter(None, (config.base_model, config.base_revision)))
    return f"the adapter was made for a {config.architecture}" + (f" ({base})" if base else "")


def _origin(config: AdapterConfig) -> str:
    shapes = ((each.kind, each.r, each.widths) for each in config.groups)
    layers = {f"{kind} (r={r}" + (f", widths={widths})" if widths else ")") for kind, r, widths in shapes}
    return _base_of(config) + (f" with layers {' and '.join(sorted(layers)):.200}" if layers else "")


def _install(
    model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LoRALayer]
) -> None:
    put_in_place(model, {id(model.get_submodule(name)): layer for name, layer in layers.items()})
    for name, group in config.modules.items():
        layer = layers[name]
        layer.lora_alpha, layer.lora_dropout.p, layer.init = group.lora_alpha, group.lora_dropout, group.init
        for parameter in layer.lora_parameters():
            parameter.data.zero_()  # so that nothing is left of pruned values
    _write_live_values(layers, config, tensors)
    mark_only_lora_as_trainable(model)
    for name, value in (config.head_options() if hasattr(model, "config") else {}).items():
        setattr(model.config, name, value)
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        with torch.no_grad():
            state[name].copy_(tensors[name])
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)


@torch.no_grad()
def _write_live_values(layers: Mapping[str, LoRALayer], config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the live singular values and their part of the factors. Of the others, only the factor that starts at 0 is
    written: it becomes 0, and the layer's own values of the rest let them grow again. If a layer's scaling is not the
    adapter's, the same factor is rescaled, so that ΔW is the adapter's."""
    for name, group in config.modules.items():
        layer, live = layers[name], group.live(name)
        if layer.r:
            layer.starts_at_zero.zero_()
        if live:
            layer.scatter(live, [tensors[factor] for factor, *_ in _live_factors(name, layer, live)])
            layer.starts_at_zero[..., live] *= group.lora_alpha / layer.lora_alpha


# ---- a warm start ---------------------------------------------------------------------------------------------------


def start_from_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, allow_other_base: bool = False
) -> AdapterConfig:
    """Start a training from the update of a saved adapter: copy its factors into the model's own low-rank layers.

    ΔW is then the adapter's, also if lora_alpha differs. A pruned singular value is 0 and can grow again from the
    layer's own factors (after ``inject``: random ones). The head and the ``requires_grad`` flags are not changed.

    Args:
        model: after :func:`loralib.inject`, with the adapter's modules, kind of layers, rank and widths.
        allow_other_base: accept a base with other frozen weights, such as one with another head.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged folder, no or other layers, or a base with other weights. The model is unchanged then.
    """
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    if not own_layers(model):
        raise ValueError("the model has no low-rank layers to start with: call inject() first")
    factors = {name: tensor for name, tensor in tensors.items() if name not in config.head}
    layers = _fitting_layers(model, replace(config, head=[]), factors)
    if not allow_other_base:
        _check_base(model, config)
    _write_live_values(layers, config, tensors)
    return config
