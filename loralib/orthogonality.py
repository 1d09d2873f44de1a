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
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from loralib.fused import outside_autocast, without_autocast
from loralib.model import trained_svd_layers

TERMS = ("uv", "UV", "PQ")
_Side = tuple[bool, list[nn.Parameter]]  # (whether it is the A side, its factors from the outermost inward)


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
    groups: dict[tuple, list[_Side]] = defaultdict(list)
    for layer in trained_svd_layers(model, "regularise").values():
        for term, wide, side in (("uv", False, layer.lora_B), ("UV", True, layer.lora_A)):
            factors, several = list(side), len(side) > 1
            asked = term in chosen or ("PQ" in chosen and not several), "PQ" in chosen and several
            if any(asked):
                groups[(*asked, factors[0].device, *layer.widths, layer.r)].append((wide, factors))
    counted: set[int] = set()  # layers of different ranks may share outer factors
    norms: list[Tensor] = []
    for (with_factors, with_product, device, *_), sides in groups.items():
        with without_autocast(device.type):  # Gram − I is a small difference
            norms += [_deviation(gram, squared) for gram in _grams(sides, with_factors, with_product, counted)]
    return regu_weight * torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def _grams(sides: list[_Side], with_factors: bool, with_product: bool, counted: set[int]) -> Iterator[Tensor]:
    """Yield the Grams of the factors, each (n, s, s), then those of the products, for sides with equal inner sizes.

    Every factor is treated like a B, (outer, inner). ``counted`` has the factors whose Grams were already yielded.
    """
    shapes = list(dict.fromkeys((wide, factors[0].shape) for wide, factors in sorted(sides, key=itemgetter(0))))
    sides = sorted(sides, key=lambda side: shapes.index((side[0], side[1][0].shape)))
    product = torch.empty(0)
    for level in range(len(sides[0][1])):
        unique = {id(factors[level]): (wide, factors[level]) for wide, factors in sides}
        fresh = [key not in counted for key in unique]
        counted.update(unique)
        by_shape = groupby(unique.values(), key=lambda item: (item[0], item[1].shape))
        stacks = [(wide, torch.stack([factor for _, factor in group])) for (wide, _), group in by_shape]
        if level == 0:
            inner = [_Gram.apply(x, wide) for wide, x in stacks]
            # If m < s, only XXᵀ can be I.
            own = [
                gram if gram.shape[-1] == min(x.shape[1:]) else _Gram.apply(x, not wide)
                for gram, (wide, x) in zip(inner, stacks, strict=True)
            ]
        else:
            x = torch.cat([x.mT if wide else x for wide, x in stacks])
            own = [x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT]
        for gram in own if with_factors else ():
            rows, fresh = [i for i in range(len(gram)) if fresh[i]], fresh[len(gram) :]
            yield gram if len(rows) == len(gram) else gram[rows]
        if with_product:
            x = torch.cat(inner) if level == 0 else x
            if len(unique) < len(sides):  # each side needs its own copy of what it shares
                place = {key: i for i, key in enumerate(unique)}
                x = x[[place[id(factors[level])] for _, factors in sides]]
            product = x if level == 0 else x.mT @ product @ x
    if with_product:
        yield product


class _Gram(torch.autograd.Function):
    """XᵀX of a stack X (n, m, s), or XXᵀ if ``wide``. The backward pass takes one product, X (G + Gᵀ), instead of
    autograd's two and a sum."""

    @staticmethod
    def forward(x: Tensor, wide: bool) -> Tensor:
        return x @ x.mT if wide else x.mT @ x

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.wide = inputs[1]

    @staticmethod
    @outside_autocast
    def backward(ctx, grad: Tensor):
        (x,), both = ctx.saved_tensors, grad + grad.mT
        return both @ x if ctx.wide else x @ both, None


def _deviation(gram: Tensor, squared: bool) -> Tensor:
    """(n, s, s) → (n,): ‖Gram − I‖_F, or its square if ``squared``; the gradient at exactly 0 is 0."""
    flat = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).flatten(1)
    squares = flat.square().sum(1)
    if squared:
        return squares
    zero = squares == 0  # the second derivative of a norm is NaN there
    return torch.where(zero, 0.0, torch.linalg.vector_norm(torch.where(zero.unsqueeze(1), 1.0, flat), dim=1))
