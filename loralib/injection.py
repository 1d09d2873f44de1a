"""Replace linear layers of any model by low-rank ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from loralib.checks import check_choice
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SoRALinear, SVDLinear, is_conv1d
from loralib.model import factors_of, lora_layers

KINDS: dict[str, type[LoRALayer]] = {
    preset.kind: preset for preset in (Linear, SVDLinear, LoRA2Linear, MultiScaleLinear, SoRALinear)
}

# The six names of the published scripts. DeBERTa calls its projections query_proj etc.; BERT, RoBERTa, ELECTRA query.
PUBLISHED_MODULES = {
    "query": r"(.*\.)?attention\.self\.query(_proj)?",
    "key": r"(.*\.)?attention\.self\.key(_proj)?",
    "value": r"(.*\.)?attention\.self\.value(_proj)?",
    "attention.output": r"(.*\.)?attention\.output\.dense",
    "intermediate": r"(.*\.)?layer\.\d+\.intermediate\.dense",
    "layer.output": r"(.*\.)?layer\.\d+\.output\.dense",
}
ALL_LINEAR, AUTO = "all-linear", "auto"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CASTS = "loralib.interop.precision"  # a low-rank layer does itself what the hooks of this module do
NEVER_CALLED = (
    "{} belongs to nn.MultiheadAttention, which reads its weight and never calls it: an update there would be ignored; "
    "name other modules"
)


def is_linear(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or isinstance(module, LoRALayer) or is_conv1d(module)
    return plain or _of_bitsandbytes(module)  # the latter is refused with what to do; left out, it would stay unadapted


def _of_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def module_type(name: str) -> str:
    """The module name without its layer numbers: encoder.layer.3.output.dense → encoder.layer.output.dense."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def match_modules(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Names of the linear layers that the patterns select, in the model's order.

    A pattern is one of the six published names (query, key, value, attention.output, intermediate, layer.output), a
    module name or its last dotted parts, a regular expression that matches a whole module name, or ``"all-linear"``:
    every linear layer of a transformers model but its head. ``"auto"``, given alone, means the six published names if
    the model has all of them, else ``"all-linear"``. A linear layer is an ``nn.Linear`` itself, a ``Conv1D`` or a
    low-rank layer; other subclasses of ``nn.Linear`` may compute something else.

    Raises:
        ValueError: for a pattern that selects no linear layer, is no valid regular expression, or selects only the
            output projection of ``nn.MultiheadAttention``, which reads its weight and never calls it.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    # The output projections of nn.MultiheadAttention.
    never_called = {f"{n}.out_proj" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    names = [n for n, module in model.named_modules() if n and n not in never_called and is_linear(module)]
    if patterns == [AUTO]:
        patterns = list(PUBLISHED_MODULES) if all(_match_one(p, names) for p in PUBLISHED_MODULES) else [ALL_LINEAR]
    chosen: set[str] = set()
    for pattern in patterns:
        found = _all_linear(model, names) if pattern == ALL_LINEAR else _match_one(pattern, names)
        if not found and (projections := _match_one(pattern, sorted(never_called))):
            raise ValueError(NEVER_CALLED.format(projections[0]))
        if not found:
            there = ", ".join(sorted({module_type(name) or name for name in names})[:30]) or "none below its root"
            raise ValueError(f"the module pattern {pattern!r} matches no linear layer; the model has: {there}")
        chosen.update(found)
    if not chosen:
        raise ValueError("target_modules is empty: name at least one module, for example query and value")
    return [name for name in names if name in chosen]


def _match_one(pattern: str, names: list[str]) -> list[str]:
    published = PUBLISHED_MODULES.get(pattern)
    found = [n for n in names if f".{n}".endswith(f".{pattern}") or (published and re.fullmatch(published, n))]
    if found:
        return found
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the module pattern {pattern!r} is not a valid regular expression: {error}") from None
    return [name for name in names if regex.fullmatch(name)]


def _all_linear(model: Any, names: list[str]) -> list[str]:
    if not hasattr(model, "base_model_prefix"):
        raise ValueError(f"{ALL_LINEAR!r} needs a transformers model, whose head is known: name the modules")
    head = model.get_output_embeddings()
    inside = set(model.base_model.modules()) - {head}
    if head is None and model.base_model is model and "For" in type(model).__name__:
        inside -= set(model.children())  # the head is one of them, as in T5ForQuestionAnswering
    return [name for name in names if model.get_submodule(name) in inside]


def inject(
    model: nn.Module,
    kind: str,
    target_modules: str | Iterable[str],
    *,
    r: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    share_outer: bool = False,
    **options: Any,
) -> list[str]:
    """Replace the selected linear layers of ``model`` in place, and freeze everything else.

    Unfreeze a new head afterwards: ``model.classifier.requires_grad_(True)``. A linear layer that several modules share
    becomes one low-rank layer that they share.

    Args:
        kind: ``"lora"``, ``"adalora"``, ``"lora2"``, ``"multiscale"`` or ``"sora"``.
        target_modules: patterns, see :func:`match_modules`.
        r, lora_alpha, lora_dropout: as for the layers.
        share_outer: layers of one module type (the same name but for numbers between dots, the same shape) share one
            pair of outer factors; needs at least two scales. Warns if there are several layers, but none share.
        options: the kind's own arguments: ``k`` (8) for ``"lora2"``, ``widths`` for ``"multiscale"``, and ``init``,
            ``"gaussian"`` (the default) or ``"orthogonal"``, for all kinds but ``"lora"`` and ``"sora"``.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: for an unknown kind, a model with layers of peft, a pattern that matches nothing, a layer that is
            low-rank already or cannot be replaced, or a value out of range. TypeError: for an argument that does not
            belong to the kind. The model is unchanged then.
    """
    check_choice("kind", kind, KINDS)
    widths, init = KINDS[kind].scales(**options)
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("inject would freeze peft's adapters: use LoRA² in peft too (loralib.interop.peft_method)")
    if share_outer and not widths:
        raise ValueError(f"share_outer needs two or more scales; {kind!r} has one here")
    modules = {name: model.get_submodule(name) for name in match_modules(model, target_modules)}
    for name, module in modules.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} is a low-rank layer already: inject once, or name other modules")
        check_replaceable(name, module)
    new = KINDS[kind].from_linear
    layers = {name: new(module, r, lora_alpha, lora_dropout, widths, init) for name, module in modules.items()}
    if share_outer:
        _share_outer_factors(layers)
    put_in_place(model, {id(modules[name]): layer for name, layer in layers.items()})
    factors = set(map(id, factors_of(model)))
    for parameter in model.parameters():
        parameter.requires_grad = parameter.requires_grad and id(parameter) in factors
    return list(layers)


