"""The orthogonality regulariser (arXiv 2408.06854, eq. 5 and Table 3; arXiv 2303.10512, eq. 4).

Every term is ‖Gram − I‖_F. Grams have the side k or r, so that P = B₀B₁… (out, r) is never formed:
PᵀP = …B₁ᵀ (B₀ᵀB₀) B₁…, and likewise for Q.

    "uv"  the factors of P: ‖BⱼᵀBⱼ − I‖ for every j      "UV"  the factors of Q: ‖AⱼAⱼᵀ − I‖
    "PQ"  the products: ‖PᵀP − I‖ and ‖QQᵀ − I‖           "all"  all of them, the paper's best

A factor's Gram is taken on its smaller side, so that the identity can be reached. With one scale, P and Q are the
factors themselves and count once: the value is then AdaLoRA's.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from loralib.layers import lora_layers

TERMS = ("uv", "UV", "PQ")


def parse_terms(terms: str) -> frozenset[str]:
    """``"all"``, or some of uv, UV and PQ joined by ``+``.

    Raises:
        ValueError: for anything else.
    """
    parts = list(TERMS) if terms == "all" else terms.split("+")
    if not set(parts) <= set(TERMS) or len(set(parts)) != len(parts):
        raise ValueError(f"terms must be 'all' or some of {', '.join(TERMS)} joined by '+', got {terms!r}")
    return frozenset(parts)


class OrthogonalityRegulariser:
    """The regulariser of one model, its layers found once. Calling it gives the unweighted value, a scalar.

    Factors are handled stacked by shape, all layers at once. A factor that layers share counts once.

    Args:
        model: holds low-rank layers with singular values. terms: see :func:`parse_terms`.
        squared: the mean of squared norms, as the paper prints them, not of norms, as the published code has it.

    Raises:
        ValueError: for unknown terms, or a model without such layers.
    """

    def __init__(self, model: nn.Module, terms: str = "all", squared: bool = False) -> None:
        chosen = parse_terms(terms)
        layers = [layer for layer in lora_layers(model).values() if layer.lora_E is not None]
        if not layers:
            raise ValueError("no layer with singular values (AdaLoRA, LoRA²) to regularise: inject one first")
        self.squared = squared
        # A chain is one side of one layer: its factors from the outermost inward. Chains in a group share their shapes.
        self._groups: dict[tuple, list[list[nn.Parameter]]] = defaultdict(list)
        for layer in layers:
            for term, factors in (("uv", layer.lora_B), ("UV", layer.lora_A)):
                one_scale = len(factors) == 1
                with_factors = term in chosen or (one_scale and "PQ" in chosen)
                with_product = "PQ" in chosen and not one_scale
                if with_factors or with_product:
                    key = (term == "UV", with_factors, with_product, tuple(factor.shape for factor in factors))
                    self._groups[key].append(list(factors))

    def __call__(self) -> Tensor:
        deviations = []
        for (is_right, with_factors, with_product, _), chains in self._groups.items():
            product_gram = None
            for factors in zip(*chains, strict=True):
                position = {id(factor): i for i, factor in enumerate(dict.fromkeys(factors))}
                stacked = torch.stack(list(dict.fromkeys(factors)))
                stacked = stacked.mT if is_right else stacked
                tall = stacked.shape[-1] <= stacked.shape[-2]
                gram = _Gram.apply(stacked) if tall or (with_product and product_gram is None) else None
                if with_factors:
                    deviations.append(self._deviation(gram if tall else _Gram.apply(stacked.mT)))
                if with_product:
                    shared = len(position) < len(factors)
                    inner = gram if product_gram is None else stacked
                    inner = inner[[position[id(factor)] for factor in factors]] if shared else inner
                    product_gram = inner if product_gram is None else inner.mT @ product_gram @ inner
            if with_product:
                deviations.append(self._deviation(product_gram))
        return torch.cat(deviations).mean()

    def _deviation(self, gram: Tensor) -> Tensor:
        """(n, s, s) → (n,): ‖Gram − I‖_F, squared where asked for; the gradient at exactly 0 is 0."""
        flat = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).flatten(1)
        return flat.square().sum(1) if self.squared else torch.linalg.vector_norm(flat, dim=1)


class _Gram(torch.autograd.Function):
    """(n, m, s) → (n, s, s): XᵀX, whose gradient is one product X (G + Gᵀ) where autograd would make two and add."""

    @staticmethod
    def forward(ctx, stacked: Tensor) -> Tensor:
        ctx.save_for_backward(stacked)
        return stacked.mT @ stacked

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (stacked,) = ctx.saved_tensors
        return stacked @ (grad + grad.mT)


def compute_orth_regu(model: nn.Module, regu_weight: float = 0.1, terms: str = "all", squared: bool = False) -> Tensor:
    """``regu_weight`` × the mean of ‖Gram − I‖_F over all chosen terms of all layers, a scalar to add to the loss.

    In a loop, build one :class:`OrthogonalityRegulariser` and call that: the layers are then looked up once.

    Raises:
        ValueError: for unknown terms, a negative weight, or a model without layers that have singular values.
    """
    if not regu_weight >= 0:
        raise ValueError(f"regu_weight must not be negative, got {regu_weight!r}")
    return regu_weight * OrthogonalityRegulariser(model, terms, squared)()
