"""Linear layers whose frozen weight W gets a trainable low-rank update ΔW.

    LoRA      ΔW = s · B A                          (arXiv 2106.09685, section 4.1)
    AdaLoRA   ΔW = s · P diag(e) Q                  (arXiv 2303.10512, eq. 3)
    LoRA²     ΔW = s · B₀ B₁ diag(e) A₁ A₀          (arXiv 2408.06854, eqs. 4 and 7)
    n scales  ΔW = s · B₀ … Bₙ₋₁ diag(e) Aₙ₋₁ … A₀

with s = lora_alpha / r. B₀ (out, k) and A₀ (k, in) are the outer scale; B₁ (k, r), e (r) and A₁ (r, k) are the second
scale, and so on inwards. :class:`LoRALayer` implements all of them; its four subclasses are presets. Every layer is an
``nn.Linear``, so the frozen weight keeps its name in a state dict. ΔW is never formed during training: the small
factors are multiplied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib.checks import check_choice, check_number, check_whole_number
from loralib.fused import adapted_linear, add_low_rank, autocast_dtype, without_autocast
from loralib.stored_weight import frozen_shape, is_dispatched, is_transposed, stored_form

GAUSSIAN_STD = 0.02
INITS = ("gaussian", "orthogonal")


class LoRALayer(nn.Linear):
    """A frozen linear layer with low-rank factors. Use one of its presets: :class:`Linear`, :class:`SVDLinear`,
    :class:`LoRA2Linear`, :class:`MultiScaleLinear`.

    Args:
        in_features, out_features: sizes of the frozen layer.
        r: rank. lora_alpha: s = lora_alpha / r. lora_dropout: dropout probability on the input of the update.
        bias: whether the frozen layer has a bias.
        args, options: the arguments of the preset's :meth:`scales`.

    Attributes:
        lora_B: left factors from the outermost inward, shapes (out, k₁), (k₁, k₂), …, (kₙ₋₁, r).
        lora_A: right factors from the outermost inward, shapes (k₁, in), (k₂, k₁), …, (r, kₙ₋₁).
        lora_E: singular values e, shape (r,); ``None`` for plain LoRA and if none is left.
        widths: (k₁, …, kₙ₋₁); ``()`` is a single scale.
        r: current rank. initial_r: rank at the start; they differ after :meth:`keep_singular_values`.
        scaling: s = lora_alpha / initial_r, which follows ``lora_alpha``. Pruning does not change it.
        merged: whether ``weight`` currently holds W + ΔW.

    Raises:
        ValueError: for a rank, width, alpha, dropout or init out of range. TypeError: for an unknown argument.
    """

    kind: ClassVar[str]  # the preset's name, see :func:`loralib.inject`
    has_singular_values: ClassVar[bool] = True
    in_peft: ClassVar[bool] = False  # whether peft wraps the layer, and saves, merges and shrinks it
    lora_E: Any  # an nn.Parameter, or None for plain LoRA and for a layer without singular values left
    # The replaced layer, if its weight is quantised: only that layer can compute the product, and save all that the
    # weight consists of. The tuple hides it from nn.Module, so that the weight has only one name.
    _quantised: tuple[nn.Module] | None = None
    _has_values = True  # false from the creation on the meta device until factors are loaded

    @staticmethod
    def scales(*args: Any, **options: Any) -> tuple[Sequence[int], str]:
        """Turns the preset's own arguments into the widths, from the outermost inward, and the initialisation."""
        raise NotImplementedError

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        bias: bool = True,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        scales = self.scales(*args, **options)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self._add_factors(r, lora_alpha, lora_dropout, *scales, fan_in_fan_out=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int, lora_alpha: float, lora_dropout: float, widths: Sequence[int], init: str
    ) -> LoRALayer:
        """Wrap an existing layer: its ``weight`` and ``bias`` parameters are shared, neither copied nor frozen. If
        accelerate has dispatched it to a device (``device_map``), so is the new layer.

        Args:
            linear: an ``nn.Linear``, whose weight may be quantised by torchao; bitsandbytes' ``Linear4bit``; or a layer
                that stores its weight as (in, out): GPT-2's ``Conv1D``, or one whose ``fan_in_fan_out`` is true.
            widths, init: what the preset's :meth:`scales` returns.

        Raises:
            ValueError: for a value out of range.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = frozen_shape(linear)
        layer.weight = linear.weight
        if stored_form(layer.weight) == "quantised":
            layer._quantised = (linear,)
        layer.register_parameter("bias", linear.bias)
        layer._add_factors(r, lora_alpha, lora_dropout, widths, init, is_transposed(linear))
        if is_dispatched(linear):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layer, linear._hf_hook)  # type: ignore[arg-type]
        return layer.train(linear.training)

    def _add_factors(
        self, r: int, lora_alpha: float, lora_dropout: float, widths: Sequence[int], init: str, fan_in_fan_out: bool
    ) -> None:
        self.r = self.initial_r = r
        self.widths = tuple(widths)
        check_whole_number("r", r)
        for k in self.widths:
            check_whole_number("a width (k)", k)
        check_number("lora_alpha", lora_alpha, lambda alpha: 0 < abs(alpha) < math.inf, "a number other than 0")
        check_number("lora_dropout", lora_dropout, lambda p: 0 <= p < 1, "a number in [0, 1)")
        check_choice("init", init, INITS)
        self.lora_alpha, self.init = float(lora_alpha), init
        self.fan_in_fan_out = fan_in_fan_out
        self.merged = False
        self.lora_dropout = nn.Dropout(float(lora_dropout))  # an adapter's configuration takes no NumPy number
        # A buffer moves with the layer to another device. A state dict holds it under the name of the weight.
        self.register_buffer("_weight_before_merge", None, persistent=False)

        # Half precision would lose small steps, so the factors are at least float32, even beside a bfloat16 weight.
        options = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        inner = [*self.widths, r]
        self.lora_B = nn.ParameterList(
            torch.empty(rows, columns, **options) for rows, columns in pairwise([self.out_features, *inner])
        )
        self.lora_E = nn.Parameter(torch.empty(r, **options)) if self.has_singular_values else None
        self.lora_A = nn.ParameterList(
            torch.empty(rows, columns, **options) for columns, rows in pairwise([self.in_features, *inner])
        )
        self.register_forward_pre_hook(_call_me)
        self._draw_factors()

    def _draw_factors(self) -> None:
        """Draws the start values. e (for LoRA: B) starts at 0, so that ΔW = 0."""
        if self.lora_A[0].is_meta:  # nothing can be drawn there
            self._has_values = False
            return
        if self.lora_E is None:
            nn.init.kaiming_uniform_(self.lora_A[0], a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[0])
            return
        nn.init.zeros_(self.lora_E)
        for factor in [*self.lora_B, *self.lora_A]:
            if self.init == "orthogonal":
                nn.init.orthogonal_(factor)
            else:
                nn.init.normal_(factor, std=GAUSSIAN_STD)

    @torch.no_grad()
    def keep_singular_values(self, kept: Sequence[int]) -> None:
        """Keep only the singular values in ``kept``, with their columns of the innermost B and rows of the innermost A.
        The scaling stays. If none is kept, the layer has no factors left and computes only its frozen layer.

        The shrunk parameters are new objects: create the optimiser afterwards.
        """
        if len(kept) == self.r:
            return
        factors = zip(self.lora_parameters(), self.singular_axes(), self.select(kept), strict=True)
        new = [old if axis is None else nn.Parameter(values, old.requires_grad) for old, axis, values in factors]
        scales = len(self.widths) + 1
        self.lora_B = nn.ParameterList(new[:scales] if kept else [])
        self.lora_A = nn.ParameterList(new[-scales:] if kept else [])
        if self.lora_E is not None:
            self.lora_E = new[scales] if kept else None
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
        """The values of :meth:`lora_parameters`, in that order and detached, for the kept singular values only. Outer
        factors are returned as they are; the others are contiguous copies. ``kept`` has increasing indices below r.
        """
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
        self._has_values = True

    @property
    def scaling(self) -> float:
        """s. To change the strength of the update, set ``lora_alpha`` to any number but 0 (negative: subtract it).
        It is saved with the adapter, but not by peft: there, multiply e."""
        return self.lora_alpha / self.initial_r

    def folded_core(self) -> Tensor | float:
        """What lies between the outer factors, s included: ΔW = B₀ · core · A₀. Shape (k₁, k₁); one scale: (r, r); for
        LoRA the number s, which stands for s times the identity."""
        # A factor that was moved from the meta device, or is still there, would be read as uninitialised memory.
        if not self.weight.is_meta and (self.lora_A[0].is_meta or not self._has_values):
            raise RuntimeError(
                "the factors are from the meta device and have no values: load the weights before inject(), and let "
                "accelerate dispatch the model without offloading"
            )
        if self.lora_E is None:
            return self.scaling
        values = self.lora_E * self.scaling
        if not self.widths:
            return torch.diag(values)
        # Not by slices: those of a ParameterList detach the tensors that torch.func puts into it.
        (_, left, *inner_bs), (_, right, *inner_as) = self.lora_B, self.lora_A
        with without_autocast(left.device.type):
            for inner_b, inner_a in zip(inner_bs, inner_as, strict=True):
                left, right = left @ inner_b, inner_a @ right
            return (left * values) @ right

    def delta_weight(self) -> Tensor:
        """The update ΔW with its scaling, shape (out, in), in the factors' dtype (the weight's if none is left). For
        merging and inspection."""
        if self.r == 0:
            return self.weight.new_zeros(self.out_features, self.in_features)
        with without_autocast(self.lora_B[0].device.type):
            core = self.folded_core()
            left = self.lora_B[0] @ core if isinstance(core, Tensor) else self.lora_B[0] * core
            return left @ self.lora_A[0]

    def forward(self, input: Tensor) -> Tensor:
        """x (…, in) → x Wᵀ + bias + dropout(x) ΔWᵀ, shape (…, out), in the dtype of ``weight`` or autocast's; with a
        quantised weight, in that of the frozen product. The argument is named ``input`` as in ``nn.Linear``.

        Raises:
            RuntimeError: if the layer is merged, in training mode with gradients on, and a factor trains; or if the
                factors are from the meta device and have no values, but the weight has.
        """
        if (base := self._quantised_layer()) is not None:
            # forward(), not a call: the hooks of the replaced layer run on this layer.
            return self.add_update(type(base).forward(base, input), input)
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        trains = self.training and torch.is_grad_enabled()
        if self.merged and trains and any(factor.requires_grad for factor in self.lora_parameters()):
            raise RuntimeError("a merged layer does not train: call unmerge() before training")
        if self.merged or self.r == 0:  # the frozen layer alone; x and the bias may differ in dtype from the weight
            x = input if autocast_dtype(input.device.type) is not None else input.to(weight.dtype)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(weight.dtype))
        dropped = self.lora_dropout(input) if self.lora_dropout.training and self.lora_dropout.p > 0 else None
        return adapted_linear(input, weight, self.bias, self.lora_A[0], self.folded_core(), self.lora_B[0], dropped)

    def _quantised_layer(self) -> nn.Module | None:
        """The replaced layer if its weight is quantised, with this layer's tensors: .to() has moved only those."""
        if self._quantised is None:
            return None
        (base,) = self._quantised
        base._parameters.update(weight=self.weight, bias=self.bias)
        return base

    def add_update(self, out: Tensor, x: Tensor) -> Tensor:
        """out + dropout(x) ΔWᵀ, (…, out), in the dtype of ``out``, a frozen product that another module computed."""
        if self.r == 0:
            return out
        return add_low_rank(out, self.lora_dropout(x), self.lora_A[0], self.folded_core(), self.lora_B[0])

    def merge(self) -> None:
        """Put W + ΔW into ``weight``. Merging twice changes nothing; ``unmerge()`` restores W bit for bit.

        Raises:
            ValueError: for a weight that is quantised, sharded or computed at each access.
        """
        if self.merged:
            return
        if not isinstance(self.weight, nn.Parameter):
            raise ValueError("the weight is computed by a hook (pruning, a parametrisation): remove that first")
        if stored_form(self.weight) is not None:
            raise ValueError(f"the weight is {stored_form(self.weight)}, and only a plain one can be merged into")
        with torch.no_grad():
            delta = self.delta_weight()
            merged = self.weight.to(delta.dtype) + (delta.T if self.fan_in_fan_out else delta)
            self._weight_before_merge = self.weight.data
            self.weight.data = merged.to(self.weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Undo ``merge()`` exactly. Does nothing if nothing is merged."""
        if not self.merged:
            return
        self.weight.data = self._weight_before_merge
        self._weight_before_merge = None
        self.merged = False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves W and the factors, whether the layer is merged or not; a quantised W as the replaced layer does."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (base := self._quantised_layer()) is not None:
            base._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self._weight_before_merge

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Undoes a merge first, because loading changes W and ΔW. In peft the layer does not own W.

        States of Microsoft's and AdaLoRA's ``loralib`` load too: there a factor has no number, and e the shape (r, 1).
        A quantised weight keeps the scales it has, which no layer of bitsandbytes takes from a state.
        """
        if self._quantised is not None:
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(f"{prefix}weight.")}
        if not self.in_peft:
            self.unmerge()
        for name in (f"{prefix}lora_A", f"{prefix}lora_B"):
            if name in state_dict:
                state_dict[f"{name}.0"] = state_dict.pop(name)
        if (values := state_dict.get(f"{prefix}lora_E")) is not None:
            state_dict[f"{prefix}lora_E"] = values.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_values |= any(name.startswith(f"{prefix}lora_") for name in state_dict)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, widths={self.widths}, lora_alpha={self.lora_alpha:g}"


