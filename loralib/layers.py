"""Linear layers whose frozen weight W gets a trainable low-rank update ΔW, see :mod:`loralib.update`.

:class:`LoRALayer` is an ``nn.Linear`` with the members of a :class:`loralib.update.LowRankUpdate`, so that the frozen
weight keeps its name in a state dict. Its subclasses are presets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib.fused import autocast_dtype
from loralib.update import INITS, LowRankUpdate


class LoRALayer(LowRankUpdate, nn.Linear):
    """A frozen linear layer with low-rank factors. Use one of its presets: :class:`Linear`, :class:`SVDLinear`,
    :class:`LoRA2Linear`, :class:`MultiScaleLinear`, :class:`SoRALinear`.

    Args:
        in_features, out_features, bias: as for ``nn.Linear``.
        r, lora_alpha, lora_dropout: as for :class:`loralib.update.LowRankUpdate`, which describes the factors.
        args, options: the arguments of the preset's ``scales``.

    Attributes:
        fan_in_fan_out: whether ``weight`` is stored as (in, out), as in GPT-2's ``Conv1D``.
        merged: whether ``weight`` currently holds W + ΔW.

    Raises:
        ValueError: for a rank, width, alpha, dropout or init out of range. TypeError: for an unknown argument.
    """

    kind: ClassVar[str]  # the preset's name, see :func:`loralib.inject`
    # Turns the preset's own arguments into the widths, from the outermost inward, and the initialisation.
    scales: ClassVar[Callable[..., tuple[Sequence[int], str]]]

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
        linear = nn.Linear(in_features, out_features, bias, device, dtype).requires_grad_(False)
        self._wrap(linear, r, lora_alpha, lora_dropout, *self.scales(*args, **options))

    @classmethod
    def from_linear(cls, linear: nn.Module, *settings: Any) -> LoRALayer:
        """Wrap an existing layer: its ``weight`` and ``bias`` parameters are shared, neither copied nor frozen.

        Args:
            linear: an ``nn.Linear``, whose weight may be quantised by torchao, or GPT-2's ``Conv1D``.
            settings: r, lora_alpha, lora_dropout, widths and init, as for :class:`loralib.update.LowRankUpdate`.

        Raises:
            ValueError: for a value out of range.
        """
        layer = cls.__new__(cls)
        layer._wrap(linear, *settings)
        return layer.train(linear.training)

    def _wrap(self, linear: nn.Module, *settings: Any) -> None:
        """What ``__init__`` and :meth:`from_linear` share: the factors beside the linear layer's own parameters."""
        rows, columns = frozen_shape(linear)
        super().__init__(columns, rows, *settings, device=linear.weight.device, dtype=linear.weight.dtype)
        self.fan_in_fan_out, self.merged = is_conv1d(linear), False
        self._quantised = stored_form(linear.weight) == "quantised"
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        # A buffer moves with the layer to another device. A state dict holds it under the name of the weight.
        self.register_buffer("_weight_before_merge", None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """x (…, in) → x Wᵀ + bias + dropout(x) ΔWᵀ, shape (…, out), in the dtype of ``weight`` or autocast's; with a
        quantised weight, in that of the frozen product. The argument is named ``input`` as in ``nn.Linear``.

        Raises:
            RuntimeError: if the layer is merged, in training mode with gradients on, and a factor trains.
        """
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        trains = self.training and torch.is_grad_enabled()
        if self.merged and trains and any(factor.requires_grad for factor in self.lora_parameters()):
            raise RuntimeError("a merged layer does not train: call unmerge() before training")
        if self.merged or self.r == 0:  # the frozen layer alone; x and the bias may differ in dtype from the weight
            x = input if autocast_dtype(input.device.type) is not None else input.to(weight.dtype)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(weight.dtype))
        if self._quantised:  # only torchao can multiply by it
            return self.add_to(F.linear(input, weight, self.bias), input)
        return self.linear(input, weight, self.bias)

    def merge(self) -> None:
        """Put W + ΔW into ``weight``. Merging twice changes nothing; ``unmerge()`` restores W bit for bit.

        Raises:
            ValueError: for a weight that is quantised, sharded or computed at each access.
        """
        if self.merged:
            return
        merged = merged_weight(self.weight, self.delta_weight(), self.fan_in_fan_out)
        self._weight_before_merge = self.weight.data
        self.weight.data = merged
        self.merged = True

    def unmerge(self) -> None:
        """Undo ``merge()`` exactly. Does nothing if nothing is merged."""
        if not self.merged:
            return
        self.weight.data = self._weight_before_merge
        self._weight_before_merge = None
        self.merged = False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves W and the factors, whether the layer is merged or not."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self._weight_before_merge

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Undoes a merge first, because loading changes W and ΔW."""
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def merged_weight(weight: Tensor, delta: Tensor, transposed: bool) -> Tensor:
    """W + ΔW in the layout and dtype of ``weight``; the sum is rounded once. ``delta``: ΔW (out, in).

    Raises:
        ValueError: for a weight that is quantised, sharded or computed at each access.
    """
    if not isinstance(weight, nn.Parameter):
        raise ValueError("the weight is computed by a hook (pruning, a parametrisation): remove that first")
    if stored_form(weight) is not None:
        raise ValueError(f"the weight is {stored_form(weight)}, and only a plain one can be merged into")
    delta = (delta.T if transposed else delta).to(weight.device)
    return (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)


# ---- the form of the frozen weight, found without importing the library that made it ---------------------------------


def stored_form(weight: Tensor) -> str | None:
    """How a weight is stored: None if it holds its values, ``"sharded"`` if it holds a part of them (FSDP's DTensor),
    ``"quantised"`` if it encodes them in another form (torchao's tensors, bitsandbytes' ``Params4bit``)."""
    if hasattr(weight, "full_tensor"):
        return "sharded"
    return "quantised" if hasattr(weight, "quant_state") or hasattr(weight, "__tensor_flatten__") else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, weight stored (in, out); recognised by name and shape, without an import."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


def frozen_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer. A quantised weight may be packed into another shape."""
    if stored_form(linear.weight) == "quantised":
        return linear.out_features, linear.in_features
    rows, columns = linear.weight.shape
    return (columns, rows) if is_conv1d(linear) else (rows, columns)


# ---- the presets ----------------------------------------------------------------------------------------------------


class Linear(LoRALayer):
    """LoRA: ΔW = s · B A with B (out, r), zero at the start, and A (r, in) (arXiv 2106.09685, section 4.1)."""

    kind = "lora"
    has_singular_values = False

    @staticmethod
    def scales() -> tuple[Sequence[int], str]:
        return (), INITS[0]

    def draw_factors(self) -> None:
        """A as in ``nn.Linear``, B = 0."""
        nn.init.kaiming_uniform_(self.lora_A[0], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[0])

    @property
    def starts_at_zero(self) -> nn.Parameter:
        return self.lora_B[0]


class SoRALinear(Linear):
    """SoRA's layer, LoRA with a gate on each rank: ΔW = s · B diag(g) A, g in ``lora_E`` (arXiv 2311.11696, section
    3.1). SoRA's training is not part of this library; ``nlu/methods/sora.py`` has it."""

    kind = "sora"
    has_singular_values = True

    def draw_factors(self) -> None:
        """A and B as in LoRA, g ~ N(0, 1)."""
        super().draw_factors()
        nn.init.normal_(self.lora_E)


class MultiScaleLinear(LoRALayer):
    """ΔW = s · B₀ … Bₙ₋₁ diag(e) Aₙ₋₁ … A₀ with n = len(widths) + 1 scales (arXiv 2408.06854, continued inwards).

    Args:
        widths, init: as for :class:`loralib.update.LowRankUpdate`.
    """

    kind = "multiscale"

    @staticmethod
    def scales(widths: Sequence[int] = (8,), init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return widths, init


class SVDLinear(LoRALayer):
    """AdaLoRA's layer, one scale: ΔW = s · P diag(e) Q with P (out, r), Q (r, in) (arXiv 2303.10512, eq. 3)."""

    kind = "adalora"

    @staticmethod
    def scales(init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return (), init


class LoRA2Linear(LoRALayer):
    """LoRA²'s layer, two scales: ΔW = s · B₀ B₁ diag(e) A₁ A₀, B₀ (out, k), A₀ (k, in) (arXiv 2408.06854, eq. 4)."""

    kind = "lora2"

    @staticmethod
    def scales(k: int = 8, init: str = INITS[0]) -> tuple[Sequence[int], str]:
        return (k,), init
