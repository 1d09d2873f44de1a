"""The learning rates of the singular values e, of LoRA's B and of the head. Importing this file loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# The defaults, also of run_glue.py's flags. configs/methods/ gives the plus variants and lora2_shared 4, lora_plus 16.
VALUE_LR_RATIO = 1.0  # of e
B_LR_RATIO = 1.0  # of LoRA's B


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    value_lr_ratio: float = VALUE_LR_RATIO,
    b_lr_ratio: float = B_LR_RATIO,
    head_lr: float | None = None,
) -> list[dict]:
    """Group the trainable parameters for an optimiser, one group per learning rate and each parameter in one group.
    Weight decay is left to the caller.

    Args:
        lr: learning rate of the factors.
        value_lr_ratio: rate of the singular values e, in multiples of ``lr``.
        b_lr_ratio: rate of LoRA's B, in multiples of ``lr`` (LoRA+, arXiv 2402.12354, which uses 16).
        head_lr: rate of the trainable parameters that are not factors; None is ``lr``. Unfreeze a new head first.

    Raises:
        ValueError: if ``head_lr`` is given and only the factors are trainable.
    """
    from loralib.model import factors_of, lora_layers

    layers = lora_layers(model).values()
    ratios = {id(layer.lora_E): value_lr_ratio for layer in layers if layer.lora_E is not None}
    ratios |= {id(layer.lora_B[0]): b_lr_ratio for layer in layers if layer.lora_E is None and layer.r > 0}
    factors = set(map(id, factors_of(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if head_lr is not None and all(id(p) in factors for p in trained):
        raise ValueError("head_lr has no effect, because only the factors are trainable: unfreeze the head first")
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in trained:
        rate = lr * ratios.get(id(parameter), 1.0)
        groups.setdefault(rate if head_lr is None or id(parameter) in factors else head_lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
