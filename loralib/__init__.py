"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from loralib.adapter import load_adapter, save_adapter, start_from_adapter
from loralib.adapter_folder import VERSION, AdapterConfig, read_adapter_config
from loralib.allocator import RankAllocator
from loralib.fingerprint import base_fingerprint
from loralib.injection import inject, match_modules
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear
from loralib.merging import merge_adapter, merge_and_unload, unmerge_adapter
from loralib.model import compact, lora_layers, lora_state_dict, mark_only_lora_as_trainable
from loralib.orthogonality import compute_orth_regu
from loralib.training import LowRankTraining

__version__ = VERSION

__all__ = [
    "AdapterConfig",
    "Linear",
    "LoRA2Linear",
    "LoRALayer",
    "LowRankTraining",
    "MultiScaleLinear",
    "RankAllocator",
    "SVDLinear",
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

# Modules that moved in 0.3.0; the next release drops their old names: old name -> (subpackage, public names).
_MOVED = {
    "diagnostics": ("recipes", ["update_statistics"]),
    "exact_factors": ("recipes", ["ExactFactors"]),
    "learning_rates": ("recipes", ["parameter_groups"]),
    "trainer": ("recipes", ["LowRankTrainerMixin"]),
    "multi_adapter": ("interop", ["MultiAdapter"]),
    "peft_adalora": ("interop", []),
    "peft_format": ("interop", ["export_peft", "import_peft"]),
    "peft_method": ("interop", []),
    "precision": ("interop", ["cast_frozen"]),
    "sharding": ("interop", []),
}
_MODULES = {f"loralib.{name}": f"loralib.{room}.{name}" for name, (room, _) in _MOVED.items()}
_NAMES = {public: _MODULES[f"loralib.{name}"] for name, (_, names) in _MOVED.items() for public in names}


def _from_new_place(old: str, new: str) -> ModuleType:
    warnings.warn(f"{old} has moved: import it from {new}", DeprecationWarning, stacklevel=3)
    return importlib.import_module(new)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_from_new_place(f"loralib.{name}", _NAMES[name]), name)


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module from its new location when it is imported by its old name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        sys.modules[old] = _from_new_place(old, _MODULES[old])


sys.meta_path.append(_MovedModules())