def check_replaceable(name: str, module: nn.Module) -> None:
    """Raises ValueError if a linear layer is of bitsandbytes; has hooks, which may compute its weight or output; or if
    its forward method was replaced, as accelerate does for a ``device_map``."""
    if _of_bitsandbytes(module):
        raise ValueError(f"{name} is quantised by bitsandbytes: use LoRA² in peft (loralib.interop.peft_method)")
    own_forward = vars(module).get("forward")  # accelerate puts the class's there when it removes its hook
    if own_forward is not None and getattr(own_forward, "__func__", None) is not type(module).forward:
        raise ValueError(f"the forward method of {name} was replaced, which would be lost: restore it, or use LoRA² in "
                         "peft (loralib.interop.peft_method)")  # fmt: skip
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    if any(getattr(hook, "__module__", None) != _CASTS for hook in hooks):
        raise ValueError(f"{name} has a hook (pruning, weight_norm), which would be lost: remove it")


def put_in_place(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace each module whose id is a key of ``new``, under all of its parents."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):  # named_children() lists a shared module only once
            if id(module) in new:
                setattr(parent, child, new[id(module)])
    refuse_packed_batches(model)


def refuse_packed_batches(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from packing padded batches: low-rank layers cannot read nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and lora_layers(module):
            module.use_nested_tensor = False


def _share_outer_factors(layers: dict[str, LoRALayer]) -> None:
    owners: dict[tuple[str, int, int], LoRALayer] = {}
    for name, layer in layers.items():
        owner = owners.setdefault((module_type(name), layer.out_features, layer.in_features), layer)
        layer.lora_B[0], layer.lora_A[0] = owner.lora_B[0], owner.lora_A[0]
    if len(layers) > 1 and len(owners) == len(layers):
        warnings.warn(
            "share_outer shares nothing: no two layers have the same shape, and the same name but for numbers between "
            "dots (block.1 and block.2; not block1 and block2)",
            stacklevel=3,
        )
