"""The low-rank update ΔW of a linear map: its factors and what they multiply to. It knows no frozen weight.

    LoRA      ΔW = s · B A                          (arXiv 2106.09685, section 4.1)
    AdaLoRA   ΔW = s · P diag(e) Q                  (arXiv 2303.10512, eq. 3)
    LoRA²     ΔW = s · B₀ B₁ diag(e) A₁ A₀          (arXiv 2408.06854, eqs. 4 and 7)
    n scales  ΔW = s · B₀ … Bₙ₋₁ diag(e) Aₙ₋₁ … A₀

with s = lora_alpha / r. B₀ (out, k) and A₀ (k, in) are the outer scale; B₁ (k, r), e (r) and A₁ (r, k) are the second
scale, and so on inwards. ΔW is never formed during training: :meth:`LowRankUpdate.folded` multiplies the small factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loralib.checks import check_choice, check_number, check_whole_number
from loralib.fused import adapted_linear, add_low_rank, without_autocast

GAUSSIAN_STD = 0.02
INITS = ("gaussian", "orthogonal")


class LowRankUpdate(nn.Module):
    """The factors of ΔW, (out, in). :class:`loralib.LoRALayer` adds it to a frozen weight.

    Args:
        in_features, out_features: sizes of the linear map.
        r: rank. lora_alpha: s = lora_alpha / r. lora_dropout: dropout probability on the input of the update.
        widths: (k₁, …, kₙ₋₁), from the outermost inward; ``()`` is a single scale.
        init: ``"gaussian"`` or ``"orthogonal"``, see :meth:`draw_factors`.
        device, dtype: those of the weight. The factors are at least float32: half precision would lose small steps.

    Attributes:
        lora_B: left factors from the outermost inward, shapes (out, k₁), (k₁, k₂), …, (kₙ₋₁, r).
        lora_A: right factors from the outermost inward, shapes (k₁, in), (k₂, k₁), …, (r, kₙ₋₁).
        lora_E: singular values e, shape (r,); ``None`` for plain LoRA and if none is left.
        r: current rank. initial_r: rank at the start; they differ after :meth:`keep_singular_values`.

    Raises:
        ValueError: for a rank, width, alpha, dropout or init out of range.
    """

    has_singular_values: ClassVar[bool] = True
    lora_E: Any  # an nn.Parameter, or None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        widths: Sequence[int] = (),
        init: str = INITS[0],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # in a LoRALayer the next class would be nn.Linear, which makes a weight
        self.in_features, self.out_features = in_features, out_features
        self.r = self.initial_r = r
        self.widths = tuple(widths)
        check_whole_number("r", r)
        for k in self.widths:
            check_whole_number("a width (k)", k)
        check_number("lora_alpha", lora_alpha, lambda alpha: 0 < abs(alpha) < math.inf, "a number other than 0")
        check_number("lora_dropout", lora_dropout, lambda p: 0 <= p < 1, "a number in [0, 1)")
        check_choice("init", init, INITS)
        self.lora_alpha, self.init = float(lora_alpha), init
        self.lora_dropout = nn.Dropout(float(lora_dropout))  # an adapter's configuration takes no NumPy number
        dtype = torch.promote_types(dtype or torch.float32, torch.float32)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        left, right = [self.out_features, *self.widths, r], [self.in_features, *self.widths, r]
        self._set_factors(
            [empty(outer, inner) for outer, inner in pairwise(left)],
            empty(r) if self.has_singular_values else None,
            [empty(inner, outer) for outer, inner in pairwise(right)],
        )
        self.register_forward_pre_hook(_call_me)
        self.draw_factors()

    def _set_factors(self, b: Sequence[nn.Parameter], e: nn.Parameter | None, a: Sequence[nn.Parameter]) -> None:
        self.lora_B, self.lora_E, self.lora_A = nn.ParameterList(b), e, nn.ParameterList(a)

    # ---- the start --------------------------------------------------------------------------------------------------

    def draw_factors(self) -> None:
        """Draws the initial values, with ΔW = 0: e = 0, and each factor from N(0, 0.02²) (``"gaussian"``), or with
        orthonormal rows or columns (``"orthogonal"``). On the meta device nothing is drawn. A preset with another start
        overrides this method and :attr:`starts_at_zero`."""
        nn.init.zeros_(self.lora_E)
        for factor in [*self.lora_B, *self.lora_A]:
            if self.init == "orthogonal":
                nn.init.orthogonal_(factor)
            else:
                nn.init.normal_(factor, std=GAUSSIAN_STD)

    def _apply(self, fn: Callable, recurse: bool = True) -> LowRankUpdate:
        """``to_empty()`` moves factors from the meta device without values: then they are drawn."""
        without_values = self.r > 0 and self.lora_A[0].is_meta
        super()._apply(fn, recurse)
        if without_values and not self.lora_A[0].is_meta:
            self.draw_factors()
        return self

    @property
    def starts_at_zero(self) -> nn.Parameter:
        """The factor that makes ΔW = 0 at the start; its last dimension has r entries."""
        return self.lora_E

    # ---- the factors ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_singular_values(self, kept: Sequence[int]) -> None:
        """Keep only the singular values in ``kept``, with their columns of the innermost B and rows of the innermost A.
        The scaling stays. If none is kept, no factors are left, and ΔW is 0. The shrunk parameters are new objects."""
        if len(kept) == self.r:
            return
        factors = zip(self.lora_parameters(), self.singular_axes(), self.select(kept), strict=True)
        new = [old if axis is None else nn.Parameter(values, old.requires_grad) for old, axis, values in factors]
        scales = len(self.widths) + 1
        if not kept:
            self._set_factors([], None, [])
        else:
            self._set_factors(new[:scales], None if self.lora_E is None else new[scales], new[-scales:])
        self.r = len(kept)

    def lora_parameters(self) -> list[nn.Parameter]:
        """All factors, frozen or not: B from the outermost inward, e if there is one, A from the outermost inward."""
        return [*self.lora_B, *([] if self.lora_E is None else [self.lora_E]), *self.lora_A]

    def singular_axes(self) -> list[int | None]:
        """For each of :meth:`lora_parameters`, the dimension along which its r singular values lie; None for an outer
        factor, which all singular values share."""
        if self.r == 0:
            return []
        outer: list[int | None] = [None] * len(self.widths)
        return [*outer, 1, *([] if self.lora_E is None else [0]), *outer, 0]

    def select(self, kept: Sequence[int]) -> list[Tensor]:
        """The values of :meth:`lora_parameters`, in that order and detached, for the kept singular values only: outer
        factors as they are, contiguous copies of the others. ``kept`` has increasing indices below r."""
        values = [parameter.detach() for parameter in self.lora_parameters()]
        index = torch.tensor(list(kept), dtype=torch.long)
        pairs = zip(values, self.singular_axes(), strict=True)
        return [value if axis is None else value.index_select(axis, index.to(value.device)) for value, axis in pairs]

    @torch.no_grad()
    def scatter(self, kept: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Write ``tensors``, as :meth:`select` returns them, to the indices ``kept``. Other entries do not change."""
        index = torch.tensor(list(kept), dtype=torch.long)
        for parameter, axis, values in zip(self.lora_parameters(), self.singular_axes(), tensors, strict=True):
            if axis is None:
                parameter.copy_(values)
            else:
                parameter.index_copy_(axis, index.to(parameter.device), values.to(parameter))

    # ---- the product ------------------------------------------------------------------------------------------------

    @property
    def scaling(self) -> float:
        """s. To change the strength of the update, set ``lora_alpha`` to any number but 0 (negative: subtract it).
        It is saved with the adapter, but not by peft: there, multiply e."""
        return self.lora_alpha / self.initial_r

    def folded(self) -> tuple[Tensor, Tensor]:
        """A (ρ, in) and B (out, ρ) with ΔW = B A, s and e included; ρ is the least of r and the widths.

        The small factors are multiplied on both sides of the narrowest place, so that an input meets only ρ features:
        with two scales A₁ A₀ and B₀ B₁ diag(s·e) if k ≥ r, and A₀ and B₀ (B₁ diag(s·e) A₁) if k < r.
        """
        # Not by slices of the lists: those of a ParameterList detach the tensors that torch.func puts into it.
        bs, values, as_ = [*self.lora_B], self.lora_E, [*self.lora_A]
        inner = [*self.widths, self.r]
        outer = len(inner) - inner[::-1].index(min(inner))  # the scales outside the narrowest place, the last of equals
        with without_autocast(as_[0].device.type):
            innermost = bs.pop() * (self.scaling if values is None else values * self.scaling)
            if outer > len(bs):
                return _outward(as_), _outward([*bs, innermost], left=True)
            core = _outward([*bs[outer:], innermost], left=True) @ _outward(as_[outer:])
            return _outward(as_[:outer]), _outward([*bs[:outer], core], left=True)

    def delta_weight(self) -> Tensor:
        """ΔW with its scaling, shape (out, in), in the factors' dtype; zeros on the default device if no factors are
        left."""
        if self.r == 0:
            return torch.zeros(self.out_features, self.in_features)
        a, b = self.folded()
        with without_autocast(a.device.type):
            return b @ a

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias + dropout(x) ΔWᵀ for a plain weight W (out, in), fused: see :mod:`loralib.fused`. r > 0."""
        dropped = self.lora_dropout(x) if self.lora_dropout.training and self.lora_dropout.p > 0 else None
        return adapted_linear(x, weight, bias, *self._folded_for(x), dropped)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """out + dropout(x) ΔWᵀ, (…, out), in the dtype of ``out``, a product that another module computed."""
        return out if self.r == 0 else add_low_rank(out, self.lora_dropout(x), *self._folded_for(x))

    def _folded_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.lora_A[0].is_meta and not x.is_meta:  # torch would multiply by uninitialised memory
            raise RuntimeError("the factors are on the meta device and have no values: load the weights before you "
                               "adapt the model, without offloading")  # fmt: skip
        return self.folded()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """States of Microsoft's and AdaLoRA's ``loralib`` load too: there a factor has no number, and e the shape
        (r, 1)."""
        for name in (f"{prefix}lora_A", f"{prefix}lora_B"):
            if name in state_dict:
                state_dict[f"{name}.0"] = state_dict.pop(name)
        if (values := state_dict.get(f"{prefix}lora_E")) is not None:
            state_dict[f"{prefix}lora_E"] = values.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        own = f"r={self.r}, widths={self.widths}, lora_alpha={self.lora_alpha:g}"
        return ", ".join(filter(None, (super().extra_repr(), own)))


def _outward(factors: Sequence[Tensor], left: bool = False) -> Tensor:
    """The product of factors that are listed from the outermost inward, multiplied from the innermost outward:
    Aₙ … A₁ A₀, or B₀ B₁ … Bₙ if ``left``."""
    return functools.reduce(lambda inner, each: each @ inner if left else inner @ each, reversed(factors))


def _call_me(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing. In evaluation mode ``nn.TransformerEncoderLayer`` passes the weights of its linear
    layers to one fused function and skips their forward passes, unless a module in it has a hook."""
