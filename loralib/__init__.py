"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation."""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from loralib.adapter import compact, load_adapter, save_adapter, start_from_adapter
from loralib.adapter_folder import VERSION, AdapterConfig, read_adapter_config
from loralib.allocator import RankAllocator
from loralib.fingerprint import base_fingerprint
from loralib.injection import inject, match_modules
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear
from loralib.merging import merge_adapter, merge_and_unload, merge_into, unmerge_adapter
from loralib.model import lora_layers, lora_state_dict, mark_only_lora_as_trainable
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
    "merge_into",
    "read_adapter_config",
    "save_adapter",
    "start_from_adapter",
    "unmerge_adapter",
]

# Old places of one release ago: a name of this package, or one of its modules -> the module that has it now.
_MOVED_NAMES = {
    "ExactFactors": "loralib.recipes.exact_factors",
    "LowRankTrainerMixin": "loralib.recipes.trainer",
    "MultiAdapter": "loralib.interop.multi_adapter",
    "cast_frozen": "loralib.interop.precision",
    "export_peft": "loralib.interop.peft_format",
    "import_peft": "loralib.interop.peft_format",
    "parameter_groups": "loralib.recipes.learning_rates",
    "update_statistics": "loralib.recipes.diagnostics",
}
_MOVED_MODULES = {
    "loralib.adapter_files": "loralib.adapter_folder",
    "loralib.diagnostics": "loralib.recipes.diagnostics",
    "loralib.exact_factors": "loralib.recipes.exact_factors",
    "loralib.learning_rates": "loralib.recipes.learning_rates",
    "loralib.multi_adapter": "loralib.interop.multi_adapter",
    "loralib.peft_adalora": "loralib.interop.peft_adalora",
    "loralib.peft_format": "loralib.interop.peft_format",
    "loralib.peft_method": "loralib.interop.peft_method",
    "loralib.precision": "loralib.interop.precision",
    "loralib.sharding": "loralib.interop.sharding",
}


def _from_new_place(old: str, new: str) -> ModuleType:
    warnings.warn(f"{old} has moved: import it from {new}", DeprecationWarning, stacklevel=3)
    return importlib.import_module(new)


def __getattr__(name: str) -> Any:
    if name not in _MOVED_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_from_new_place(f"loralib.{name}", _MOVED_NAMES[name]), name)


class _MovedModules:
    """Imports a module from its new place where its old one is asked for."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls) if name in _MOVED_MODULES else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__
        sys.modules[old] = _from_new_place(old, _MOVED_MODULES[old])


sys.meta_path.append(_MovedModules)  # type: ignore[arg-type]
