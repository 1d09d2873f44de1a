"""Keep frozen weights in half precision beside float32 adapters, so that no step has to cast a weight."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loralib.injection import is_linear
from loralib.layers import LoRALayer, stored_form
from loralib.update import LowRankUpdate


def cast_frozen(model: nn.Module, dtype: torch.dtype, head: nn.Module | Iterable[nn.Module] = ()) -> None:
    """Store every frozen floating-point parameter in ``dtype``; trainable ones and the head's become float32.

    If every linear layer outside the head is trainable, nothing has been frozen for a training yet, and everything but
    the head counts as frozen: cast first, then quantise or inject.

    The low-rank layers compute in the dtype of their frozen weight and accept inputs, factors and a bias in either
    dtype. Any other module with a trainable parameter of its own, or with a floating-point buffer beside its parameters
    (BatchNorm), stays float32 as a whole: its inputs are cast to float32, and its outputs to ``dtype`` for the frozen
    modules that may follow. The head's inputs are cast to float32 too, and its outputs stay float32. Buffers keep their
    dtype. To undo all this, call the function again with float32.

    Args:
        model: its ``requires_grad`` flags say what is frozen, once a linear layer is. Call this again if they change.
        dtype: a floating-point dtype, normally ``torch.bfloat16``.
        head: the last module or modules of the model, for example a classifier and the pooler before it.

    Raises:
        ValueError: for a quantised, sharded or merged weight. The model is unchanged then.
    """
    for name, parameter in model.named_parameters():
        if (form := stored_form(parameter)) is not None:
            raise ValueError(f"{name} is {form}: cast the plain model before it is {form}")
    if any(getattr(module, "merged", False) for module in model.modules()):  # peft's layers too
        raise ValueError("a low-rank layer is merged, and unmerging would undo its cast: unmerge before the cast")
    in_head = {module for part in ([head] if isinstance(head, nn.Module) else head) for module in part.modules()}
    buffers = [(m, b) for m in model.modules() for b in m._buffers.values() if b is not None]
    # A buffer without dimensions, such as a scale, does not change the dtype of what is computed with it.
    buffered = {module for module, buffer in buffers if buffer.is_floating_point() and buffer.dim()}
    kept = _kept_parameters(model, in_head | buffered)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in kept else dtype)
    computing = [module for module in model.modules() if _computing(module)]
    in_float32 = {module for module in computing if any(id(p) in kept for p in _computing(module))}
    inner = in_float32 - in_head
    for module in computing:
        if module in in_float32:
            _set_border(module, torch.float32, dtype if module in inner and module is not model else None)
        else:  # if the model reads token ids and has no float32 module inside, inputs are not float32: no hook
            reached = inner or buffered or getattr(model, "main_input_name", None) != "input_ids"
            _set_border(module, dtype if reached and not isinstance(module, LoRALayer) else None, None)


def _computing(module: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters that must share one dtype for the module's own forward pass to work."""
    if isinstance(module, LoRALayer):
        parameters = [module.weight]  # the layer computes in its dtype, and casts its bias and factors itself
    elif isinstance(module, nn.ParameterList | LowRankUpdate):
        parameters = []  # a list computes nothing, and an update casts its factors
    else:  # attention passes its projection's parameters to a function, and does not call the projection
        parameters = module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    return [p for p in parameters if p.is_floating_point()]


def _kept_parameters(model: nn.Module, chosen: Collection[nn.Module]) -> set[int]:
    """Ids of the parameters that stay float32: trainable ones, those of the chosen modules, and all that one module
    uses together with such a parameter, also if modules share it."""
    parameters = list(model.parameters())
    outside = [module for module in model.modules() if module not in chosen]
    weights = [module.weight for module in outside if is_linear(module)] or parameters
    fresh = all(weight.requires_grad for weight in weights)
    kept = {id(p) for p in parameters if p.requires_grad and not fresh}
    kept.update(id(p) for module in chosen for p in module.parameters(recurse=False))
    groups = [_computing(module) for module in model.modules()]
    groups += [module.lora_parameters() for module in model.modules() if isinstance(module, LowRankUpdate)]
    shared = [{id(p) for p in group} for group in groups]
    before = -1
    while before != len(kept):
        before = len(kept)
        kept.update(*(group for group in shared if group & kept))
    return kept


def _set_border(module: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype | None) -> None:
    """Set the dtypes of a module's inputs and outputs. The hooks read them, so that a second call adds no hook."""
    if not hasattr(module, "_border"):
        if inputs is None:
            return
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        module.register_forward_hook(_cast_outputs)
    module._border = (inputs, outputs)


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    dtype = module._border[0]
    if dtype is not None:
        dtype = next((p.dtype for p in _computing(module)), dtype)  # the model may have been cast since
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output, module._border[1])


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in ``dtype`` (None: as they are), also inside tuples, lists and dictionaries."""
    if dtype is None:
        return value
    return tree_map_only(Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, value)
