"""Separate learning rates for singular values, LoRA's B and the head."""

from __future__ import annotations

from torch import nn

from loralib.checks import check_positive
from loralib.model import factors_of, lora_layers, svd_layers


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    value_lr_ratio: float = 1.0,
    b_lr_ratio: float = 1.0,
    head_lr: float | None = None,
) -> list[dict]:
    """One group for an optimiser per learning rate; every trainable parameter is in exactly one. Weight decay is the
    caller's.

    Args:
        lr: learning rate of the factors.
        value_lr_ratio: rate of the singular values e, in multiples of ``lr``.
        b_lr_ratio: rate of LoRA's B, in multiples of ``lr`` (LoRA+, arXiv 2402.12354, which takes 16).
        head_lr: rate of what trains besides the factors; ``lr`` where None. Unfreeze a new head before.

    Raises:
        ValueError: for a rate out of range, a ratio of something the model lacks, and a model in which nothing trains,
            or no head where it has a rate.
    """
    rates = {"lr": lr, "value_lr_ratio": value_lr_ratio, "b_lr_ratio": b_lr_ratio}
    for name, value in (rates if head_lr is None else rates | {"head_lr": head_lr}).items():
        check_positive(name, value)
    plain = [layer for layer in lora_layers(model).values() if layer.lora_E is None and layer.r > 0]
    ratios: dict[int, float] = {}
    for name, ratio, own in (
        ("value_lr_ratio", value_lr_ratio, [layer.lora_E for layer in svd_layers(model).values()]),
        ("b_lr_ratio", b_lr_ratio, [layer.lora_B[0] for layer in plain]),
    ):
        if ratio != 1 and not own:
            raise ValueError(f"{name} is for parameters that this model lacks: singular values have value_lr_ratio, "
                             "LoRA's B has b_lr_ratio")  # fmt: skip
        ratios |= dict.fromkeys(map(id, own), ratio)
    factors = set(map(id, factors_of(model)))
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        rate = lr * ratios.get(id(parameter), 1.0)
        groups.setdefault(rate if head_lr is None or id(parameter) in factors else head_lr, []).append(parameter)
    if not groups:
        raise ValueError("nothing trains: inject low-rank layers first")
    if head_lr is not None and all(id(p) in factors for group in groups.values() for p in group):
        raise ValueError("head_lr is for what trains besides the factors, and nothing does: unfreeze the head first")
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
