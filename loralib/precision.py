"""Half-precision frozen weights beside float32 adapters, with no weight cast in any step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loralib.layers import LoRALayer


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store every frozen floating-point parameter in ``dtype``; trainable ones become float32 and stay so.

    The low-rank layers compute in the dtype of their frozen weight and take inputs, factors and a bias of either. Any
    other module with a trainable parameter of its own stays float32 as a whole, and is given float32 inputs. What it
    returns is cast to ``dtype``, but for the head: the modules trained whole that come last in the model, in the order
    in which modules were registered. Nothing of this dtype comes after them, and their logits keep full precision.

    Args:
        model: its ``requires_grad`` flags say what is frozen; set them first, and call this again when they change.
        dtype: a floating-point dtype, normally ``torch.bfloat16``.

    Raises:
        ValueError: for a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"frozen weights are stored in a floating-point dtype, got {dtype}")
    kept = _kept_parameters(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in kept else dtype)
    computing = [module for module in model.modules() if _computing(module)]
    in_float32 = {module for module in computing if any(id(p) in kept for p in _computing(module))}
    head = _head(model)
    inner = in_float32 - head
    for module in computing:
        if module in in_float32:
            _set_border(module, torch.float32, dtype if module in inner and module is not model else None)
        else:  # beside a head alone nothing in float32 reaches it: not even a look at its inputs is needed then
            _set_border(module, dtype if inner and not isinstance(module, LoRALayer) else None, None)


def _computing(module: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters that must share one dtype for the module's own forward pass to work."""
    if isinstance(module, LoRALayer):
        parameters = [module.weight]  # whose dtype the layer computes in; it casts its bias and factors itself
    elif isinstance(module, nn.ParameterList):
        parameters = []  # computes nothing
    else:  # attention hands its projection's parameters to one function, past the projection's own forward
        parameters = module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    return [p for p in parameters if p.is_floating_point()]


def _kept_parameters(model: nn.Module) -> set[int]:
    """Ids of what stays float32: all that trains, and what is used beside it, also where modules share a parameter."""
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    groups = [_computing(module) for module in model.modules()]
    groups += [module.lora_parameters() for module in model.modules() if isinstance(module, LoRALayer)]
    groups = [{id(p) for p in group} for group in groups]
    before = -1
    while before != len(kept):
        before = len(kept)
        kept.update(*(group for group in groups if group & kept))
    return kept


def _head(module: nn.Module) -> set[nn.Module]:
    """The modules trained whole that end the model, and those that end a last part trained in part (BERT's pooler)."""
    found: set[nn.Module] = set()
    for child in reversed(list(module.children())):
        parameters = list(child.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            found.update(child.modules())
        elif parameters:
            return found | _head(child)
    return found


def _set_border(module: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype | None) -> None:
    """Say what a module's inputs and outputs are cast to; the hooks read it, so a second call adds none."""
    if not hasattr(module, "_border"):
        if inputs is None:
            return
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        module.register_forward_hook(_cast_outputs)
    module._border = (inputs, outputs)


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _cast(args, module._border[0]), _cast(kwargs, module._border[0])


def _cast_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output, module._border[1])


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in ``dtype`` (None: as they are), also inside tuples, lists and dictionaries."""
    if dtype is None:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