def _call_me(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing. In evaluation mode ``nn.TransformerEncoderLayer`` passes the weights of its linear
    layers to one fused function and skips their forward passes, unless one of them has a hook."""


class Linear(LoRALayer):
    """LoRA: ΔW = s · B A with B (out, r), zero at the start, and A (r, in) (arXiv 2106.09685, section 4.1)."""

    kind = "lora"
    has_singular_values = False

    @staticmethod
    def scales() -> tuple[Sequence[int], str]:
        return (), INITS[0]


class MultiScaleLinear(LoRALayer):
    """ΔW = s · B₀ … Bₙ₋₁ diag(e) Aₙ₋₁ … A₀ with n = len(widths) + 1 scales (arXiv 2408.06854, continued inwards).

    Args:
        widths: from the outermost inward: ``()`` is AdaLoRA's layer, ``(k,)`` LoRA²'s, ``(k₁, k₂)`` has three scales.
        init: ``"gaussian"`` draws every factor from N(0, 0.02²), ``"orthogonal"`` gives it orthonormal rows or
            columns. In both cases e = 0.
    """

    kind = "multiscale"

    @staticmethod
    def scales(widths: Sequence[int] = (8,), init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return widths, init


class SVDLinear(LoRALayer):
    """AdaLoRA's layer, one scale: ΔW = s · P diag(e) Q with P (out, r), Q (r, in) (arXiv 2303.10512, eq. 3).

    Args:
        init: as for :class:`MultiScaleLinear`.
    """

    kind = "adalora"

    @staticmethod
    def scales(init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return (), init


class LoRA2Linear(LoRALayer):
    """LoRA²'s layer, two scales: ΔW = s · B₀ B₁ diag(e) A₁ A₀, B₀ (out, k), A₀ (k, in) (arXiv 2408.06854, eq. 4).

    Args:
        k: width of the outer scale. init: as for :class:`MultiScaleLinear`.
    """

    kind = "lora2"

    @staticmethod
    def scales(k: int = 8, init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return (k,), init
