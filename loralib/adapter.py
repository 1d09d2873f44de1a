"""A model's adapter: save it, load it, start a training from it, merge it, and drop pruned singular values.

Every use of a saved adapter takes the same steps: :func:`read_adapter` checks the folder, :func:`fitting_layers` or
:func:`own_layers` finds the model's layers for it, or says what does not fit, and only then the model is changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapter_folder import VERSION, AdapterConfig, LayerGroup, read_adapter, write_adapter
from loralib.injection import KINDS, check_replaceable, is_linear, replace_modules
from loralib.layers import LoRALayer
from loralib.model import (
    factors_of,
    head_tensors,
    keep_flags,
    layers_outside_peft,
    lora_layers,
    refuse_data_parallel,
    refuse_sharded_factors,
    unwrapped,
)
from loralib.stored_weight import frozen_shape, stored_form

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


def live_singular_values(layers: Mapping[str, LoRALayer]) -> dict[str, list[int]]:
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
    model it is the adapter of the model inside. All processes of a group, or one of them, may call it: they take turns,
    and each returns when the folder is there.

    Args:
        folder: new, empty, or an adapter's, which is replaced.
        base_model, base_revision: name and revision of the base on the hub, only recorded; by default those in the
            ``config`` of a transformers model. Of a path only the last part is recorded.
        card: values of JSON, recorded under "card"; task, method, metric, score and notes also show in README.md.
        compact: leave out the singular values that are exactly 0, see :func:`loralib.compact`.
        save_tokenizer: such as ``tokenizer.save_pretrained``: writes the tokenizer's files into the folder too.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to save, peft holds the layers, the factors are sharded, the folder holds other
            files, a value is NaN, or the labels are not numbered from 0.
    """
    model = unwrapped(model)
    layers = layers_outside_peft(model, "save_pretrained()")
    refuse_sharded_factors(model)
    live = live_singular_values(layers) if compact else {name: list(range(m.r)) for name, m in layers.items()}
    factors, tied = _stored_factors(layers, live)
    head = head_tensors(model)
    if not factors and not head:
        raise ValueError("nothing to save: the model has no low-rank layer and no trainable parameter")
    groups = _group(layers, live)
    kinds = {group.kind for group in groups}
    second = _second_name(model, layers, head) if layers else None
    if base_model is None:
        base_config = getattr(model, "config", None)
        base_model, base_revision = (getattr(base_config, name, None) for name in ("_name_or_path", "_commit_hash"))
    config = AdapterConfig(
        kind="parameters" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed",
        groups=groups,
        tied=tied,
        head=sorted(head),
        architecture=architecture_of(model),
        base_config=_head_config(model),
        base_model=name_on_hub(base_model),
        base_revision=base_revision,
        base_fingerprint=base_fingerprint(model, head),
        card=dict(card or {}) | ({"peft_lacks": second} if second else {}),
        library_version=VERSION,
        weights_sha256="",  # write_adapter fills it in
    )
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in {**factors, **head}.items()}
    write_adapter(folder, config, stored, save_tokenizer)
    return Path(folder)


def name_on_hub(recorded: Any) -> str | None:
    """A base's name on the hub; of a place on somebody's disk only the last part, and None for anything else."""
    name = os.fspath(recorded) if isinstance(recorded, str | os.PathLike) else ""
    on_the_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not os.path.exists(name)
    return name if on_the_hub else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None


def architecture_of(model: nn.Module) -> str:
    """The name of the model's class; ``fully_shard`` has put a class of its own before it."""
    return next(c.__name__ for c in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in c.__mro__))


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


def _second_name(model: nn.Module, layers: Mapping[str, LoRALayer], head: Mapping[str, Tensor]) -> str | None:
    """The first further name of an adapted module or of a trained tensor (one that is tied to another)."""
    trained = set(map(id, head.values()))
    modules = model.named_modules(remove_duplicate=False)
    names = [name for name, module in modules if isinstance(module, LoRALayer) and name not in layers]
    state = model.state_dict(keep_vars=True)
    return next(iter(names + [n for n, t in state.items() if id(t) in trained and n not in head]), None)


def _factor_names(layer_name: str, layer: LoRALayer) -> list[str]:
    """Names of ``layer.lora_parameters()``, in that order."""
    own = {id(parameter): name for name, parameter in layer.named_parameters()}
    prefix = f"{layer_name}." if layer_name else ""
    return [prefix + own[id(parameter)] for parameter in layer.lora_parameters()]


