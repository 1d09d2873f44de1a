"""The form in which a frozen weight is stored, told without an import of what makes it, and the shapes around it."""

from __future__ import annotations

from collections.abc import Sequence

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


def factor_shapes(
    out_features: int, in_features: int, widths: Sequence[int], r: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shapes of the left and of the right factors, from the outermost inward."""
    inner = [*widths, r]
    left, right = zip([out_features, *widths], inner, strict=True), zip(inner, [in_features, *widths], strict=True)
    return list(left), list(right)
