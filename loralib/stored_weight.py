"""The form and shape in which a frozen weight is stored, found without importing the library that made it."""

from __future__ import annotations

from torch import Tensor, nn


def stored_form(weight: Tensor) -> str | None:
    """How a weight is stored: None if it holds its values, ``"sharded"`` if it holds a part of them (FSDP's DTensor),
    ``"quantised"`` if it encodes them in another form (torchao's tensors, bitsandbytes' ``Params4bit``)."""
    if hasattr(weight, "full_tensor"):
        return "sharded"
    return "quantised" if hasattr(weight, "quant_state") or hasattr(weight, "__tensor_flatten__") else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, weight stored (in, out); recognised by name and shape, without an import."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


def frozen_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer. A quantised weight may be packed into another shape."""
    if stored_form(linear.weight) == "quantised":
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return (columns, rows) if is_conv1d(linear) else (rows, columns)
