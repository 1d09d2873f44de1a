"""The form and shape in which a frozen weight is stored, found without importing the library that made it."""

from __future__ import annotations

from torch import Tensor, nn


def stored_form(weight: Tensor) -> str | None:
    """What a weight stores: None, its values; ``"sharded"``, a part of them (FSDP's DTensor); ``"quantised"``, other
    numbers that stand for them (torchao's tensors, bitsandbytes' ``Params4bit``)."""
    if hasattr(weight, "full_tensor"):
        return "sharded"
    return "quantised" if hasattr(weight, "quant_state") or hasattr(weight, "__tensor_flatten__") else None


def frozen_shape(linear: nn.Module, fan_in_fan_out: bool) -> tuple[int, int]:
    """(out, in) of a linear layer. A packed weight has another shape.

    Args:
        fan_in_fan_out: the weight is stored (in, out).
    """
    if stored_form(linear.weight) == "quantised":
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return (columns, rows) if fan_in_fan_out else (rows, columns)
