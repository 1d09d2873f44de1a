"""Separate learning rates for singular values, LoRA's B and the head."""

from __future__ import annotations

from torch import nn

from loralib.model import factors_of, lora_layers, svd_layers


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    value_lr_ratio: float = 1.0,
    b_lr_ratio: float = 1.0,
    head_lr: float | None = None,
) -> list[dict]:
    """Group the trainable parameters for an optimiser, one group per learning rate and each parameter in one group.
    Weight decay is left to the caller.

    Args:
        lr: learning rate of the factors.
        value_lr_ratio: rate of the singular values e, in multiples of ``lr``; run_glue.py gives 4 for the methods
            lora2_plus and lora2_shared (configs/methods/).
        b_lr_ratio: rate of LoRA's B, in multiples of ``lr`` (LoRA+, arXiv 2402.12354, which uses 16).
        head_lr: rate of the trainable parameters that are not factors; None is ``lr``. Unfreeze a new head first.

    Raises:
        ValueError: if ``head_lr`` is given and only the factors are trainable.
    """
    ratios = {id(layer.lora_E): value_lr_ratio for layer in svd_layers(model).values()}
    plain = [layer for layer in lora_layers(model).values() if layer.lora_E is None and layer.r > 0]
    ratios |= {id(layer.lora_B[0]): b_lr_ratio for layer in plain}
    factors = set(map(id, factors_of(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if head_lr is not None and all(id(p) in factors for p in trained):
        raise ValueError("head_lr has no effect, because only the factors are trainable: unfreeze the head first")
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in trained:
        rate = lr * ratios.get(id(parameter), 1.0)
        groups.setdefault(rate if head_lr is None or id(parameter) in factors else head_lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
