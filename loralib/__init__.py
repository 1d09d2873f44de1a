"""Low-rank adaptation on one or more scales: LoRA, AdaLoRA and LoRA² layers, rank allocation, regularisation."""

from loralib.adapter import (
    compact,
    load_adapter,
    merge_adapter,
    merge_into,
    save_adapter,
    start_from_adapter,
    unmerge_adapter,
)
from loralib.adapter_checks import base_fingerprint
from loralib.adapter_files import VERSION, AdapterConfig, read_adapter_config
from loralib.allocator import RankAllocator
from loralib.diagnostics import UpdateStatistics, update_statistics
from loralib.exact_factors import ExactFactors
from loralib.initialisation import initialise
from loralib.injection import inject, match_modules
from loralib.layers import Linear, LoRA2Linear, LoRALayer, MultiScaleLinear, SVDLinear
from loralib.learning_rates import parameter_groups
from loralib.model import lora_layers, lora_state_dict, mark_only_lora_as_trainable
from loralib.multi_adapter import MultiAdapter
from loralib.orthogonality import OrthogonalityRegulariser, compute_orth_regu
from loralib.peft_format import export_peft, import_peft
from loralib.precision import cast_frozen
from loralib.preconditioner import Preconditioner
from loralib.training import LowRankTrainerMixin, LowRankTraining

__version__ = VERSION

__all__ = [
    "AdapterConfig",
    "ExactFactors",
    "Linear",
    "LoRA2Linear",
    "LoRALayer",
    "LowRankTrainerMixin",
    "LowRankTraining",
    "MultiAdapter",
    "MultiScaleLinear",
    "OrthogonalityRegulariser",
    "Preconditioner",
    "RankAllocator",
    "SVDLinear",
    "UpdateStatistics",
    "base_fingerprint",
    "cast_frozen",
    "compact",
    "compute_orth_regu",
    "export_peft",
    "import_peft",
    "initialise",
    "inject",
    "load_adapter",
    "lora_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "match_modules",
    "merge_adapter",
    "merge_into",
    "parameter_groups",
    "read_adapter_config",
    "save_adapter",
    "start_from_adapter",
    "unmerge_adapter",
    "update_statistics",
]