def _stored_factors(
    layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store by name, each parameter once, and name -> stored name for the others."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for layer_name in sorted(layers, key=lambda name: not live[name]):  # those of which something is stored come first
        layer, kept = layers[layer_name], live[layer_name]
        names, parameters = _factor_names(layer_name, layer), layer.lora_parameters()
        for name, parameter, values in zip(names, parameters, layer.select(kept), strict=True):
            owner = owners.setdefault(id(parameter), name) if kept else owners.get(id(parameter))
            if owner == name:
                tensors[name] = values
            elif owner is not None:  # what a layer shares stays shared, also where nothing else of it is stored
                tied[name] = owner
    return tensors, tied


def _group(layers: Mapping[str, LoRALayer], live: Mapping[str, list[int]]) -> list[LayerGroup]:
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
    base, or has low-rank layers in exactly the adapter's places, of its rank and widths, into whose factors the values
    are written. Afterwards the adapter's parameters are trainable and all others frozen. An adapter that was trained on
    frozen weights in bfloat16 goes on the float32 base; call ``cast_frozen`` after this. Pruned singular values come
    back as zeros beside factors of zero: they get no gradient and stay pruned. :func:`start_from_adapter` lets them
    grow again.

    Args:
        compact: leave pruned singular values out instead of setting them to zero, as :func:`loralib.compact` does. The
            logits then agree to rounding.
        allow_other_base: accept a base with other weights than those the adapter was trained on.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged or edited folder, a base of another architecture, shape or (unless allowed) other
            weights, other low-rank layers, a merged model, or one in DistributedDataParallel. The model is unchanged
            then.
    """
    refuse_data_parallel(model, "load the adapter")
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    layers = fitting_layers(model, config, tensors, allow_other_base)
    install(model, config, tensors, layers, compact)
    return config


def fitting_layers(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    allow_other_base: bool = False,
    any_head_shape: bool = False,
) -> dict[str, LoRALayer]:
    """The layers for an adapter by module name: the model's own, or new ones over its weights. Nothing is changed.

    Args:
        any_head_shape: the adapter's head may have other shapes than the model's.

    Raises:
        ValueError: the adapter does not fit the model, see :func:`load_adapter`.
    """
    with keep_flags(model):
        layers = own_layers(model, config) if lora_layers(model) else _new_layers(model, config)
    state = model.state_dict(keep_vars=True)
    expected = _stored_shapes(layers, config)
    for name in config.head:
        if name not in state:
            raise ValueError(f"the model has no parameter {name}: {_architectures(model, config)}")
        expected[name] = (tensors.get(name, state[name]) if any_head_shape else state[name]).shape
    _compare(expected, tensors, config)
    if not allow_other_base:
        check_base(model, config, ", or allow another base explicitly (allow_other_base)")
    return layers


def own_layers(model: nn.Module, config: AdapterConfig) -> dict[str, LoRALayer]:
    """The model's low-rank layers. The model may be on "meta".

    Raises:
        ValueError: unless they are in the adapter's places, of its rank and widths, and share no more than the
            adapter's.
    """
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model holds a merged adapter: call unmerge_adapter() first")
    saved = {name: group for group in config.groups for name in group.rank_pattern}
    if set(saved) != set(layers):
        odd = sorted(set(saved) ^ set(layers))[0]
        raise ValueError(f"the adapter adapts other modules than the model (see {odd}): adapt the same modules")
    shared_by: dict[int, str] = {}  # the model's factors -> the stored tensor for them
    for name, layer in layers.items():
        group = saved[name]
        wanted = group.kind == "lora", group.r, tuple(group.widths)
        if wanted != (has := (layer.lora_E is None, layer.initial_r, layer.widths)):
            raise ValueError(
                f"the adapter has {_settings(*wanted)} in {name}, the model {_settings(*has)}: give the same method, "
                "rank and widths"
            )
        if len(group.rank_pattern[name]) > layer.r:
            raise ValueError(f"the model has fewer singular values in {name} than the adapter: load it into the base")
        for factor, parameter in zip(_factor_names(name, layer), layer.lora_parameters(), strict=True):
            stored = config.tied.get(factor, factor)
            if group.live(name) and shared_by.setdefault(id(parameter), stored) != stored:
                raise ValueError("the model's layers share outer factors, the adapter's do not: leave share_outer out")
    return layers


def _settings(plain: bool, r: int, widths: Collection[int]) -> str:
    return f"{'LoRA' if plain else 'singular values'} of rank {r}" + (f" and widths {list(widths)}" if widths else "")


def _new_layers(model: nn.Module, config: AdapterConfig) -> dict[str, LoRALayer]:
    """Layers over the model's weights with the adapter's rank, widths and sharing; the model keeps its own modules."""
    modules = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    layers: dict[str, LoRALayer] = {}
    for group in config.groups:
        options = {"k": next(iter(group.widths), None), "widths": group.widths, "init": group.init}
        options = {name: options[name] for name in KINDS[group.kind].arguments}
        for name, flags in group.rank_pattern.items():
            if name not in modules:
                raise ValueError(f"the model has no linear layer {name}: {_architectures(model, config)}")
            check_replaceable(name, modules[name])
            most = max(1024, *frozen_shape(modules[name]))
            if max(group.r, *group.widths, 0) > most or len(flags) > group.r:  # a stranger may ask for endless memory
                raise ValueError(f"the adapter's rank or width of {name} is beyond {most}, or its pattern beyond r")
            layers[name] = KINDS[group.kind].from_linear(
                modules[name], group.r, group.lora_alpha, group.lora_dropout, **options
            )
            layers[name].keep_singular_values(range(len(flags)))
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


def _stored_shapes(layers: Mapping[str, LoRALayer], config: AdapterConfig) -> dict[str, torch.Size]:
    """Name -> shape of every factor that the adapter's file must hold."""
    return {
        factor: values.shape
        for group in config.groups
        for name in group.rank_pattern
        if (live := group.live(name))
        for factor, values in zip(_factor_names(name, layers[name]), layers[name].select(live), strict=True)
        if factor not in config.tied
    }


def _compare(expected: Mapping[str, torch.Size], tensors: dict[str, Tensor], config: AdapterConfig) -> None:
    for name in sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{'unknown' if name in tensors else 'missing'} tensor {name} in the adapter's file")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in the adapter, the model needs {tuple(shape)}: load "
                f"the base it was trained on ({config.base_model or config.architecture})"
            )


