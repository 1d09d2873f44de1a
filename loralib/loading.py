"""Saved adapters back onto a model: every check first, then all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapter_files import AdapterConfig, LayerGroup, read_adapter
from loralib.checkpoint import factor_names
from loralib.fingerprint import base_fingerprint
from loralib.injection import KINDS, is_conv1d, is_linear
from loralib.layers import LoRALayer, lora_layers


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    compact: bool = False,
    allow_other_base: bool = False,
) -> AdapterConfig:
    """Put a saved adapter on ``model`` in place. The logits are then bit for bit those of the model that was saved.

    The model is the base as it was before injection; or a model with low-rank layers in exactly the places that the
    adapter has, whose factors are replaced. Afterwards what the adapter holds is trainable and all else frozen. An
    adapter that was trained on bfloat16 frozen weights goes on the float32 base; call ``cast_frozen`` after this.

    Args:
        compact: leave pruned singular values out instead of setting them to zero, as :func:`compact` does: the better
            start for more training; the logits then agree to rounding.
        allow_other_base: also accept a base whose weights are not those that the adapter was trained on.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: for a damaged or edited folder, a base of another architecture, shape or (unless allowed) other
            weights, or a merged model. The model is unchanged then.
    """
    config, tensors = read_adapter(folder)
    check_adapter(model, config, tensors, allow_other_base)
    install_adapter(model, config, tensors, compact)
    return config


def check_adapter(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    allow_other_base: bool = False,
    any_head_shape: bool = False,
) -> None:
    """Raises ValueError where the adapter does not fit the model, see :func:`load_adapter`.

    Args:
        any_head_shape: the head's tensors need not have the shapes of the model's head.
    """
    _check_modules(model, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    state = model.state_dict(keep_vars=True)
    head = {name: tuple(state[name].shape) for name in config.head}
    if any_head_shape:
        head = {name: shapes.get(name, shape) for name, shape in head.items()}
    _compare({**head, **_expected_shapes(model, config)}, shapes, config)
    if not allow_other_base and base_fingerprint(model, config.head) != config.base_fingerprint:
        origin = config.base_model or "unnamed"
        revision = f", revision {config.base_revision}" if config.base_revision else ""
        raise ValueError(
            f"the base's weights are not those the adapter was trained on ({origin}{revision}): load that one, or "
            "allow another base explicitly (allow_other_base)"
        )


def install_adapter(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], compact: bool = False) -> None:
    """What :func:`load_adapter` does once all is checked."""
    layers = build_layers(model, config, tensors, compact)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    copy_head(model, config, tensors)


@torch.no_grad()
def copy_head(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Copy the adapter's other parameters and buffers into the model's, and let the parameters train."""
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        state[name].copy_(tensors[name])
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(True)


@contextmanager
def keep_flags(model: nn.Module) -> Iterator[None]:
    """Every ``requires_grad`` of the model is afterwards what it was before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def build_layers(
    model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], compact: bool = False
) -> dict[str, LoRALayer]:
    """The adapter's layers over the model's weights, by name; the model's modules stay what they are."""
    layers: dict[str, LoRALayer] = {}
    parameters: dict[str, nn.Parameter] = {}
    for group in config.groups:
        options: dict[str, Any] = {} if group.kind == "lora" else {"init": group.init}
        if group.kind == "lora2":
            options["k"] = group.widths[0]
        if group.kind == "multiscale":
            options["widths"] = group.widths
        for name, flags in group.rank_pattern.items():
            old = model.get_submodule(name)
            layer = layers[name] = KINDS[group.kind].from_linear(
                old, group.r, group.lora_alpha, group.lora_dropout, fan_in_fan_out=_is_transposed(old), **options
            )
            live = [i for i, flag in enumerate(flags) if flag == "1"]
            layer.keep_singular_values(live if compact else range(len(flags)))
            parameters.update(zip(factor_names(name, layer), layer.lora_parameters(), strict=True))
            _fill(layer, range(layer.r) if compact else live, [tensors.get(n) for n in factor_names(name, layer)])
    for alias, stored in config.tied.items():
        layer_name, _, factor = alias.rpartition(".lora_")
        side, index = factor.split(".")
        getattr(layers[layer_name], f"lora_{side}")[int(index)] = parameters[stored]
    return layers


