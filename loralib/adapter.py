"""A model's adapter: save it, load it, start a training from it, merge it, and drop pruned singular values.

Every use of a saved adapter takes the same steps: :func:`read_adapter` checks the folder, :func:`fitting_layers` or
:func:`own_layers` finds the model's layers for it or says what does not fit, and only then the model is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapter_config import VERSION, AdapterConfig
from loralib.adapter_folder import read_adapter, write_adapter
from loralib.adapter_layers import (
    architecture_of,
    architectures,
    grouped,
    live_singular_values,
    new_layers,
    own_layers,
    read_factors,
    stored_factors,
    stored_shapes,
    write_factors,
)
from loralib.fingerprint import base_fingerprint
from loralib.injection import replace_modules
from loralib.layers import LoRALayer
from loralib.model import (
    factors_of,
    head_tensors,
    keep_flags,
    layers_outside_peft,
    lora_layers,
    unwrapped,
)


def compact(model: nn.Module) -> dict[str, int]:
    """Drop the pruned singular values of all layers in place. The outputs and the scaling stay the same.

    The weights alone say what is pruned: a singular value e_i that is exactly 0. If every e of the model is 0, the
    model is untrained and keeps all. Plain LoRA has no singular values and keeps its rank.

    Each layer then has its own rank; a layer with none left has no factors at all. The shrunk factors are new
    parameters: make the optimiser afterwards.

    Returns:
        Module name -> rank it has now.

    Raises:
        ValueError: if peft holds the layers, and for a model in DistributedDataParallel.
    """
    layers = layers_outside_peft(model, "base_model.compact()")
    for name, kept in live_singular_values(layers).items():
        layers[name].keep_singular_values(kept)
    return {name: layer.r for name, layer in layers.items()}


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

    The model need not have low-rank layers: the adapter then holds the trainable parameters. Of a compiled,
    data-parallel or averaged model it is the adapter of the model inside. All processes of a group, or one of them, may
    call it: they take turns, and each returns when the folder is there.

    Args:
        folder: new, empty, or an adapter's, whose files are replaced.
        base_model, base_revision: name and revision of the base on the hub, only recorded; by default those in the
            ``config`` of a transformers model. Of a path only the last part is recorded.
        card: values of JSON, recorded under "card"; task, method, metric, score and notes also show in README.md.
        compact: leave out the singular values that are exactly 0, see :func:`loralib.compact`.
        save_tokenizer: such as ``tokenizer.save_pretrained``: writes the tokenizer's files into the folder too.

    Returns:
        The folder.

    Raises:
        ValueError: if there is nothing to save, peft holds the layers, the folder holds other files, or a value is
            NaN.
    """
    model = unwrapped(model)
    layers = layers_outside_peft(model, "save_pretrained()")
    live = live_singular_values(layers) if compact else {name: list(range(m.r)) for name, m in layers.items()}
    factors, tied = stored_factors(layers, live)
    head = head_tensors(model)
    if not factors and not head:
        raise ValueError("nothing to save: the model has no low-rank layer and no trainable parameter")
    groups = grouped(layers, live)
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


# ---- loading and starting -------------------------------------------------------------------------------------------


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
        layers = own_layers(model, config) if lora_layers(model) else new_layers(model, config)
    state = model.state_dict(keep_vars=True)
    expected = stored_shapes(layers, config)
    for name in config.head:
        if name not in state:
            raise ValueError(f"the model has no parameter {name}: {architectures(model, config)}")
        expected[name] = (tensors.get(name, state[name]) if any_head_shape else state[name]).shape
    _compare(expected, tensors, config)
    if not allow_other_base:
        check_base(model, config, ", or allow another base explicitly (allow_other_base)")
    return layers


def _compare(expected: Mapping[str, torch.Size], tensors: dict[str, Tensor], config: AdapterConfig) -> None:
    for name in sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{'unknown' if name in tensors else 'missing'} tensor {name} in the adapter's file")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in the adapter, the model needs {tuple(shape)}: load "
                f"the base it was trained on ({config.base_model or config.architecture})"
            )


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
    replace_modules(model, {name: layer for name, layer in layers.items() if model.get_submodule(name) is not layer})
    write_factors(layers, config, tensors)
    if compact:
        for name, group in config.modules.items():
            layers[name].keep_singular_values(group.live(name))
    model.requires_grad_(False)
    for factor in factors_of(model):
        factor.requires_grad_(True)
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        with torch.no_grad():
            state[name].copy_(tensors[name])
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)


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
    layers = own_layers(model, config)
    factors = {name: tensor for name, tensor in tensors.items() if name not in config.head}
    _compare(stored_shapes(layers, config), factors, config)
    check_base(model, config)
    for name, group in config.modules.items():
        layer, live = layers[name], group.live(name)
        if live:
            amplitude = layer.lora_B[0] if layer.lora_E is None else layer.lora_E
            rescale = group.lora_alpha / group.r / layer.scaling
            pairs = zip(layer.lora_parameters(), read_factors(name, layer, config, tensors), strict=True)
            layer.scatter(live, [values * rescale if p is amplitude else values for p, values in pairs])
    return config
