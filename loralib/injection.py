"""Replace linear layers of any model by low-rank ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loralib.checks import check_choice
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear
from loralib.model import factors_of, lora_layers, refuse_data_parallel
from loralib.stored_weight import is_conv1d

KINDS: dict[str, type[LoRALayer]] = {cls.kind: cls for cls in (Linear, SVDLinear, LoRA2Linear, MultiScaleLinear)}

# The six names of the published scripts. DeBERTa calls its projections query_proj etc.; BERT, RoBERTa, ELECTRA query.
PUBLISHED_MODULES = {
    "query": r"(.*\.)?attention\.self\.query(_proj)?",
    "key": r"(.*\.)?attention\.self\.key(_proj)?",
    "value": r"(.*\.)?attention\.self\.value(_proj)?",
    "attention.output": r"(.*\.)?attention\.output\.dense",
    "intermediate": r"(.*\.)?layer\.\d+\.intermediate\.dense",
    "layer.output": r"(.*\.)?layer\.\d+\.output\.dense",
}

# The first three are accelerate's, on a model that it has put on several devices.
_NOT_HANDED_OVER = ("_hf_hook", "_old_forward", "forward")
NEVER_CALLED = (
    "{} belongs to nn.MultiheadAttention, which reads its weight and never calls it: an update there would be ignored; "
    "name other modules"
)


@cache
def _own_names() -> frozenset[str]:
    """What a low-rank layer has and a linear one has not."""
    with torch.random.fork_rng(devices=[]):  # both draw their values
        low_rank, linear = LoRA2Linear(1, 1, 1, 1.0, device="cpu"), nn.Linear(1, 1, device="cpu")
    return frozenset(dir(low_rank)) - frozenset(dir(linear))


def is_linear(module: nn.Module) -> bool:
    quantised = type(module).__name__ == "Linear4bit"  # bitsandbytes'; torchao leaves the layer an nn.Linear
    return type(module) is nn.Linear or isinstance(module, LoRALayer) or is_conv1d(module) or quantised


def module_type(name: str) -> str:
    """The module name without its layer numbers: encoder.layer.3.output.dense → encoder.layer.output.dense."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def match_modules(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Names of the linear layers that the patterns select, in the model's order.

    A pattern is one of the six published names (query, key, value, attention.output, intermediate, layer.output), a
    module name or its last dotted parts, or a regular expression that matches a whole module name. A linear layer is an
    ``nn.Linear`` itself: a subclass may compute something else.

    Raises:
        ValueError: for a pattern that selects no linear layer, is no valid regular expression, or selects only the
            output projection of ``nn.MultiheadAttention``, which reads its weight and never calls it. Subclasses of
            ``nn.Linear`` and tensors that hold all experts do not count; of a pattern that also selects linear layers
            they are only warned of.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ValueError(f"target_modules must be names, got {wrong[0]!r:.80}")
    if not all(patterns) or not patterns:
        raise ValueError("target_modules is empty: name at least one module, for example query and value")
    never_called = modules_never_called(model)
    names = [n for n, module in model.named_modules() if n and n not in never_called and is_linear(module)]
    refusals = {n: refusal for n, refusal in _no_plain_linear(model) if n not in never_called}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = _match_one(pattern, [*names, *refusals])
        found = [name for name in matched if name not in refusals]
        others = [name for name in matched if name in refusals]
        if not found and (projections := _match_one(pattern, sorted(never_called))):
            raise ValueError(NEVER_CALLED.format(projections[0]))
        if others:
            if not found:
                raise ValueError(refusals[others[0]])
            more = f" and {len(others) - 1} more stay" if len(others) > 1 else " stays"
            warnings.warn(f"{refusals[others[0]]}: it{more} as before", stacklevel=3)
        if not found:
            there = ", ".join(sorted({module_type(name) or name for name in names})[:30]) or "none below its root"
            raise ValueError(f"the module pattern {pattern!r} matches no linear layer; the model has: {there}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def modules_never_called(model: nn.Module) -> set[str]:
    """Names of the output projections of ``nn.MultiheadAttention``, which reads their weight and passes forward by."""
    return {f"{n}.out_proj" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}


def _no_plain_linear(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names that a user may take for linear layers, with the reason why none is there to replace."""
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Linear) and not is_linear(module):
            kind = type(module).__name__
            refusal = f"{name} is a {kind}, and only nn.Linear itself can be replaced, not a subclass"
            yield name, f"{refusal} (peft may adapt it: LoRA2Config of loralib.interop.peft_method)"
        for own, parameter in module.named_parameters(recurse=False):
            stacked = not is_lazy(parameter) and parameter.dim() == 3 and len(parameter) > 1  # (1, n, d) are embeddings
            if stacked and not isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
                place, shape = name if own == "weight" else f"{name}.{own}".lstrip("."), tuple(parameter.shape)
                yield place, f"{place} is one tensor of shape {shape}, not a linear layer, and cannot be replaced"


def _match_one(pattern: str, names: list[str]) -> list[str]:
    published = PUBLISHED_MODULES.get(pattern, r"\b\B")  # which matches nothing
    found = [n for n in names if n == pattern or n.endswith(f".{pattern}") or re.fullmatch(published, n)]
    if found:
        return found
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the module pattern {pattern!r} is not a valid regular expression: {error}") from None
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
    freeze: bool = True,
) -> list[str]:
    """Replace the selected linear layers of ``model`` in place, and freeze everything else.

    Unfreeze a new head afterwards: ``model.classifier.requires_grad_(True)``. A linear layer that several modules hold
    becomes one low-rank layer that all of them hold. Hooks, and further attributes, buffers and parameters of a
    replaced layer are the new layer's.

    Args:
        kind: ``"lora"``, ``"adalora"``, ``"lora2"`` or ``"multiscale"``.
        target_modules: patterns, see :func:`match_modules`.
        r, lora_alpha, lora_dropout: as for the layers.
        k: LoRA²'s width (8 where not given); only for ``"lora2"``.
        widths: widths from the outermost inward ((8,) where not given); only for ``"multiscale"``.
        share_outer: layers of one module type (the same name but for numbers between dots, the same shape) hold one and
            the same pair of outer factors; needs at least two scales. Warns where no two layers do.
        init: ``"gaussian"`` (default) or ``"orthogonal"``; not for ``"lora"``.
        freeze: whether parameters that are no low-rank factors stop training.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: for an unknown kind, a pattern that matches nothing, a layer that is low-rank already or cannot be
            replaced, arguments that do not belong to the kind, or a model in DistributedDataParallel. The model is
            unchanged then.
    """
    refuse_data_parallel(model, "inject the layers")
    check_choice("kind", kind, KINDS)
    options = {n: value for n, value in (("k", k), ("widths", widths), ("init", init)) if value is not None}
    for option in options:
        if option not in KINDS[kind].arguments:
            owners = ", ".join(repr(other) for other, cls in KINDS.items() if option in cls.arguments)
            raise ValueError(f"{option} belongs to kind {owners}, not to {kind!r}")
    defaults = KINDS[kind].arguments
    if share_outer and "k" not in defaults and not options.get("widths", defaults.get("widths")):
        raise ValueError(f"share_outer needs two or more scales; {kind!r} has one here")
    modules = {name: model.get_submodule(name) for name in match_modules(model, target_modules)}
    for name, module in modules.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} is a low-rank layer already: inject once, or name other modules")
        check_replaceable(name, module)
    refuse_compiled(modules)
    layers = {
        name: KINDS[kind].from_linear(module, r, lora_alpha, lora_dropout, **options)
        for name, module in modules.items()
    }
    if share_outer:
        _share_outer_factors(layers)
    replace_modules(model, layers)
    if freeze:
        factors = set(map(id, factors_of(model)))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in factors)
    return list(layers)


def check_replaceable(name: str, module: nn.Module) -> None:
    """Raises ValueError where a linear layer computes something else than its own weight and forward pass say, or has
    an attribute that a low-rank layer uses for itself."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    if not isinstance(module, LoRALayer) and (taken := sorted(_own_names() & own)):
        raise ValueError(f"{name} has an attribute {taken[0]!r}, which a low-rank layer uses for itself: rename it")
    hook = vars(module).get("_hf_hook")
    if getattr(hook, "offload", False):
        raise ValueError(f"accelerate has moved {name} out of memory: load the model without offloading")
    if isinstance(module.weight, Tensor) and module.weight.is_complex():
        raise ValueError(f"the weight of {name} is complex, and an update is real: name other modules")
    own_forward = vars(module).get("forward")  # accelerate leaves the class's there when its hook is removed
    usual = own_forward is None or getattr(own_forward, "__func__", None) is type(module).forward
    if not usual and not _is_dispatched(module):
        raise ValueError(f"the forward method of {name} was replaced, which an update would undo: remove that first")
    if not isinstance(module.weight, nn.Parameter):
        raise ValueError(
            f"the weight of {name} is computed by a hook (weight_norm, spectral_norm, pruning): remove that first"
        )


def refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a module that is to be replaced was compiled: it would go on in its replacement."""
    for name, module in modules.items():
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{name} was compiled on its own, which an update would undo: call its compile() afterwards"
            )


def _is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward method by one that first moves the inputs to the weight's device."""
    return getattr(vars(module).get("_hf_hook"), "offload", None) is False


def replace_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer wherever the model holds the module of that name, and give it what that module had besides: hooks
    (their handles go on working), attributes, buffers, parameters."""
    replaced = {name: model.get_submodule(name) for name in layers}
    replacement = {id(replaced[name]): layer for name, layer in layers.items()}
    for name, layer in layers.items():
        _hand_over(replaced[name], layer)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):  # named_children() gives a module once
            if id(module) in replacement:
                setattr(parent, child, replacement[id(module)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and lora_layers(module):
            module.use_nested_tensor = False  # its attention takes those without gradients only


def _hand_over(old: nn.Module, new: nn.Module) -> None:
    for name, value in vars(old).items():
        if name in _NOT_HANDED_OVER:
            continue
        if name not in vars(new) and name not in new._parameters:
            setattr(new, name, value)
        elif "_hooks" in name:  # the same dictionary, since a handle removes its hook from there
            known = list(value.values())
            value.update((key, hook) for key, hook in vars(new)[name].items() if hook not in known)
            vars(new)[name] = value
    new._is_full_backward_hook = old._is_full_backward_hook
    for name, parameter in old._parameters.items():
        if name not in new._parameters and name not in _own_names():
            new.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        if name not in new._buffers:
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, child in old.named_children():
        if name not in new._modules:
            new.add_module(name, child)
    if _is_dispatched(old):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


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
