"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation.

A name is imported with torch when it is first used, so that programs can read :mod:`loralib.files` without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralib.adapter import load_adapter, save_adapter, start_from_adapter
    from loralib.adapter_folder import AdapterConfig, read_adapter_config
    from loralib.allocator import RankAllocator
    from loralib.fingerprint import base_fingerprint
    from loralib.injection import inject, match_modules
    from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SoRALinear, SVDLinear
    from loralib.merging import merge_adapter, merge_and_unload, unmerge_adapter
    from loralib.model import compact, lora_layers, lora_state_dict, mark_only_lora_as_trainable
    from loralib.orthogonality import compute_orth_regu
    from loralib.training import LowRankTraining
    from loralib.update import LowRankUpdate

__version__ = "0.4.0"
_CORE = (
    "adapter", "adapter_folder", "allocator", "fingerprint", "injection", "layers", "merging", "model",
    "orthogonality", "training", "update",
)  # fmt: skip

__all__ = [
    "AdapterConfig",
    "Linear",
    "LoRA2Linear",
    "LoRALayer",
    "LowRankTraining",
    "LowRankUpdate",
    "MultiScaleLinear",
    "RankAllocator",
    "SVDLinear",
    "SoRALinear",
    "base_fingerprint",
    "compact",
    "compute_orth_regu",
    "inject",
    "load_adapter",
    "lora_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "match_modules",
    "merge_adapter",
    "merge_and_unload",
    "read_adapter_config",
    "save_adapter",
    "start_from_adapter",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    """A name of the core, from the module that has it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (import_module(f"{__name__}.{each}") for each in _CORE)
    return next(vars(module)[name] for module in modules if name in vars(module))
