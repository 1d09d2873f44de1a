"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation."""

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
from loralib.update import LowRankUpdate

__version__ = VERSION

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
