"""Low-rank updates of loralib: LoRA (arXiv 2106.09685), AdaLoRA (2303.10512) and LoRA² (2408.06854).

They are presets of one layer; those with singular values may be regularised and pruned to a rank budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from loralib.budget_schedule_with_warmup import FINAL_WARMUP, INIT_WARMUP, MASK_INTERVAL
from loralib.recipes.learning_rates import B_LR_RATIO, VALUE_LR_RATIO, parameter_groups
from nlu import METHOD_FOLDER
from nlu.arguments import AT_LEAST_1, INSIDE_1, NOT_NEGATIVE, POSITIVE, SHARE, Flag
from nlu.errors import UsageError, reason
from nlu.json_yaml import read_yaml
from nlu.methods.method import Method, head_parameters, train_only

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training

# ---- the flags -----------------------------------------------------------------------------------------------------

_MATCH = "match:"


def _number_or_match(text: str) -> int | str:
    """Parse ``--lora_k``: a whole number, or ``match:`` followed by the name of a LoRA file in configs/methods/."""
    return text if text.startswith(_MATCH) else int(text)


def _matched_rank(width: int | str | None) -> int | None:
    """The rank in the file that ``--lora_k match:NAME`` names; None for a number, or a file without a rank."""
    file = METHOD_FOLDER / f"{str(width).removeprefix(_MATCH)}.yaml"
    return read_yaml(file).get("lora_r") if str(width).startswith(_MATCH) and file.is_file() else None


LORA_MODULE = Flag(
    "lora_module", str, "auto", "Modules to adapt, comma-separated: the six published names, module-name suffixes or "
    "regular expressions. auto: the six if the encoder has all of them, otherwise all its linear layers.",
)  # fmt: skip
LOW_RANK_FLAGS = (
    Flag("lora_r", int, 8, "Rank r of the update of each layer, before pruning.", AT_LEAST_1),
    Flag("lora_alpha", float, 16.0, "The update is scaled by lora_alpha / lora_r.", POSITIVE),
    Flag("lora_dropout", float, 0.0, "Dropout probability on the input of the update.", SHARE),
    Flag("lora_path", str, None, "Initialise the factors from this saved adapter folder. The head is not copied."),
    LORA_MODULE,
)
LORA_PLUS_FLAGS = (
    Flag("lora_b_lr_ratio", float, B_LR_RATIO, "LoRA+: rate of B, as a multiple of --learning_rate.", POSITIVE),
)
PRUNING_FLAGS = (
    Flag("target_rank", int, None, "Average number of singular values kept per layer. Default: half of lora_r.",
         AT_LEAST_1),
    Flag("init_warmup", int, None, f"Steps before pruning starts. Default: {INIT_WARMUP:.0%} of the training.",
         NOT_NEGATIVE),
    Flag("final_warmup", int, None, f"Steps at the end, with fixed ranks. Default: {FINAL_WARMUP:.0%} of the training.",
         NOT_NEGATIVE),
    Flag("mask_interval", int, MASK_INTERVAL, "Steps between two prunings.", AT_LEAST_1),
    Flag("beta1", float, 0.85, "Decay of the moving average of the sensitivity.", INSIDE_1),
    Flag("beta2", float, 0.85, "Decay of the moving average of the uncertainty.", INSIDE_1),
    Flag("importance", ("inner", "full"), "inner",
         "inner: the paper's importance score; full: the outer factors count too."),
)  # fmt: skip
REGULARISER_FLAGS = (
    Flag("reg_orth_coef", float, 0.1, "Weight of the orthogonality regulariser.", NOT_NEGATIVE),
    Flag("orth_terms", str, "all", "Terms of the regulariser: all, or some of uv, UV and PQ joined by +."),
    Flag("orth_squared", bool, False, "Use squared norms in the regulariser."),
)
SINGULAR_VALUE_FLAGS = (
    Flag("lora_init", ("gaussian", "orthogonal"), "gaussian", "Initial factors; gaussian is the paper's choice."),
    Flag("orthogonality", ("penalty", "retraction"), "penalty",
         "penalty: the paper's regulariser; retraction: make the factors exactly orthonormal after each step."),
    *REGULARISER_FLAGS,
    Flag("rank_allocation", bool, True, "Whether singular values are pruned to the target rank."),
    *PRUNING_FLAGS,
    Flag("value_lr_ratio", float, VALUE_LR_RATIO,
         "Learning rate of the singular values, as a multiple of --learning_rate.", POSITIVE),
)  # fmt: skip
SCALE_FLAGS = (
    Flag("lora_k", _number_or_match, 8,
         "LoRA²: width k of the outer factors; match:lora chooses k to match LoRA's parameter count.", AT_LEAST_1,
         contents=_matched_rank),
    Flag("lora_share_outer", bool, False, "LoRA²: layers of the same module type share their outer factors."),
)  # fmt: skip

# ---- what they select and set --------------------------------------------------------------------------------------

_TOLERANCE = 0.1  # relative to the number of parameters that match: aims for


def adapted_modules(model: nn.Module, args: Any) -> list[str]:
    """Names of the encoder's linear layers that ``--lora_module`` selects; the head is trained in full instead.

    The comma of a quantifier such as ``{1,2}`` does not separate patterns. ``auto`` selects the six published modules
    if the encoder has all of them, and otherwise all of its linear layers.

    Raises:
        UsageError: if a pattern selects no layer, or all of them select only the head.
    """
    from loralib import match_modules

    head = {id(p) for p in head_parameters(model)}
    patterns = [pattern.strip() for pattern in re.split(r",(?!\d*\})", args.lora_module)]
    try:
        names = match_modules(model, patterns)
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None
    names = [name for name in names if id(model.get_submodule(name).weight) not in head]
    if not names:
        raise UsageError(f"--lora_module {args.lora_module} selects only the head: name modules of the encoder")
    return names


_SWITCHES = (("rank_allocation", False, PRUNING_FLAGS), ("orthogonality", "retraction", REGULARISER_FLAGS))


def _check_factors(args: Any, given: Collection[str]) -> None:
    """Refuse flags that a switched-off part would ignore, and an optimiser that would undo the pruning or the exact
    factors; set the values that follow from other flags."""
    for switch, off, flags in _SWITCHES:
        for flag in flags:
            if flag.name in given and getattr(args, switch) == off:
                raise UsageError(f"--{flag.name} has no meaning with --{switch} {off}: leave it out")
    if args.optim.startswith("schedule_free") and (args.rank_allocation or args.orthogonality == "retraction"):
        raise UsageError(
            f"--optim {args.optim} evaluates and saves an average of the weights, whose factors are neither pruned nor "
            "exactly orthonormal: give another optimiser"
        )
    if args.orthogonality == "retraction":
        args.reg_orth_coef = 0.0
    if args.target_rank is None:
        args.target_rank = max(1, args.lora_r // 2)


def inject_layers(model: nn.Module, args: Any, kind: str, **scales: Any) -> None:
    """Put low-rank layers of a kind into the selected modules, and freeze all but them and the head.

    Raises:
        UsageError: if a module cannot have such a layer.
    """
    import loralib
    from loralib.model import factors_of

    try:
        loralib.inject(
            model, kind, adapted_modules(model, args), r=args.lora_r, lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout, **scales,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(reason(error)) from None
    train_only(model, factors_of(model))


def _width(model: nn.Module, args: Any) -> int:
    """LoRA²'s k: --lora_k, or the k nearest to LoRA's number of parameters, Σ (out + in)·ρ over the modules, at rank ρ.

    Raises:
        UsageError: if no k comes within a tenth of that number, or match: names no file with a rank.
    """
    from loralib.injection import module_type

    if isinstance(args.lora_k, int):
        return args.lora_k
    sides = {name: sum(model.get_submodule(name).weight.shape) for name in adapted_modules(model, args)}
    outer = {(module_type(name) if args.lora_share_outer else name, side) for name, side in sides.items()}
    values = args.lora_r * len(sides)
    a_width = sum(side for _, side in outer) + 2 * values  # parameters that are added if k grows by 1
    rank = _matched_rank(args.lora_k)
    if rank is None:
        raise UsageError(f"--lora_k {args.lora_k} names no LoRA file in configs/methods/: give match:lora")
    target = sum(sides.values()) * rank
    k = max(1, math.ceil((target - values) / a_width - 0.5))
    size = k * a_width + values
    if abs(size - target) > _TOLERANCE * target:
        raise UsageError(f"--lora_k {args.lora_k}: k = {k} is nearest: {size:,} parameters, not {target:,}; give k")
    return k


# ---- the model -----------------------------------------------------------------------------------------------------


def _own_rates(model: nn.Module, args: Any) -> list[tuple[list[nn.Parameter], float]]:
    ratio = {"b_lr_ratio": args.lora_b_lr_ratio} if args.method == "lora" else {"value_lr_ratio": args.value_lr_ratio}
    return [(group["params"], group["lr"]) for group in parameter_groups(model, 1.0, **ratio) if group["lr"] != 1]


def _apply(model: nn.Module, args: Any, total_steps: int) -> Training:
    from loralib import LowRankTraining
    from loralib.recipes.exact_factors import ExactFactors

    scales: dict[str, Any] = {} if args.method == "lora" else {"init": args.lora_init}
    if args.method == "lora2":
        scales |= {"k": _width(model, args), "share_outer": args.lora_share_outer}
    inject_layers(model, args, args.method, **scales)
    options: dict[str, Any] = {"regu_weight": 0.0}
    if args.method != "lora":
        options = {"regu_weight": args.reg_orth_coef, "terms": args.orth_terms, "squared": args.orth_squared}
        if args.orthogonality == "retraction":
            options["constraint"] = ExactFactors
        if args.rank_allocation and total_steps:
            options |= {flag.name: getattr(args, flag.name) for flag in PRUNING_FLAGS}
            options["total_steps"] = total_steps
    try:
        return LowRankTraining(model, **options)
    except ValueError as error:
        shrink = "; --schedule_steps N shrinks a schedule made for N steps" if "init_warmup +" in str(error) else ""
        raise UsageError(f"{error}{shrink}") from None


_ALLOCATING = LOW_RANK_FLAGS + SINGULAR_VALUE_FLAGS
METHODS = (
    Method("lora", "LoRA", 50, _apply, LOW_RANK_FLAGS + LORA_PLUS_FLAGS, own_rates=_own_rates),
    Method("adalora", "AdaLoRA", 70, _apply, _ALLOCATING, _check_factors, own_rates=_own_rates),
    Method("lora2", "LoRA²", 80, _apply, _ALLOCATING + SCALE_FLAGS, _check_factors, own_rates=_own_rates),
)
