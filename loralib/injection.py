"""Replace linear layers of any model by low-rank ones, and say what trains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear, lora_layers

KINDS: dict[str, type[LoRALayer]] = {
    "lora": Linear,
    "adalora": SVDLinear,
    "lora2": LoRA2Linear,
    "multiscale": MultiScaleLinear,
}
BIASES = ("none", "all", "lora_only")

# The six names of the published scripts. DeBERTa calls its projections query_proj etc.; BERT, RoBERTa, ELECTRA query.
PUBLISHED_MODULES = {
    "query": r"(.*\.)?attention\.self\.query(_proj)?",
    "key": r"(.*\.)?attention\.self\.key(_proj)?",
    "value": r"(.*\.)?attention\.self\.value(_proj)?",
    "attention.output": r"(.*\.)?attention\.output\.dense",
    "intermediate": r"(.*\.)?layer\.\d+\.intermediate\.dense",
    "layer.output": r"(.*\.)?layer\.\d+\.output\.dense",
}


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, weight stored (in, out); told by name and shape so that no library need be imported."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, LoRALayer) or is_conv1d(module)


def module_type(name: str) -> str:
    """The module name without its layer numbers: encoder.layer.3.output.dense → encoder.layer.output.dense."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def match_modules(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Names of the linear layers that the patterns select, in the model's order.

    A pattern is one of the six published names (query, key, value, attention.output, intermediate, layer.output), a
    module name or its last dotted parts, or a regular expression that matches a whole module name.

    Raises:
        ValueError: for a pattern that selects no linear layer, or that is no valid regular expression.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not patterns:
        raise ValueError("target_modules is empty: name at least one module, for example query and value")
    names = [name for name, module in model.named_modules() if name and is_linear(module)]
    chosen: set[str] = set()
    for pattern in patterns:
        found = _match_one(pattern, names)
        if not found:
            there = ", ".join(sorted({module_type(name) for name in names})[:30])
            raise ValueError(f"the module pattern {pattern!r} matches no linear layer; the model has: {there}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _match_one(pattern: str, names: list[str]) -> list[str]:
    found = []
    if pattern in PUBLISHED_MODULES:
        found = [name for name in names if re.fullmatch(PUBLISHED_MODULES[pattern], name)]
    found = found or [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if found:
        return found
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the module pattern {pattern!r} is no valid regular expression: {error}") from None
    return [name for name in names if regex.fullmatch(name)]


def inject(
    model: nn.Module,
    kind: str,
    target_modules: str | Iterable[str],
    *,
    r: int = 8,
    k: int | None = None,
    widths: Sequence[int] | None = None,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    share_outer: bool = False,
    init: str | None = None,
) -> list[str]:
    """Replace the selected linear layers of ``model`` in place.

    Args:
        kind: ``"lora"``, ``"adalora"``, ``"lora2"`` or ``"multiscale"``.
        target_modules: patterns, see :func:`match_modules`.
        r, lora_alpha, lora_dropout: as for the layers.
        k: LoRA²'s width (8 where not given); only for ``"lora2"``.
        widths: widths from the outermost inward ((8,) where not given); only for ``"multiscale"``.
        share_outer: layers of one module type (the same name but for the layer number, the same shape) hold one and the
            same pair of outer factors; needs at least two scales.
        init: ``"gaussian"`` (default) or ``"orthogonal"``; not for ``"lora"``.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: for an unknown kind, a pattern that matches nothing, a layer that is low-rank already, or arguments
            that do not belong to the kind. The model is unchanged then.
    """
    options = _kind_options(kind, k, widths, init)
    if share_outer and "k" not in options and not options.get("widths"):
        raise ValueError(f"share_outer needs two or more scales; {kind!r} has one here")
    names = match_modules(model, target_modules)
    for name in names:
        if isinstance(model.get_submodule(name), LoRALayer):
            raise ValueError(f"{name} is a low-rank layer already: inject once, or name other modules")
    layers: dict[str, LoRALayer] = {}
    for name in names:
        old = model.get_submodule(name)
        layers[name] = KINDS[kind].from_linear(
            old, r, lora_alpha, lora_dropout, fan_in_fan_out=is_conv1d(old), **options
        )
    if share_outer:
        _share_outer_factors(layers)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return names


def _kind_options(kind: str, k: int | None, widths: Sequence[int] | None, init: str | None) -> dict[str, Any]:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if k is not None and kind != "lora2":
        raise ValueError(f"k belongs to kind 'lora2', not to {kind!r}")
    if widths is not None and kind != "multiscale":
        raise ValueError(f"widths belongs to kind 'multiscale', not to {kind!r}")
    if init is not None and kind == "lora":
        raise ValueError("init belongs to the layers with singular values; LoRA has its own initialisation")
    options: dict[str, Any] = {} if init is None else {"init": init}
    if kind == "lora2":
        options["k"] = 8 if k is None else k
    if kind == "multiscale":
        options["widths"] = tuple((8,) if widths is None else widths)
    return options


def _share_outer_factors(layers: dict[str, LoRALayer]) -> None:
    owners: dict[tuple[str, int, int], LoRALayer] = {}
    for name, layer in layers.items():
        owner = owners.setdefault((module_type(name), layer.out_features, layer.in_features), layer)
        layer.lora_B[0], layer.lora_A[0] = owner.lora_B[0], owner.lora_A[0]


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze everything but the factors of the low-rank layers.

    Args:
        bias: which biases train too: ``"none"``, ``"all"``, or ``"lora_only"``, those of the low-rank layers.

    Raises:
        ValueError: for another ``bias``, or a model without low-rank layers.
    """
    check_bias(bias)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no low-rank layers: call inject() first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bias == "all" and name.split(".")[-1] == "bias")
    for layer in layers.values():
        for parameter in layer.lora_parameters():
            parameter.requires_grad_(True)
        if bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)


def check_bias(bias: str) -> None:
    """Raises ValueError unless ``bias`` is one of :data:`BIASES`."""
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
