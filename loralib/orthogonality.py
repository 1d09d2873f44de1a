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
from collections.abc import Sequence
from dataclasses import dataclass

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
    counted: set[int] = set()  # layers may share outer factors, those of different ranks too
    norms: list[Tensor] = []
    for term, sides in _sides_of_equal_shapes(model, chosen):
        with without_autocast(sides[0][0].device.type):  # Gram − I is a small difference
            scales = [_Scale.of(factors, term == "UV") for factors in zip(*sides, strict=True)]
            # Of one scale, the product is the factor itself.
            own = scales if term in chosen else scales[:1] if len(scales) == 1 else []
            fresh = [gram for scale in own if (gram := scale.smaller_gram(counted)) is not None]
            product = [_product_gram(scales)] if "PQ" in chosen and len(scales) > 1 else []
            norms += [_deviation(gram, squared) for gram in fresh + product]
    return regu_weight * torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def _sides_of_equal_shapes(model: nn.Module, chosen: set[str]) -> list[tuple[str, list[nn.ParameterList]]]:
    """(term, sides): the B (term "uv") or A ("UV") of all layers, those of the same shapes together."""
    groups: dict[tuple, list[nn.ParameterList]] = defaultdict(list)
    for layer in trained_svd_layers(model, "regularise").values():
        for term, side in (("uv", layer.lora_B), ("UV", layer.lora_A)):
            if chosen & {term, "PQ"}:
                key = (term, side[0].device, *(factor.shape for factor in side))
                groups[key].append(side)
    return [(term, sides) for (term, *_), sides in groups.items()]


@dataclass
class _Scale:
    """The factors of several sides at one scale; one that sides share occurs once.

    Attributes:
        ids: for each side the id of its factor.
        stack: (n, outer, inner), each like a B. rows: id of a factor → its index in ``stack``.
        gram: XᵀX of each, (n, inner, inner).
    """

    ids: list[int]
    rows: dict[int, int]
    stack: Tensor
    gram: Tensor

    @classmethod
    def of(cls, factors: Sequence[Tensor], transposed: bool) -> _Scale:
        unique = {id(factor): factor for factor in factors}
        x = torch.stack(list(unique.values()))
        x = x.mT if transposed else x
        return cls(list(map(id, factors)), {each: i for i, each in enumerate(unique)}, x, x.mT @ x)

    def of_sides(self, tensors: Tensor) -> Tensor:
        """One row of ``tensors`` for each side."""
        rows = tensors.unbind()  # not by a list of indices, which would be copied to the device in every step
        return torch.stack([rows[self.rows[each]] for each in self.ids])

    def smaller_gram(self, counted: set[int]) -> Tensor | None:
        """The Grams of the factors that are not ``counted`` yet, on their smaller side: if outer < inner, only XXᵀ can
        be I."""
        grams = self.gram if self.gram.shape[-1] <= self.stack.shape[-2] else self.stack @ self.stack.mT
        fresh = [gram for key, gram in zip(self.rows, grams.unbind(), strict=True) if key not in counted]
        counted.update(self.rows)
        return torch.stack(fresh) if fresh else None


def _product_gram(scales: Sequence[_Scale]) -> Tensor:
    """PᵀP = …B₁ᵀ (B₀ᵀB₀) B₁… of each side, (sides, r, r)."""
    outermost, *others = scales
    gram = outermost.of_sides(outermost.gram)
    for scale in others:
        x = scale.of_sides(scale.stack)
        gram = x.mT @ gram @ x
    return gram


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
