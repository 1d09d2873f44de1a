"""Low-rank updates of loralib: LoRA (arXiv 2106.09685), AdaLoRA (2303.10512) and LoRA² (2408.06854).

They are presets of one layer; those with singular values may be regularised and pruned to a rank budget.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nlu import METHOD_FOLDER
from nlu.errors import UsageError
from nlu.flags import AT_LEAST_1, INSIDE_1, NOT_NEGATIVE, POSITIVE, SHARE, Flag
from nlu.json_yaml import read_yaml
from nlu.methods.method import AppliedMethod, Method, encoder_modules, head_parameters, train_only

if TYPE_CHECKING:
    from torch import nn

_MATCH = "match:"
_TOLERANCE = 0.1  # of the size that match: is after


def _width(text: str) -> int | str:
    """``--lora_k``: a whole number, or ``match:`` and the name of a LoRA file in configs/methods/."""
    return text if text.startswith(_MATCH) else int(text)


LORA_MODULE = Flag(
    "lora_module", str, "auto", "Comma-separated modules: the six published names, module-name suffixes, or a regular "
    "expression. Default: the six where the encoder has them, else each of its linear layers.",
)  # fmt: skip
LOW_RANK_FLAGS = (
    Flag("lora_r", int, 8, "Rank r: initial singular values per layer.", AT_LEAST_1),
    Flag("lora_alpha", float, 16.0, "The update is scaled by lora_alpha / lora_r.", POSITIVE),
    Flag("lora_dropout", float, 0.0, "Dropout on the input of the update.", SHARE),
    LORA_MODULE,
)
_LORA_FLAGS = (
    Flag("lora_b_lr_ratio", float, 1.0, "LoRA+: learning rate of B, as a multiple of --learning_rate.", POSITIVE),
)
_PRUNING_FLAGS = (
    Flag("target_rank", int, None, "Average number of singular values kept per layer. Default: half of lora_r.",
         AT_LEAST_1),
    Flag("init_warmup", int, None, "Steps before pruning starts. Default: a tenth of the training.",
         NOT_NEGATIVE),
    Flag("final_warmup", int, None, "Last steps, with the ranks held. Default: half of the training.",
         NOT_NEGATIVE),
    Flag("mask_interval", int, 10, "Steps between two allocations.", AT_LEAST_1),
    Flag("beta1", float, 0.85, "Moving average of the sensitivity.", INSIDE_1),
    Flag("beta2", float, 0.85, "Moving average of the uncertainty.", INSIDE_1),
    Flag("importance", ("inner", "full"), "inner",
         "inner: the paper's importance; full: outer factors scored too.", None),
)  # fmt: skip
_REGULARISER_FLAGS = (
    Flag("reg_orth_coef", float, 0.1, "Weight of the orthogonality regulariser.", NOT_NEGATIVE),
    Flag("orth_terms", str, "all", "Regulariser: all, or some of uv, UV, PQ joined by +."),
    Flag("orth_squared", bool, False, "Squared norms in the regulariser."),
)
_SINGULAR_VALUE_FLAGS = (
    Flag("lora_init", ("gaussian", "orthogonal"), "gaussian", "Initial factors; gaussian is the paper's."),
    Flag("orthogonality", ("penalty", "retraction"), "penalty",
         "penalty: the paper's regulariser; retraction: factors made exactly orthonormal after each step."),
    *_REGULARISER_FLAGS,
    Flag("rank_allocation", bool, True, "Whether singular values are pruned to the target rank."),
    *_PRUNING_FLAGS,
    Flag("value_lr_ratio", float, 1.0,
         "Learning rate of the singular values, as a multiple of --learning_rate.", POSITIVE),
)  # fmt: skip
_SCALE_FLAGS = (
    Flag("lora_k", _width, 8,
         "LoRA²: width k of the outer scale; match:lora chooses it for LoRA's number of parameters.", AT_LEAST_1),
    Flag("lora_share_outer", bool, False, "All layers of one module type share their outer factors."),
)  # fmt: skip


def adapted_modules(model: nn.Module, args: Any) -> list[str]:
    """Names of the encoder's linear layers that ``--lora_module`` selects.

    The comma of a quantifier such as ``{1,2}`` belongs to its expression. ``auto`` selects the six published modules
    where the encoder has all of them, and each of its linear layers elsewhere.

    Raises:
        UsageError: for a pattern that selects none.
    """
    if args.lora_module == "auto":
        from loralib.injection import auto_modules

        head = {id(p) for p in head_parameters(model)}
        return [name for name in auto_modules(model) if id(model.get_submodule(name).weight) not in head]
    return encoder_modules(model, [pattern.strip() for pattern in re.split(r",(?!\d*\})", args.lora_module)])


_SWITCHES = (("rank_allocation", False, _PRUNING_FLAGS), ("orthogonality", "retraction", _REGULARISER_FLAGS))


def _check_factors(args: Any, given: Collection[str]) -> None:
    """Flags that a switched-off part would ignore, and the two ways to orthogonality."""
    for switch, off, flags in _SWITCHES:
        for flag in flags:
            if flag.name in given and getattr(args, switch) == off:
                raise UsageError(f"--{flag.name} has no meaning with --{switch} {off}: leave it out")
    if args.orthogonality == "retraction":
        if args.lora_init == "gaussian":
            raise UsageError("--orthogonality retraction needs orthonormal factors: give --lora_init orthogonal")
        args.reg_orth_coef = 0.0
    if args.target_rank is None:
        args.target_rank = max(1, args.lora_r // 2)


# ---- LoRA²'s width -------------------------------------------------------------------------------------------------


def _rank_to_match(match: str) -> int:
    name = match.removeprefix(_MATCH)
    path = METHOD_FOLDER / f"{name}.yaml"
    values = read_yaml(path) if path.name in {p.name for p in METHOD_FOLDER.iterdir()} else {}
    if values.get("method") != "lora":
        raise UsageError(f"--lora_k {match}: {name!r} is no LoRA method of configs/methods/: give match:lora")
    return values["lora_r"]


def _matched_width(model: nn.Module, modules: list[str], args: Any) -> int:
    """The k whose size is nearest to (out + in)·ρ over all modules, ρ being LoRA's rank.

    Raises:
        UsageError: where no width comes within a tenth of that.
    """
    from loralib.injection import module_type

    sides = {name: sum(model.get_submodule(name).weight.shape) for name in modules}
    outer = {(module_type(name) if args.lora_share_outer else name, side) for name, side in sides.items()}
    a_width = sum(side for _, side in outer) + 2 * args.lora_r * len(modules)  # parameters that one more k adds
    target = sum(sides.values()) * _rank_to_match(args.lora_k)
    k = max(1, math.ceil((target - args.lora_r * len(modules)) / a_width - 0.5))
    size = k * a_width + args.lora_r * len(modules)
    if abs(size - target) > _TOLERANCE * target:
        raise UsageError(
            f"--lora_k {args.lora_k}: the nearest size is {size:,} at k = {k}, not {target:,}: give a number"
        )
    return k


# ---- the model -----------------------------------------------------------------------------------------------------


def _inject(model: nn.Module, args: Any) -> None:
    import loralib

    options: dict[str, Any] = {} if args.method == "lora" else {"init": args.lora_init}
    modules = adapted_modules(model, args)
    if args.method == "lora2":
        k = args.lora_k if isinstance(args.lora_k, int) else _matched_width(model, modules, args)
        options |= {"k": k, "share_outer": args.lora_share_outer}
    try:
        loralib.inject(
            model, args.method, modules, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            **options,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None


def _own_rates(model: nn.Module, args: Any) -> list[tuple[list[nn.Parameter], float]]:
    from loralib.recipes.learning_rates import parameter_groups

    ratio = {"b_lr_ratio": args.lora_b_lr_ratio} if args.method == "lora" else {"value_lr_ratio": args.value_lr_ratio}
    return [(group["params"], group["lr"]) for group in parameter_groups(model, 1.0, **ratio) if group["lr"] != 1]


def statistics(model: nn.Module) -> dict[str, float]:
    """For the history: the mean ‖ΔW‖_F of all layers and of each module type, singular values, orthonormality."""
    from loralib.injection import PUBLISHED_MODULES, module_type
    from loralib.recipes.diagnostics import update_statistics

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
    from loralib import LowRankTraining
    from loralib.model import factors_of
    from loralib.recipes.exact_factors import ExactFactors

    _inject(model, args)
    train_only(model, factors_of(model))
    options: dict[str, Any] = {"regu_weight": 0.0}
    if args.method != "lora":
        options = {"regu_weight": args.reg_orth_coef, "terms": args.orth_terms, "squared": args.orth_squared}
        if args.orthogonality == "retraction":
            options["constraint"] = ExactFactors(model)
        if args.rank_allocation and total_steps:
            options |= {flag.name: getattr(args, flag.name) for flag in _PRUNING_FLAGS}
            options["total_steps"] = total_steps
    try:
        low_rank = LowRankTraining(model, **options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return AppliedMethod(
        model, low_rank, statistics=lambda: statistics(model), own_rates=lambda: _own_rates(model, args)
    )


_ALLOCATING = LOW_RANK_FLAGS + _SINGULAR_VALUE_FLAGS
METHODS = (
    Method("lora", "LoRA", 50, _apply, LOW_RANK_FLAGS + _LORA_FLAGS, takes_warm_start=True),
    Method("adalora", "AdaLoRA", 70, _apply, _ALLOCATING, _check_factors, takes_warm_start=True),
    Method("lora2", "LoRA²", 80, _apply, _ALLOCATING + _SCALE_FLAGS, _check_factors, takes_warm_start=True),
)
