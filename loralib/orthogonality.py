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
from typing import NamedTuple

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
    groups: dict[tuple, list[list[nn.Parameter]]] = defaultdict(list)  # sides of the same shapes
    for layer in trained_svd_layers(model, "regularise").values():
        for term, side in (("uv", [*layer.lora_B]), ("UV", [*layer.lora_A])):
            if chosen & {term, "PQ"}:
                key = (term, side[0].device, *(factor.shape for factor in side))
                groups[key].append(side)
    counted: set[int] = set()  # layers may share outer factors, those of different ranks too
    grams: list[Tensor] = []  # stacks (n, s, s); each entry is a term
    for (term, device, *_), sides in groups.items():
        with without_autocast(device.type):  # Gram − I is a small difference
            scales = [_scale(factors, transposed=term == "UV") for factors in zip(*sides, strict=True)]
            if term in chosen or len(scales) == 1:  # of one scale, the product is the factor itself
                for scale in scales:
                    if fresh := [place for key, place in scale.place.items() if key not in counted]:
                        grams.append(_at(scale.smaller, fresh))
                    counted.update(scale.place)
            if "PQ" in chosen and len(scales) > 1:
                grams.append(_product_grams(sides, scales))
    return regu_weight * _deviations(grams, squared).mean()


class _Scale(NamedTuple):
    """The distinct factors of one scale, each X (outer, inner) like a B, as stacks of n."""

    place: dict[int, int]  # id of a factor → its place in the stacks
    x: Tensor
    gram: Tensor  # XᵀX
    smaller: Tensor  # the Gram on the smaller side: if outer < inner, only XXᵀ can be I


def _scale(factors: Sequence[nn.Parameter], transposed: bool) -> _Scale:
    unique = {id(factor): factor for factor in factors}
    x = torch.stack(list(unique.values()))
    x = x.mT if transposed else x
    gram = x.mT @ x
    smaller = gram if x.shape[-1] <= x.shape[-2] else x @ x.mT
    return _Scale({key: place for place, key in enumerate(unique)}, x, gram, smaller)


def _at(stack: Tensor, places: Sequence[int]) -> Tensor:
    """A copy of the entries of a stack at these places; faster if those are all, in order."""
    if list(places) == list(range(len(stack))):
        return stack.clone(memory_format=torch.contiguous_format)
    entries = stack.unbind()
    return torch.stack([entries[place] for place in places])


def _product_grams(sides: Sequence[Sequence[nn.Parameter]], scales: Sequence[_Scale]) -> Tensor:
    """PᵀP = …B₁ᵀ (B₀ᵀB₀) B₁… of each side, (sides, r, r)."""
    gram = _at(scales[0].gram, [scales[0].place[id(side[0])] for side in sides])
    for i, scale in enumerate(scales[1:], 1):
        x = _at(scale.x, [scale.place[id(side[i])] for side in sides])
        gram = x.mT @ gram @ x
    return gram


def _deviations(grams: Sequence[Tensor], squared: bool) -> Tensor:
    """:func:`_deviation` of all entries of all stacks, in their order; those of one size are computed at once."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for number, gram in enumerate(grams):
        alike[gram.shape[-1], gram.device].append(number)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        norms = _deviation(torch.cat([grams[number] for number in numbers]), squared)
        found |= zip(numbers, norms.split([len(grams[number]) for number in numbers]), strict=True)
    return torch.cat([found[number].to(grams[0].device) for number in range(len(grams))])


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
