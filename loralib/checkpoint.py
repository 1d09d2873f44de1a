"""An adapter on its own: what of a model it is, saving, merging, and dropping what was pruned."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loralib.adapter_files import AdapterConfig, LayerGroup, write_adapter
from loralib.fingerprint import base_fingerprint
from loralib.injection import KINDS, check_bias
from loralib.layers import LoRALayer, lora_layers
from loralib.model_card import model_card

RankPattern = Mapping[str, Sequence[bool]]


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


# ---- merging and compacting -----------------------------------------------------------------------------------------


def merge_adapter(model: nn.Module) -> None:
    """Put W + ΔW into the weight of every low-rank layer; merging twice changes nothing.

    Raises:
        ValueError: as :func:`refuse_tied_weights`; nothing is merged then.
    """
    layers = lora_layers(model)
    refuse_tied_weights(model, layers)
    for layer in layers.values():
        layer.merge()


def refuse_tied_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where another module uses the weight of a named one too (an output layer tied to the
    embedding): a merge would change both."""
    users: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(module_name, recurse=False):
            users[id(parameter)].append(parameter_name)
    for name in names:
        own = f"{name}.weight" if name else "weight"
        others = [user for user in users[id(model.get_submodule(name).weight)] if user != own]
        if others:
            raise ValueError(
                f"{own} is tied to {others[0]}, which a merge would change too: untie them, or do not merge"
            )


def unmerge_adapter(model: nn.Module) -> None:
    """Undo :func:`merge_adapter` bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def compact(model: nn.Module, rank_pattern: RankPattern | None = None) -> dict[str, int]:
    """Drop the pruned singular values of all layers in place; the outputs stay, and so does the scaling.

    A layer keeps its own rank from now on; one with none left has no factors at all. The shrunk factors are new
    parameters: make the optimiser afterwards. The rank allocator refuses a compacted model.

    Args:
        rank_pattern: module name -> which singular values are live, as the allocator has it. Where not given, those
            that are exactly 0 are pruned, unless all of them are in the whole model, which then is untrained.

    Returns:
        Module name -> rank it has now.

    Raises:
        ValueError: where the pattern does not fit the layers, or prunes a value that is not 0; nothing is changed then.
    """
    layers = lora_layers(model)
    for name, kept in _live_indices(layers, rank_pattern).items():
        layers[name].keep_singular_values(kept)
    return {name: layer.r for name, layer in layers.items()}


def _live_indices(layers: dict[str, LoRALayer], pattern: RankPattern | None) -> dict[str, list[int]]:
    values = {name: layer.lora_E.detach() for name, layer in layers.items() if layer.lora_E is not None}
    live = {name: list(range(layer.r)) for name, layer in layers.items()}
    if pattern is not None:
        odd = sorted(set(pattern) ^ set(values))
        if odd:
            raise ValueError(f"the rank pattern does not name the layers with singular values: see {odd[0]}")
        for name, flags in pattern.items():
            if len(flags) != layers[name].r:
                raise ValueError(f"the rank pattern has {len(flags)} values for {name}, whose rank is {layers[name].r}")
            wrong = [i for i, flag in enumerate(flags) if not flag and values[name][i] != 0]
            if wrong:
                raise ValueError(f"the rank pattern prunes {name}[{wrong[0]}], which is not 0: apply the mask first")
            live[name] = [i for i, flag in enumerate(flags) if flag]
    elif any(bool(v.any()) for v in values.values()):
        live.update({name: v.nonzero().flatten().tolist() for name, v in values.items()})
    return live


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    rank_pattern: RankPattern | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    compact: bool = True,
) -> Path:
    """Write the adapter: the factors of all low-rank layers and every other trainable parameter (the head).

    The model is not changed. It may hold no low-rank layer: then the trainable parameters are all there is. The folder
    appears whole or not at all; an adapter that was there is replaced.

    Args:
        folder: new, empty, or an adapter's.
        rank_pattern, compact: pruned singular values are left out unless ``compact`` is False, see :func:`compact`.
        base_model, base_revision: where the base is to be had, for the record (a hub's name, not a path of this disk).
        card: anything JSON can hold, kept under "card"; the keys task, metric, score and notes show in README.md.

    Returns:
        The folder.

    Raises:
        ValueError: where there is nothing to save, for a rank pattern that does not fit, or a folder with other files.
    """
    layers = lora_layers(model)
    live = {name: list(range(layer.r)) for name, layer in layers.items()}
    if compact:
        live = _live_indices(layers, rank_pattern)
    tensors, tied = _layer_tensors(layers, live)
    head = _head_tensors(model, layers)
    if not tensors and not head:
        raise ValueError("nothing to save: the model has no low-rank layer and no trainable parameter")
    groups = _group(layers, live)
    kinds = {group.kind for group in groups}
    config = AdapterConfig(
        kind="parameters" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed",
        groups=groups,
        tied=tied,
        head=sorted(head),
        architecture=type(model).__name__,
        base_config=_head_config(model),
        base_model=base_model,
        base_revision=base_revision,
        base_fingerprint=base_fingerprint(model, head),
        card=dict(card or {}),
        library_version=_library_version(),
        weights_sha256="",
    )
    counts = {"adapter": sum(t.numel() for t in tensors.values()), "head": sum(t.numel() for t in head.values())}
    folder = Path(folder)
    stored = {name: t.detach().cpu().contiguous() for name, t in {**tensors, **head}.items()}
    write_adapter(folder, config, stored, model_card(config, counts))
    return folder


def _head_config(model: nn.Module) -> dict[str, Any]:
    """What a transformers model's configuration says of its head; empty for any other model."""
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None)
    if not isinstance(labels, Mapping):
        return {}
    return {
        "id2label": {str(number): name for number, name in labels.items()},
        "problem_type": getattr(config, "problem_type", None),
    }


