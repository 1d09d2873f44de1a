"""Separate learning rates for singular values, LoRA's B and the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loralib.checks import check_positive
from loralib.exact_factors import distinct_factors, factors_are_orthonormal
from loralib.layers import LoRALayer
from loralib.model import factors_of, lora_layers, svd_layers


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    value_lr_ratio: float | str = 1.0,
    b_lr_ratio: float = 1.0,
    head_lr: float | None = None,
) -> list[dict]:
    """One group for an optimiser per learning rate; every trainable parameter is in exactly one. Weight decay is the
    caller's.

    Args:
        lr: learning rate of the factors.
        value_lr_ratio: rate of the singular values e, in multiples of ``lr``. ``"auto"`` chooses it per layer, see
            :func:`matching_value_ratio`.
        b_lr_ratio: rate of LoRA's B, in multiples of ``lr`` (LoRA+, arXiv 2402.12354, which takes 16).
        head_lr: rate of what trains besides the factors; ``lr`` where None. Unfreeze a new head before.

    Raises:
        ValueError: for a rate out of range, a ratio of something the model lacks, ``"auto"`` where factors are not
            orthonormal, and a model in which nothing trains, or no head where it has a rate.
    """
    for name, value in (("lr", lr), ("b_lr_ratio", b_lr_ratio), ("head_lr", lr if head_lr is None else head_lr)):
        check_positive(name, value)
    ratios: dict[int, float] = {}
    if value_lr_ratio != 1:
        ratios |= _value_ratios(model, value_lr_ratio)
    if b_lr_ratio != 1:
        plain = [layer for layer in lora_layers(model).values() if layer.lora_E is None and layer.r > 0]
        if not plain:
            raise ValueError("b_lr_ratio is for LoRA layers, which this model lacks: give value_lr_ratio instead")
        ratios |= {id(layer.lora_B[0]): b_lr_ratio for layer in plain}
    factors = set(map(id, factors_of(model)))
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = lr * ratios.get(id(parameter), 1.0)
            rate = own if id(parameter) in factors or head_lr is None else head_lr
            groups.setdefault(rate, []).append(parameter)
    if not groups:
        raise ValueError("nothing trains: call mark_only_lora_as_trainable() first")
    if head_lr is not None and all(id(p) in factors for p in model.parameters() if p.requires_grad):
        raise ValueError("head_lr is for what trains besides the factors, and nothing does: unfreeze the head first")
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _value_ratios(model: nn.Module, ratio: float | str) -> dict[int, float]:
    layers = svd_layers(model)
    if not layers:
        raise ValueError("value_lr_ratio is for layers with singular values (AdaLoRA, LoRA²), which this model lacks")
    if ratio != "auto":
        check_positive("value_lr_ratio", ratio)
        return {id(layer.lora_E): float(ratio) for layer in layers.values()}
    if not factors_are_orthonormal(distinct_factors(layers.values())):
        raise ValueError("value_lr_ratio 'auto' needs orthonormal factors: inject with init='orthogonal'")
    return {id(layer.lora_E): matching_value_ratio(layer) for layer in layers.values()}


@torch.no_grad()
def matching_value_ratio(layer: LoRALayer) -> float:
    """The rate of e, in multiples of the factors', with which the first Adam step moves W as far as LoRA's would.

    Adam's first step moves every entry by its rate against the gradient's sign. LoRA of rank ρ = min(k, r) at the same
    α/r moves W by s·lr·√(out·ρ/3) in the Frobenius norm (A is Kaiming-uniform, so its entries have variance 1/(3·in)).
    Here ΔW = s·γ·lr·P diag(d) Q with d the signs of p_iᵀ G q_i, whose norm is s·γ·lr·√(dᵀHd), H = PᵀP ∘ QQᵀ. For a
    gradient G of independent normal entries the p_iᵀ G q_i have the covariance H, so that
    E[d_i d_j] = (2/π) arcsin(H_ij/√(H_ii H_jj)).
    With k ≥ r, H = I and γ = √(out/3); with k = 1, √(dᵀHd) is Σ‖p_i‖‖q_i‖.

    Returns:
        γ.
    """
    left, right = _gram(list(layer.lora_B)), _gram([a.T for a in layer.lora_A])
    both = left * right
    scale = both.diagonal().sqrt()
    # Where k or r exceeds a side of the layer, some p_i or q_i may be 0, which moves nothing.
    correlation = (both / (scale[:, None] * scale)).nan_to_num(0.0).clamp(-1, 1)
    moved = (both * (2 / math.pi) * correlation.asin()).sum().sqrt()
    rank = min([*layer.widths, layer.r])
    return math.sqrt(layer.out_features * rank / 3) / float(moved)


def _gram(factors: list[Tensor]) -> Tensor:
    """PᵀP of P = F₀ F₁ …, (r, r) in float64, without forming P."""
    first = factors[0].double()
    gram = first.T @ first
    for factor in factors[1:]:
        gram = factor.double().T @ gram @ factor.double()
    return gram