def _fill(layer: LoRALayer, live: Sequence[int], stored: list[Tensor | None]) -> None:
    """Copy what is stored into the factors; all else becomes zero. A factor that is not stored belongs to a layer that
    was pruned whole, or is replaced by the one it is tied to."""
    for parameter in layer.lora_parameters():
        parameter.data.zero_()
    pairs = zip(layer.select(live), stored, strict=True)
    layer.scatter(live, [zero if given is None else given for zero, given in pairs])


def _is_transposed(module: nn.Module) -> bool:
    return module.fan_in_fan_out if isinstance(module, LoRALayer) else is_conv1d(module)


def _check_modules(model: nn.Module, config: AdapterConfig) -> None:
    modules = dict(model.named_modules())
    theirs = f"the adapter was made for a {config.architecture}, this is a {type(model).__name__}"
    present = lora_layers(model)
    if any(layer.merged for layer in present.values()):
        raise ValueError("the model holds a merged adapter: call unmerge_adapter() first")
    for name in config.ranks:
        if name not in modules or not is_linear(modules[name]):
            raise ValueError(f"the model has no linear layer {name}: {theirs}")
    if present and set(present) != set(config.ranks):
        odd = sorted(set(present) ^ set(config.ranks))[0]
        raise ValueError(f"the model's low-rank layers are not the adapter's (see {odd}): load it into the plain base")
    state = model.state_dict(keep_vars=True)
    for name in config.head:
        if name not in state:
            raise ValueError(f"the model has no parameter {name}: {theirs}")


def _expected_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the factors that the adapter's file must hold, by the configuration and the model."""
    expected: dict[str, tuple[int, ...]] = {}
    for group in config.groups:
        for name, flags in group.rank_pattern.items():
            if len(flags) > group.r:
                raise ValueError(f"the adapter's rank pattern of {name} has {len(flags)} values, its rank is {group.r}")
            most = max(1024, *model.get_submodule(name).weight.shape)
            if max(group.r, *group.widths, 0) > most:  # where all is pruned no tensor vouches for them
                raise ValueError(f"the adapter's rank or width of {name} is beyond {most}")
            if "1" in flags:
                expected.update(_factor_shapes(name, model.get_submodule(name), group, flags.count("1")))
    for alias, stored in config.tied.items():
        shape = expected.pop(alias, None)
        if shape is None or expected.get(stored) != shape or not re.search(r"\.lora_[AB]\.\d+$", alias):
            raise ValueError(f"the adapter's configuration ties {alias} to {stored}, which does not fit")
    return expected


def _compare(expected: dict[str, tuple], found: dict[str, tuple], config: AdapterConfig) -> None:
    for name in sorted(set(expected) ^ set(found)):
        raise ValueError(f"{'unknown' if name in found else 'missing'} tensor {name} in the adapter's file")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{name} has shape {found[name]} in the adapter, the model needs {shape}: load the base it was "
                f"trained on ({config.base_model or config.architecture})"
            )


def _factor_shapes(name: str, module: nn.Module, group: LayerGroup, rank: int) -> dict[str, tuple[int, ...]]:
    """Shape of each factor that is stored for a module, by name."""
    rows, columns = module.weight.shape
    out, width = (columns, rows) if _is_transposed(module) else (rows, columns)
    inner = [*group.widths, rank]
    prefix = f"{name}." if name else ""
    shapes: dict[str, tuple[int, ...]] = {} if group.kind == "lora" else {f"{prefix}lora_E": (rank,)}
    for i, shape in enumerate(zip([out, *group.widths], inner, strict=True)):
        shapes[f"{prefix}lora_B.{i}"] = shape
    for i, shape in enumerate(zip(inner, [width, *group.widths], strict=True)):
        shapes[f"{prefix}lora_A.{i}"] = shape
    return shapes
