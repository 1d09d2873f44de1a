"""Half-precision frozen weights beside float32 adapters, with no weight cast in any step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loralib.layers import LoRALayer


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store every frozen floating-point parameter in ``dtype``; trainable ones become float32 and stay so.

    The low-rank layers compute in the dtype of their frozen weight and take both dtypes as they are. Any other module
    that holds trainable parameters of its own (the classification head) gets its inputs cast to float32.

    Args:
        model: its ``requires_grad`` flags say what is frozen; set them first.
        dtype: a floating-point dtype, normally ``torch.bfloat16``.

    Raises:
        ValueError: for a dtype that is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"frozen weights are stored in a floating-point dtype, got {dtype}")
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        for parameter in own:
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        if any(p.requires_grad for p in own) and not isinstance(module, (LoRALayer, nn.ParameterList)):
            module.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
