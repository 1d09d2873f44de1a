"""The orthogonality regulariser (arXiv 2408.06854, eq. 5 and Table 3; arXiv 2303.10512, eq. 4).

Every term is ‖Gram − I‖_F. The Gram matrices are k × k or r × r; P = B₀B₁… (out, r) is never formed, because
PᵀP = …B₁ᵀ (B₀ᵀB₀) B₁…, and likewise for Q.

    "uv"  the factors of P: ‖BⱼᵀBⱼ − I‖ for every j      "UV"  the factors of Q: ‖AⱼAⱼᵀ − I‖
    "PQ"  the products: ‖PᵀP − I‖ and ‖QQᵀ − I‖           "all"  all of them, the paper's best

A factor's Gram matrix is taken on its smaller side, so that it can reach the identity. With one scale, P and Q are the
factors themselves and count once: the value is then AdaLoRA's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loralib.fused import without_autocast
from loralib.model import trained_svd_layers

TERMS = ("uv", "UV", "PQ")
ROUNDING = 1e-5  # ‖Gram − I‖_F of factors that are orthonormal in float32 is smaller


def compute_orth_regu(model: nn.Module, regu_weight: float = 0.1, terms: str = "all", squared: bool = False) -> Tensor:
    """``regu_weight`` × the mean of ‖Gram − I‖_F over all chosen terms of all layers, a scalar to add to the loss.

    Factors of the same shapes are computed as one stack. A factor that layers share counts once.

    Args:
        model: has low-rank layers with singular values. terms: ``"all"``, or some of uv, UV and PQ joined by ``+``.
        squared: take the mean of squared norms, as in the paper, not of norms, as in the published code.

    Raises:
        ValueError: for unknown terms, or a model without layers whose singular values train.
    """
    chosen = set(TERMS) if terms == "all" else set(terms.split("+"))
    if not chosen <= set(TERMS):
        raise ValueError(f"terms must be 'all' or some of {', '.join(TERMS)} joined by '+', got {terms!r}")
    stacks: dict[tuple, dict[int, Tensor]] = defaultdict(dict)  # factors of one shape, each once
    products: dict[tuple, list[list[Tensor]]] = defaultdict(list)  # the factors of products of equal shapes
    for layer in trained_svd_layers(model, "regularise").values():
        for term, side in (("uv", list(layer.lora_B)), ("UV", list(layer.lora_A))):
            if not chosen & {term, "PQ"}:
                continue
            counts = term in chosen or len(side) == 1
            for factor in side:
                stacks[(term, counts, factor.device, factor.shape)][id(factor)] = factor
            if "PQ" in chosen and len(side) > 1:
                products[(term, side[0].device, *(factor.shape for factor in side))].append(side)
    norms: list[Tensor] = []
    grams: dict[int, Tensor] = {}  # id of a factor -> XᵀX
    for (term, counts, device, _), factors in stacks.items():
        with without_autocast(device.type):  # Gram − I is a small difference
            x = _stacked(term, factors.values())
            gram = x.mT @ x
            grams |= zip(factors, gram.unbind(), strict=True)
            if counts:  # if outer < inner, only XXᵀ can be I
                norms.append(_deviation(gram if x.shape[-1] <= x.shape[-2] else x @ x.mT, squared))
    for (term, device, *_), sides in products.items():
        with without_autocast(device.type):
            outer, *inner = zip(*sides, strict=True)
            gram = torch.stack([grams[id(factor)] for factor in outer])
            for factors_of_all in inner:
                x = _stacked(term, factors_of_all)
                gram = x.mT @ gram @ x
            norms.append(_deviation(gram, squared))
    return regu_weight * torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def _stacked(term: str, factors: Iterable[Tensor]) -> Tensor:
    """Factors of one shape as one tensor (n, outer, inner): those of Q are transposed."""
    x = torch.stack(list(factors))
    return x.mT if term == "UV" else x


def _deviation(gram: Tensor, squared: bool) -> Tensor:
    """(n, s, s) → (n,): ‖Gram − I‖_F, or its square if ``squared``; 0 if it is smaller than rounding errors.

    The gradient of the norm has length 1 however small the norm is, and Adam scales every gradient to its rate: factors
    that start orthonormal would move in the direction of their rounding errors.
    """
    flat = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).flatten(1)
    squares = flat.square().sum(1)
    zero = squares < ROUNDING**2
    if squared:
        return torch.where(zero, 0.0, squares)
    # Without the inner selection the second derivative at 0 would be NaN.
    return torch.where(zero, 0.0, torch.linalg.vector_norm(torch.where(zero.unsqueeze(1), 1.0, flat), dim=1))