def _architectures(model: nn.Module, config: AdapterConfig) -> str:
    if config.architecture == architecture_of(model):
        return "the adapter's base has more layers, or its method adds modules, which this model lacks"
    return f"the adapter was made for a {config.architecture}, this is a {architecture_of(model)}"


def check_base(model: nn.Module, config: AdapterConfig, other_way: str = "") -> None:
    """Raises ValueError unless the base's weights are those that the adapter was trained on."""
    if base_fingerprint(model, config.head) != config.base_fingerprint:
        origin = config.base_model or "unnamed"
        revision = f", revision {config.base_revision}" if config.base_revision else ""
        raise ValueError(
            f"the base's weights are not those the adapter was trained on ({origin}{revision}): load that "
            f"base{other_way}"
        )


def install(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    layers: Mapping[str, LoRALayer],
    compact: bool = False,
) -> None:
    """Change the model as :func:`load_adapter` does; ``layers`` are those of :func:`fitting_layers`."""
    write_factors(layers, config, tensors)
    if compact:
        for group in config.groups:
            for name in group.rank_pattern:
                layers[name].keep_singular_values(group.live(name))
    model.requires_grad_(False)
    replace_modules(model, {name: layer for name, layer in layers.items() if model.get_submodule(name) is not layer})
    for factor in factors_of(model):
        factor.requires_grad_(True)
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        with torch.no_grad():
            state[name].copy_(tensors[name])
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)


