"""Low-rank updates of loralib: LoRA (arXiv 2106.09685), AdaLoRA (2303.10512) and LoRA² (2408.06854).

They are presets of one layer; those with singular values may be regularised and pruned to a rank budget.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from statistics import fmean
from typing import Any, Literal

from torch import nn

import loralib
from loralib.allocator import IMPORTANCES, AllocatorSettings
from loralib.injection import PUBLISHED_MODULES, module_type
from loralib.layers import INITS
from loralib.model import factors_of
from loralib.orthogonality import parse_terms
from loralib.recipes.diagnostics import update_statistics
from loralib.recipes.exact_factors import ExactFactors
from loralib.recipes.learning_rates import parameter_groups
from nlu.errors import UsageError
from nlu.methods.method import AppliedMethod, Flag, Method, encoder_modules, train_only
from nlu.methods.widths import check_widths, width, widths_of

SIX_MODULES = "query,key,value,attention.output,intermediate,layer.output"


def at_least_1(value: int) -> bool:
    return value >= 1


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


LORA_R = Flag("lora_r", int, 8, "Rank r: initial singular values per layer.", at_least_1, "must be at least 1")
LORA_ALPHA = Flag(
    "lora_alpha", float, 16.0, "The update is scaled by lora_alpha / lora_r.",
    lambda alpha: 0 < alpha < math.inf, "must be positive",
)  # fmt: skip
LORA_DROPOUT = Flag(
    "lora_dropout", float, 0.0, "Dropout on the input of the update.", lambda p: 0 <= p < 1, "must lie in [0, 1)"
)
LORA_MODULE = Flag(
    "lora_module", str, SIX_MODULES,
    "Comma-separated modules: the six published names, module-name suffixes, or a regular expression.",
)  # fmt: skip
LOW_RANK_FLAGS = (LORA_R, LORA_ALPHA, LORA_DROPOUT, LORA_MODULE)
_LORA_INIT = Flag(
    "lora_init", Literal[INITS], "gaussian", "Initial factors: gaussian (the paper's) or orthogonal.",
)  # fmt: skip
_LORA_FLAGS = (
    Flag("lora_b_lr_ratio", float, 1.0, "LoRA+: learning rate of B, as a multiple of --learning_rate.",
         lambda ratio: 0 < ratio < math.inf, "must be positive and finite"),
)  # fmt: skip

_REG_ORTH_COEF = Flag(
    "reg_orth_coef", float, 0.1, "Weight of the orthogonality regulariser.", not_negative, "must not be negative"
)
_RANK_ALLOCATION = Flag("rank_allocation", bool, True, "Whether singular values are pruned to the target rank.")


def _allocation(name: str, kind: Any, default: Any, text: str) -> Flag:
    return Flag(name, kind, default, text, needs=_RANK_ALLOCATION)


_ORTHOGONALITY = Flag(
    "orthogonality", Literal["penalty", "retraction"], "penalty",
    "penalty: the paper's regulariser; retraction: factors made exactly orthonormal after each step.",
)  # fmt: skip
_SINGULAR_VALUE_FLAGS = (
    _LORA_INIT,
    _ORTHOGONALITY,
    _REG_ORTH_COEF,
    Flag("orth_terms", str, "all", "Regulariser: all, or some of uv, UV, PQ joined by +.", needs=_REG_ORTH_COEF),
    Flag("orth_squared", bool, False, "Squared norms in the regulariser.", needs=_REG_ORTH_COEF),
    _RANK_ALLOCATION,
    _allocation(
        "target_rank", int | None, None, "Average number of singular values kept per layer. Default: half of lora_r."
    ),
    _allocation(
        "target_total_rank", int | None, None, "Singular values kept over all layers, instead of --target_rank."
    ),
    _allocation("init_warmup", int | None, None, "Steps before pruning starts. Default: a tenth of the training."),
    _allocation("final_warmup", int | None, None, "Last steps, with the ranks held. Default: half of the training."),
    _allocation("mask_interval", int, 10, "Steps between two allocations."),
    _allocation("beta1", float, 0.85, "Moving average of the sensitivity, in (0, 1)."),
    _allocation("beta2", float, 0.85, "Moving average of the uncertainty, in (0, 1)."),
    _allocation(
        "importance", Literal[IMPORTANCES], "inner",
        "inner: the paper's importance; full: outer factors scored too.",
    ),
    Flag(
        "value_lr_ratio", float, 1.0, "Learning rate of the singular values, as a multiple of --learning_rate.",
        lambda ratio: 0 < ratio < math.inf, "must be positive and finite",
    ),
)  # fmt: skip
_SCALE_FLAGS = (
    Flag("lora_k", width, None,
         "LoRA²: width k of the outer scale (8 by default); match:lora chooses it for LoRA's number of parameters.",
         lambda k: isinstance(k, str) or k >= 1, "must be at least 1"),
    Flag("lora_widths", str | None, None,
         "LoRA² with any number of scales: widths from the outermost inward, such as 8,8."),
    Flag("lora_share_outer", bool, False, "All layers of one module type share their outer factors."),
)  # fmt: skip


def module_patterns(lora_module: str) -> list[str]:
    """``--lora_module`` as a list; the comma of a quantifier such as ``{1,2}`` belongs to its expression."""
    return [pattern.strip() for pattern in re.split(r",(?!\d*\})", lora_module)]


def _check_factors(args: Any, given: set[str]) -> None:
    """The two ways to orthogonality."""
    if args.orthogonality == "retraction":
        if args.lora_init == "gaussian":
            raise UsageError("--orthogonality retraction needs orthonormal factors: give --lora_init orthogonal")
        for flag in sorted({"reg_orth_coef", "orth_terms", "orth_squared"} & given):
            raise UsageError(f"--{flag} has no meaning with --orthogonality retraction: leave it out")
        args.reg_orth_coef = 0.0


def _check_ranks(args: Any, given: set[str]) -> None:
    _check_factors(args, given)
    if {"target_rank", "target_total_rank"} <= given:
        raise UsageError("--target_rank and --target_total_rank say the same in two ways: give one of them")
    if args.target_rank is None:
        args.target_rank = max(1, args.lora_r // 2)
    try:
        parse_terms(args.orth_terms)
        AllocatorSettings(
            args.lora_r, args.target_rank, args.init_warmup, args.final_warmup, args.mask_interval, args.beta1,
            args.beta2, importance=args.importance,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_scales(args: Any, given: set[str]) -> None:
    check_widths(args)
    _check_ranks(args, given)


def _inject(model: nn.Module, args: Any) -> None:
    kind: str = args.method
    options: dict[str, Any] = {}
    if kind != "lora":
        options["init"] = args.lora_init
    modules = encoder_modules(model, module_patterns(args.lora_module))
    if kind == "lora2":
        widths = widths_of(model, modules, args)
        options["share_outer"] = args.lora_share_outer
        if len(widths) == 1:
            options["k"] = widths[0]
        else:
            kind, options["widths"] = "multiscale", widths
    try:
        loralib.inject(
            model, kind, modules, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, **options
        )
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None


def _own_rates(model: nn.Module, args: Any) -> list[tuple[list[nn.Parameter], float]]:
    ratio = {"b_lr_ratio": args.lora_b_lr_ratio} if args.method == "lora" else {"value_lr_ratio": args.value_lr_ratio}
    groups = parameter_groups(model, 1.0, **ratio)
    return [(group["params"], group["lr"]) for group in groups if group["lr"] != 1]


def statistics(model: nn.Module) -> dict[str, float]:
    """For the history: the mean ‖ΔW‖_F of all layers and of each module type, singular values, orthonormality."""
    found = update_statistics(model)
    by_type: dict[str, list[float]] = defaultdict(list)
    for name, norm in found.delta_norms.items():
        published = (short for short, pattern in PUBLISHED_MODULES.items() if re.fullmatch(pattern, name))
        by_type[next(published, module_type(name))].append(norm)
    numbers = {
        "delta_norm": fmean(found.delta_norms.values()),
        "largest_value": found.largest_value,
        "smallest_value": found.smallest_value,
        "orthonormality": found.deviation,
    }
    numbers |= {f"delta_norm/{name}": fmean(norms) for name, norms in by_type.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _apply(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    _inject(model, args)
    train_only(model, factors_of(model))
    options: dict[str, Any] = {"regu_weight": 0.0}
    if args.method != "lora":
        options = {"regu_weight": args.reg_orth_coef, "terms": args.orth_terms, "squared": args.orth_squared}
        if args.orthogonality == "retraction":
            options["constraint"] = ExactFactors(model)
        if args.rank_allocation and total_steps:
            options |= {name: getattr(args, name) for name in _PRUNING} | {"total_steps": total_steps}
            if args.target_total_rank is not None:
                del options["target_rank"]
    try:
        low_rank = loralib.LowRankTraining(model, **options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    applied = AppliedMethod(model, low_rank, statistics=lambda: statistics(model))
    applied.own_rates = lambda: _own_rates(model, args)
    return applied


_PRUNING = [flag.name for flag in _SINGULAR_VALUE_FLAGS if flag.needs is _RANK_ALLOCATION]
_ALLOCATING = LOW_RANK_FLAGS + _SINGULAR_VALUE_FLAGS
METHODS = (
    Method("lora", "LoRA", 50, _apply, LOW_RANK_FLAGS + _LORA_FLAGS, takes_warm_start=True),
    Method("adalora", "AdaLoRA", 70, _apply, _ALLOCATING, _check_ranks, takes_warm_start=True),
    Method("lora2", "LoRA²", 80, _apply, _ALLOCATING + _SCALE_FLAGS, _check_scales, takes_warm_start=True),
)
