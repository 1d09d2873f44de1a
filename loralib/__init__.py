"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation."""

from loralib.allocator import RankAllocator
from loralib.checkpoint import lora_state_dict
from loralib.injection import inject, mark_only_lora_as_trainable, match_modules
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear, lora_layers
from loralib.orthogonality import OrthogonalityRegulariser, compute_orth_regu
from loralib.precision import cast_frozen

__all__ = [
    "Linear",
    "LoRA2Linear",
    "LoRALayer",
    "MultiScaleLinear",
    "OrthogonalityRegulariser",
    "RankAllocator",
    "SVDLinear",
    "cast_frozen",
    "compute_orth_regu",
    "inject",
    "lora_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "match_modules",
]
