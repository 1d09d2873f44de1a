"""Preconditioned gradients of low-rank factors: a step then depends less on how ΔW is split into factors.

"riemannian"  F between L and R, ΔW = L F R: g ← (LᵀL + δI)⁻¹ g (RRᵀ + δI)⁻¹; an outermost F has one of the two. For
              LoRA: g_A ← (BᵀB + δI)⁻¹ g_A, g_B ← g_B (AAᵀ + δI)⁻¹ (arXiv 2402.02347). For e:
              g_e ← (PᵀP ∘ QQᵀ + δI)⁻¹ g_e.
"balanced"    X Y with nothing between, k×k: X M M⁻¹ Y is the same for every M. The step is that of the pair whose Grams
              agree: g_X ← g_X S⁻¹, g_Y ← S g_Y with S XᵀX S = YYᵀ (RefLoRA, arXiv 2505.18877). For LoRA X = B and
              Y = A; with several scales the pairs are neighbours on one side of e.

All inverses are of k×k or r×r matrices; layers of one shape are handled as one stack. Where layers share a factor, the
Grams are averaged over them. Adam is invariant to a constant scale. While B or e is 0, an inverse is 1/δ: the loss has
no gradient there, but a regulariser has, so "riemannian" goes without one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from loralib.checks import check_choice
from loralib.exact_factors import distinct_factors
from loralib.fused import without_autocast
from loralib.layers import LoRALayer
from loralib.model import factors_in, injected_layers, refuse_new_factors

PRECONDITIONERS = ("balanced", "riemannian")
DAMPING = 1e-6  # δ


class Preconditioner:
    """Changes the gradients in place. Call :meth:`apply` before ``optimizer.step()``.

    Args:
        model: holds low-rank layers. kind: see the module's text.

    Raises:
        ValueError: for another kind, a model without low-rank layers, "balanced"
            for AdaLoRA's layer, whose factors e separates, and layers of different ranks that share a factor.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        check_choice("kind", kind, PRECONDITIONERS)
        layers = [layer for layer in injected_layers(model).values() if layer.r > 0]
        if kind == "balanced" and any(layer.lora_E is not None and not layer.widths for layer in layers):
            raise ValueError(
                f"{kind!r} balances neighbouring factors, and e lies between AdaLoRA's two: use 'riemannian'"
            )
        groups: dict[tuple, list[LoRALayer]] = defaultdict(list)
        for layer in layers:
            factors = layer.lora_parameters()
            groups[(factors[0].device, factors[0].dtype, *(f.shape for f in factors))].append(layer)
        found = [id(factor) for group in groups.values() for factor in distinct_factors(group)]
        if len(found) > len(set(found)):
            raise ValueError("layers of different ranks share a factor: leave out compact(), or load without it")
        self._chains = [_Chain(group) for group in groups.values()]
        self._layers, self._factors = layers, factors_in(layers)
        self.kind = kind

    @torch.no_grad()
    def apply(self) -> None:
        """Precondition the gradients; a factor without one is passed over.

        Raises:
            ValueError: where the model's factors are others than when this was made.
        """
        refuse_new_factors(self._layers, self._factors, "Preconditioner")
        for chain in self._chains:
            with without_autocast(chain.links[0].unique[0].device.type):
                chain.read()
                if self.kind == "riemannian":
                    chain.precondition()
                else:
                    chain.balance()


class _Link:
    """The factors at one place of the chain B₀ … Bₙ₋₁ Aₙ₋₁ … A₀, over layers of one shape: (n, rows, columns)."""

    def __init__(self, factors: list[nn.Parameter]) -> None:
        unique = {id(f): f for f in factors}
        place = {key: i for i, key in enumerate(unique)}
        self.unique = list(unique.values())
        places = [place[id(f)] for f in factors]
        self.of_layer = torch.tensor(places)
        self.counts = torch.tensor([places.count(i) for i in range(len(self.unique))])
        self.shared = len(self.unique) < len(factors)

    def read(self) -> None:
        stacked = _stack([f.detach() for f in self.unique])
        # Copied once, after the model has moved.
        self.of_layer, self.counts = self.of_layer.to(stacked.device), self.counts.to(stacked)
        self.value = stacked[self.of_layer] if self.shared else stacked

    def mean(self, grams: Tensor) -> Tensor:
        """(n, …) → (distinct factors, …): averaged over the layers that share one."""
        if not self.shared:
            return grams
        totals = grams.new_zeros(len(self.unique), *grams.shape[1:]).index_add_(0, self.of_layer, grams)
        return totals / self.counts[:, None, None]

    def multiply(self, left: Tensor | None, right: Tensor | None) -> None:
        """g ← left g right, for the distinct factors."""
        gradient = _gradients(self.unique)
        gradient = gradient if left is None else left @ gradient
        _write_gradients(self.unique, gradient if right is None else gradient @ right)


