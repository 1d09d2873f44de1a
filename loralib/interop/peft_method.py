"""LoRA² as a method of the peft package. Importing this module registers it; peft >= 0.19 must be installed.

    import loralib.interop.peft_method as lora2
    model = peft.get_peft_model(base, lora2.LoRA2Config(r=8, k=8, target_modules=["query", "value"]))

``save_pretrained``, ``from_pretrained``, ``merge_and_unload`` and several adapters work as for peft's own methods, also
in tools that are built on peft. Each adapter of a layer is a :class:`loralib.LowRankUpdate`, so that
:class:`loralib.LowRankTraining` regularises and prunes the trainable adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loralib.injection import HOOKS, NEVER_CALLED, refuse_packed_batches
from loralib.layers import frozen_shape, is_conv1d, merged_weight
from loralib.model import drop_pruned, lora_layers
from loralib.update import INITS, LowRankUpdate

NAME = "lora2"


def _add_peft_type() -> PeftType:
    """Add PeftType.LORA2: peft registers only members of this enumeration, and has no function to add one."""
    if NAME.upper() in PeftType.__members__:
        return PeftType[NAME.upper()]
    member = str.__new__(PeftType, NAME.upper())
    member._name_ = member._value_ = NAME.upper()
    type.__setattr__(PeftType, NAME.upper(), member)
    PeftType._member_map_[NAME.upper()] = PeftType._value2member_map_[NAME.upper()] = member
    PeftType._member_names_.append(NAME.upper())
    return member


LORA2 = _add_peft_type()


@dataclass
class LoRA2Config(PeftConfig):
    """Settings of a LoRA² adapter.

    Attributes:
        r, k, lora_alpha, lora_dropout, init: as for :class:`loralib.LoRA2Linear`.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as for peft's
            ``LoraConfig``; a target is a linear layer.
        rank_pattern: module name, its end, or a regular expression, as in peft's LoRA -> rank ≤ r of modules with fewer
            singular values; :meth:`LoRA2Model.compact` sets it. The scaling stays lora_alpha / r.
    """

    r: int = 8
    k: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    init: str = INITS[0]
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA2
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:  # peft ignores the latter
            raise ValueError("layers_to_transform needs a list of target_modules; a regex holds the numbers itself")
        if self.layers_pattern and self.layers_to_transform is None:  # peft ignores the former
            raise ValueError("layers_pattern needs layers_to_transform")


class LoRA2Adapter(LowRankUpdate):
    """One adapter of a :class:`LinearWithLoRA2`.

    A factor's name is ``lora_B_0``, not ``lora_B.0``: peft finds the adapter's name in a key only if at most one part
    follows it.
    """

    def __init__(self, base: nn.Module, config: LoRA2Config) -> None:
        rows, columns = frozen_shape(base)
        settings = (config.r, config.lora_alpha, config.lora_dropout, (config.k,), config.init)
        super().__init__(columns, rows, *settings, device=base.weight.device, dtype=base.weight.dtype)

    def forward(self, x: Tensor, base: nn.Module | Tensor) -> Tensor:
        """x (…, in) → (…, out): the output of ``base``, a plain linear layer or what another module computed, plus the
        update."""
        if isinstance(base, Tensor):
            return self.add_to(base, x)
        return self.linear(x, base.weight.T if is_conv1d(base) else base.weight, base.bias)

    def _set_factors(self, b: Sequence[nn.Parameter], e: nn.Parameter | None, a: Sequence[nn.Parameter]) -> None:
        for name in [name for name in self._parameters if name != "lora_E"]:
            delattr(self, name)
        self.lora_E = e
        for side, factors in (("B", b), ("A", a)):
            for scale, factor in enumerate(factors):
                self.register_parameter(f"lora_{side}_{scale}", factor)

    @property
    def lora_B(self) -> list[nn.Parameter]:  # type: ignore[override]
        return self._side("lora_B_")

    @property
    def lora_A(self) -> list[nn.Parameter]:  # type: ignore[override]
        return self._side("lora_A_")

    def _side(self, prefix: str) -> list[nn.Parameter]:
        # By attribute: in a replica of nn.DataParallel the factors are no parameters.
        return [getattr(self, f"{prefix}{scale}") for scale in (0, 1) if hasattr(self, f"{prefix}{scale}")]


class LinearWithLoRA2(nn.Module, BaseTunerLayer):
    """peft's wrapper around a frozen linear layer, with one :class:`LoRA2Adapter` for each adapter's name.

    By "Linear" in the class's name peft recognises it if a second adapter targets ``"all-linear"``. Raises ValueError
    if the layer is not a linear one, or a setting is out of range.
    """

    adapter_layer_names = ("lora2_adapters",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRA2Config, rank: int | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear) and not is_conv1d(base):
            raise ValueError(f"LoRA² adapts linear layers, not {type(base).__name__}: name other target_modules")
        self.lora2_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.register_buffer("_weight_before_merge", None, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, rank)

    def update_layer(self, adapter_name: str, config: LoRA2Config, rank: int | None) -> None:
        """Add an adapter with ``rank`` of its r singular values (None: all)."""
        adapter = LoRA2Adapter(self.get_base_layer(), config)
        if rank is not None:
            adapter.keep_singular_values(range(rank))
        self.lora2_adapters[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _has_plain_weight(self) -> bool:
        """Whether the base layer is W x + b with a plain tensor W: not quantised, and not changed by a hook."""
        base = self.base_layer
        plain = (type(base) is nn.Linear or is_conv1d(base)) and type(base.weight) is nn.Parameter
        return plain and not any(getattr(base, kind) for kind in HOOKS) and "forward" not in vars(base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, in) → (…, out): the base layer's output plus the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        adapters = [self.lora2_adapters[name] for name in names if name in self.lora2_adapters]
        plain = any(adapter.r for adapter in adapters) and self._has_plain_weight()
        out = self.base_layer if plain else self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            out = adapter(x, out) if adapter.r else out
        return out

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, in the layout of the base layer's weight."""
        delta = self.lora2_adapters[adapter].delta_weight()
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + ΔW into the base layer's weight.

        Args:
            safe_merge: refuse a result that is not finite. adapter_names: by default the active adapters.

        Raises:
            ValueError: for a quantised or sharded weight, or, with ``safe_merge``, a result that is not finite. The
                adapter at fault is not merged then; those before it are.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora2_adapters:
                continue
            base = self.get_base_layer()
            merged = merged_weight(base.weight, self.lora2_adapters[name].delta_weight(), is_conv1d(base))
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"the weight would not be finite with the adapter {name}: it was not merged")
            if not self.merged:
                self._weight_before_merge = base.weight.data
            base.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge` exactly, for all adapters. Does nothing if nothing is merged."""
        if self.merged:
            self.get_base_layer().weight.data, self._weight_before_merge = self._weight_before_merge, None
            self.merged_adapters.clear()


class LoRA2Model(BaseTuner):
    """peft's tuner for LoRA²; ``get_peft_model`` creates it. Raises ValueError if the output projection of
    ``nn.MultiheadAttention`` is a target, or a call has ``adapter_names``."""

    prefix = f"{NAME}_"
    tuner_layer_cls = LinearWithLoRA2
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As peft's; it also switches off what the new layers cannot read."""
        super().inject_adapter(model, *args, **kwargs)
        refuse_packed_batches(model)

    def _create_and_replace(
        self,
        peft_config: LoRA2Config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(NEVER_CALLED.format(current_key))
        ranks = peft_config.rank_pattern
        rank = ranks.get(current_key, ranks.get(get_pattern_key(ranks, current_key)))
        if isinstance(target, LinearWithLoRA2):
            target.update_layer(adapter_name, peft_config, rank)
            return
        layer = LinearWithLoRA2(target, adapter_name, peft_config, rank)
        if adapter_name not in self.active_adapters:  # a further adapter is trainable only once it is set active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As peft's, which for a module that is not a wrapper (a head that is unloaded) expects a weight of its own."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: Any = None, **__: Any) -> nullcontext:
        """peft calls this before each forward pass, with the arguments that the model itself does not receive."""
        if adapter_names is not None:
            raise ValueError("LoRA² takes no adapter_names: use set_adapter(), or export to peft's LoRA")
        return nullcontext()

    def compact(self, adapter_name: str = "default") -> dict[str, int]:
        """Drop the pruned singular values of an adapter, and return its ranks, as :func:`loralib.compact` does. Its
        config records them."""
        ending, found = f".lora2_adapters.{adapter_name}", lora_layers(self.model)
        ranks = drop_pruned({name.removesuffix(ending): found[name] for name in found if name.endswith(ending)})
        self.peft_config[adapter_name].rank_pattern = dict(ranks)
        return ranks


register_peft_method(name=NAME, config_cls=LoRA2Config, model_cls=LoRA2Model)