@torch.no_grad()
def write_factors(layers: Mapping[str, LoRALayer], config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Give layers the adapter's settings and factors; what was pruned is zero, its factors too."""
    for layer in layers.values():
        for parameter in layer.lora_parameters():
            parameter.zero_()
    for group in config.groups:
        for name in group.rank_pattern:
            layer, live = layers[name], group.live(name)
            layer.lora_alpha, layer.lora_dropout.p, layer.init = group.lora_alpha, group.lora_dropout, group.init
            if live:
                layer.scatter(live, _read_factors(name, layer, config, tensors))


def _read_factors(name: str, layer: LoRALayer, config: AdapterConfig, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The stored values of ``layer.lora_parameters()`` at the live singular values."""
    return [tensors[config.tied.get(factor, factor)] for factor in _factor_names(name, layer)]


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


def check_start(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless the model's low-rank layers are those of the adapter. The model may be on "meta"."""
    factors = {name: tensor for name, tensor in tensors.items() if name not in config.head}
    _compare(_stored_shapes(own_layers(model, config), config), factors, config)


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

    The state dict still holds W and the factors: :func:`merge_and_unload` gives a model to save.

    Raises:
        ValueError: if a weight is quantised or sharded, another module uses it too, or peft holds the layers; nothing
            is merged then.
    """
    layers = layers_outside_peft(model, "merge_and_unload()")
    _refuse_merging(unwrapped(model), layers)
    for layer in layers.values():
        layer.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """Undo :func:`merge_adapter` bit for bit.

    Raises:
        ValueError: if peft holds the layers.
    """
    for layer in layers_outside_peft(model, "unmerge_adapter()").values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the adapter, in place, and put plain linear layers with W + ΔW in the place of the low-rank ones.

    Returns:
        The :func:`unwrapped <loralib.model.unwrapped>` model, which any tool saves and loads.

    Raises:
        ValueError: as :func:`merge_adapter`.
    """
    merge_adapter(model)
    model = unwrapped(model)
    plain = {id(layer): _plain_linear(layer) for layer in lora_layers(model).values()}
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):  # named_children() gives a module once
            if id(module) in plain:
                setattr(parent, name, plain[id(module)])
    return plain.get(id(model), model)


def _plain_linear(layer: LoRALayer) -> nn.Module:
    """A layer's frozen weight and bias, the same parameters, in a linear layer of the class that it was made from."""
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def merge_into(model: nn.Module, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
    """Add a saved adapter's updates to the weights of the plain base ``model``, in place, and copy its head.

    It is :func:`load_adapter` and :func:`merge_and_unload` in one.

    Raises:
        ValueError: as these, and for a model with low-rank layers. The model is unchanged then.
    """
    if lora_layers(model):
        raise ValueError("the model has low-rank layers already: merge into the plain base")
    model, (config, tensors) = unwrapped(model), read_adapter(folder)
    layers = fitting_layers(model, config, tensors, allow_other_base)
    _refuse_merging(model, layers)
    with keep_flags(model):
        install(model, config, tensors, layers, compact=True)
        merge_and_unload(model)
    return config


def _refuse_merging(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where ΔW cannot be added to the weight of a named module: where it is quantised, sharded or
    computed by a hook, or where another module uses it too, as an output layer that is tied to the embedding does."""
    users: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(module_name, recurse=False):
            users[id(parameter)].append(parameter_name)
    for name in names:
        own = f"{name}.weight" if name else "weight"
        weight = model.get_submodule(name).weight
        if stored_form(weight) is not None:
            raise ValueError(f"{own} is {stored_form(weight)}: save the adapter, and merge it into the plain base")
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"{own} is computed by a hook (pruning, a parametrisation): remove that first")
        others = [user for user in users[id(weight)] if user != own]
        if others:
            raise ValueError(
                f"{own} is tied to {others[0]}, which a merge would change too: untie them, or do not merge"
            )


# ---- fingerprint ----------------------------------------------------------------------------------------------------

_CHUNK = 1 << 22  # values hashed at once: this bounds the memory and spreads a large embedding over the threads
_KEPT = "_fingerprint_before_sharding"


def base_fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """SHA-256 over the name, shape and every value of the base's parameters and saved buffers, as a hex string.

    Floating-point values are first rounded to bfloat16, so that a base and its copy in bfloat16 have the same
    fingerprint. A base that differs by less than this rounding in every value has it too. Low-rank factors do not
    count, a merged layer counts with its base weight, and a quantised weight with the tensors that it stores. Of a
    sharded model this is the fingerprint that it had before, since no process has all its values. 184M float32
    parameters took 0.12 s on two CPU cores.

    Args:
        model: wrappers are looked through. exclude: names of parameters and buffers that belong to the adapter (the
            head).

    Raises:
        ValueError: for a sharded model whose trainable parameters have changed since.
    """
    model = unwrapped(model)
    tensors = _base_tensors(model, exclude)
    if any(stored_form(tensor) == "sharded" for tensor in tensors.values()):
        head, digest = getattr(model, _KEPT, (None, ""))
        if head != set(exclude):
            raise ValueError("the model was sharded with other trainable parameters: set them before shard_frozen()")
        return digest
    chunks: list[tuple[bytes, Tensor]] = []
    for name, tensor in sorted(_stored_parts(tensors)):
        flat = tensor.detach().flatten()
        chunks.append((f"{name} {tuple(tensor.shape)}".encode(), flat[:0]))
        chunks += [(b"", part) for part in flat.split(_CHUNK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(_chunk_digest, chunks))).hexdigest()


def keep_fingerprint(model: nn.Module, exclude: Collection[str]) -> None:
    """Keep the fingerprint of a model that is about to be sharded; ``exclude`` as in :func:`base_fingerprint`."""
    setattr(unwrapped(model), _KEPT, (set(exclude), base_fingerprint(model, exclude)))


def _base_tensors(model: nn.Module, exclude: Collection[str]) -> dict[str, Tensor]:
    """Each base tensor once, under the first of its names."""
    state = model.state_dict(keep_vars=True)  # of a merged layer it holds the base's weight
    skip = {id(factor) for factor in factors_of(model)} | {id(state[name]) for name in exclude if name in state}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in skip:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _stored_parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and plain tensors: a quantised one as the tensors inside it."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        else:
            yield name, tensor


def _chunk_digest(chunk: tuple[bytes, Tensor]) -> bytes:
    label, values = chunk
    rounded = values.to(torch.bfloat16) if values.is_floating_point() else values
    data = rounded.cpu().contiguous().view(torch.uint8).numpy() if values.numel() else b""
    return hashlib.sha256(label + data if label else data).digest()