def _stack(tensors: list[Tensor]) -> Tensor:
    """In float32 at least: no half precision has inverses."""
    stacked = torch.stack(tensors)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Stacked, 0 for a parameter without one."""
    return _stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def _write_gradients(parameters: list[nn.Parameter], values: Tensor) -> None:
    """Back from :func:`_gradients`; a parameter without a gradient keeps none."""
    pairs = [(p.grad, value) for p, value in zip(parameters, values.unbind(), strict=True) if p.grad is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


class _Chain:
    """Layers of one shape."""

    def __init__(self, layers: list[LoRALayer]) -> None:
        left, right = (
            list(zip(*sides, strict=True)) for sides in ([x.lora_B for x in layers], [x.lora_A for x in layers])
        )
        self.links = [_Link(list(factors)) for factors in [*left, *reversed(right)]]
        self.middle = len(left)  # e lies between the links before and from here
        self.values = [layer.lora_E for layer in layers] if layers[0].lora_E is not None else []

    def read(self) -> None:
        for link in self.links:
            link.read()
        self.e = _stack([e.detach() for e in self.values]) if self.values else None

    def _outward(self, transposed: bool) -> tuple[list[Tensor | None], Tensor]:
        """For each link, and for e, the Gram of the product of all links left of it; ``transposed``: right of it."""
        links = self.links[::-1] if transposed else self.links
        found: list[Tensor | None] = []
        gram: Any = None
        for i, link in enumerate(links):
            if i == self.middle:
                beside_e = gram
                if self.e is not None:
                    gram = self.e[:, :, None] * gram * self.e[:, None, :]
            found.append(gram)
            x = link.value.mT if transposed else link.value
            gram = x.mT @ (x if gram is None else gram @ x)
        return (found[::-1] if transposed else found), beside_e

    def precondition(self) -> None:
        lefts, left_of_e = self._outward(False)
        rights, right_of_e = self._outward(True)
        for link, left, right in zip(self.links, lefts, rights, strict=True):
            sides = [None if g is None else _inverse(_damped(link.mean(g))) for g in (left, right)]
            link.multiply(*sides)
        if self.values:
            solved = torch.linalg.solve_ex(_damped(left_of_e * right_of_e), _gradients(self.values)).result
            _write_gradients(self.values, solved)

    def balance(self) -> None:
        sides: list[list[Tensor | None]] = [[None, None] for _ in self.links]
        for i, (x, y) in enumerate(zip(self.links, self.links[1:], strict=False)):
            if i + 1 == self.middle and self.e is not None:
                continue
            owner = x if x.shared else y  # a shared factor has one S with all its neighbours
            grams = [owner.mean(g) for g in (x.value.mT @ x.value, y.value @ y.value.mT)]
            s, inverse = _balance(*(_damped(g) for g in grams))
            s, inverse = (t[owner.of_layer] if owner.shared else t for t in (s, inverse))
            sides[i][1], sides[i + 1][0] = x.mean(inverse), y.mean(s)
        for link, (left, right) in zip(self.links, sides, strict=True):
            link.multiply(left, right)


def _damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _inverse(gram: Tensor) -> Tensor:
    """Of a damped Gram. ``inv`` raises for a singular one, and to know that the host would wait for a CUDA device."""
    return torch.linalg.inv_ex(gram).inverse


def _balance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """S and S⁻¹ with S X S = Y: the geometric mean X^(−1/2) (X^(1/2) Y X^(1/2))^(1/2) X^(−1/2) of X⁻¹ and Y."""
    root, inverse_root = _power(x, 0.5), _power(x, -0.5)
    inside = root @ y @ root
    return inverse_root @ _power(inside, 0.5) @ inverse_root, root @ _power(inside, -0.5) @ root


def _power(gram: Tensor, exponent: float) -> Tensor:
    values, basis = torch.linalg.eigh((gram + gram.mT) / 2)
    values = values.clamp(min=torch.finfo(gram.dtype).tiny)
    return basis * values[:, None, :] ** exponent @ basis.mT
