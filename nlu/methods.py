"""What a fine-tuning method does to a model: which parts it adds, what trains, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

import loralib
from loralib.allocator import check_schedule
from nlu.arguments import SVD, MethodArguments, parse_widths
from nlu.errors import UsageError


@dataclass
class AppliedMethod:
    """A model made ready for training.

    Attributes:
        model: what to train; ``requires_grad`` says which parameters do.
        allocator: prunes singular values after every optimiser step, or None.
        regulariser: its (weighted) value is added to the loss, or None.
        callbacks: further steps of the method inside the training loop.
        stateful: what must travel in a checkpoint beside the trainable parameters; each has state_dict/load_state_dict.
        needs_autocast: in bfloat16, whether parameters train inside stock modules, so that autocast has to cast them.
    """

    model: nn.Module
    allocator: loralib.RankAllocator | None = None
    regulariser: Callable[[], Tensor] | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    stateful: dict[str, Any] = field(default_factory=dict)
    needs_autocast: bool = False


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The classification head: all that lies outside the encoder, and the encoder's pooler where it has one."""
    inside = {id(p) for p in model.base_model.parameters()}
    yield from (p for p in model.parameters() if id(p) not in inside)
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None and model.base_model is not model:
        yield from pooler.parameters()


def count_parameters(model: nn.Module) -> dict[str, int]:
    """adapter_params and head_params that train, and total_params; a shared parameter counts once."""
    head = {id(p) for p in head_parameters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "adapter_params": sum(p.numel() for p in trainable if id(p) not in head),
        "head_params": sum(p.numel() for p in trainable if id(p) in head),
        "total_params": sum(p.numel() for p in model.parameters()),
    }


def live_adapter_params(model: nn.Module, allocator: loralib.RankAllocator | None, adapter_params: int) -> int:
    """Adapter parameters without those that belong to pruned singular values: e_i, B[:, i] and A[i, :] innermost."""
    if allocator is None:
        return adapter_params
    pruned = 0
    for name, mask in allocator.rank_pattern.items():
        layer = model.get_submodule(name)
        per_value = 1 + layer.lora_B[-1].shape[0] + layer.lora_A[-1].shape[1]
        pruned += per_value * mask.count(False)
    return adapter_params - pruned


def schedule_of(args: MethodArguments, total_steps: int) -> tuple[int, int]:
    """(init_warmup, final_warmup), the defaults filled in: a tenth and half of the training.

    Raises:
        UsageError: if they leave no step to prune in.
    """
    init = total_steps // 10 if args.init_warmup is None else args.init_warmup
    final = total_steps // 2 if args.final_warmup is None else args.final_warmup
    try:
        check_schedule(init, final, total_steps)
    except ValueError as error:
        raise UsageError(f"--{error}" if str(error).startswith("init_warmup") else str(error)) from None
    return init, final


def allocates(args: MethodArguments) -> bool:
    """Whether the method prunes singular values during training."""
    return args.method in SVD and args.rank_allocation


def inject_factors(model: nn.Module, args: MethodArguments) -> list[str]:
    """Replace the selected modules of the encoder by the method's layers; returns their names.

    Raises:
        UsageError: for a pattern that matches nothing.
    """
    widths = parse_widths(args)
    try:
        return loralib.inject(
            model,
            "multiscale" if args.method == "lora2" else args.method,
            [pattern.strip() for pattern in args.lora_module.split(",")],
            r=args.lora_r,
            widths=widths,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            share_outer=args.lora_share_outer,
            init=args.lora_init if args.method in SVD else None,
        )
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None


def _low_rank(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    inject_factors(model, args)
    loralib.mark_only_lora_as_trainable(model)
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
    applied = AppliedMethod(model)
    if args.method in SVD and args.reg_orth_coef > 0:
        regulariser = loralib.OrthogonalityRegulariser(model, args.orth_terms, args.orth_squared)
        applied.regulariser = lambda: args.reg_orth_coef * regulariser()
    if allocates(args):
        init_warmup, final_warmup = schedule_of(args, total_steps)
        try:
            applied.allocator = loralib.RankAllocator(
                model, args.lora_r, args.target_rank, init_warmup, final_warmup, args.mask_interval,
                args.beta1, args.beta2, total_steps, args.target_total_rank, args.importance,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from None
        applied.stateful["allocator"] = applied.allocator
    return applied


METHODS: dict[str, Callable[[nn.Module, MethodArguments, int], AppliedMethod]] = {
    "lora": _low_rank,
    "adalora": _low_rank,
    "lora2": _low_rank,
}


def apply_method(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    """Make ``model`` ready for the chosen method, in place.

    Args:
        total_steps: optimiser steps of the whole training; the rank allocation is scheduled over them.

    Raises:
        UsageError: for arguments that do not fit the model or the length of the training.
    """
    return METHODS[args.method](model, args, total_steps)