def _library_version() -> str:
    try:
        return version("lora2-glue")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def factor_names(layer_name: str, layer: LoRALayer) -> list[str]:
    """Names of ``layer.lora_parameters()``, in that order."""
    own = {id(parameter): name for name, parameter in layer.named_parameters()}
    prefix = f"{layer_name}." if layer_name else ""
    return [prefix + own[id(parameter)] for parameter in layer.lora_parameters()]


def _layer_tensors(
    layers: dict[str, LoRALayer], live: dict[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store by name, each parameter once, and name -> stored name for the others."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for layer_name, layer in layers.items():
        kept = live[layer_name]
        if not kept:
            continue
        names, parameters = factor_names(layer_name, layer), layer.lora_parameters()
        for name, parameter, values in zip(names, parameters, layer.select(kept), strict=True):
            if owners.setdefault(id(parameter), name) != name:
                tied[name] = owners[id(parameter)]
            else:
                tensors[name] = values
    return tensors, tied


def _head_tensors(model: nn.Module, layers: dict[str, LoRALayer]) -> dict[str, Tensor]:
    """Trainable parameters that are no factors, and the saved buffers of the modules that own them."""
    factors = {id(parameter) for layer in layers.values() for parameter in layer.lora_parameters()}
    found: dict[str, Tensor] = {}
    owners = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            found[name] = parameter
            owners.add(name.rpartition(".")[0])
    state = model.state_dict(keep_vars=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found |= {n: t for n, t in state.items() if n not in parameters and n.rpartition(".")[0] in owners}
    return found


def _group(layers: dict[str, LoRALayer], live: dict[str, list[int]]) -> list[LayerGroup]:
    groups: dict[tuple, LayerGroup] = {}
    for name, layer in layers.items():
        kind = next(kind for kind, cls in KINDS.items() if type(layer) is cls)
        dropout = getattr(layer.lora_dropout, "p", 0.0)
        key = (kind, layer.initial_r, layer.widths, layer.lora_alpha, dropout, layer.init, layer.fan_in_fan_out)
        group = groups.setdefault(key, LayerGroup(*key[:2], list(key[2]), *key[3:], {}))
        group.rank_pattern[name] = "".join("1" if i in live[name] else "0" for i in range(layer.r))
    return list(groups.values())
