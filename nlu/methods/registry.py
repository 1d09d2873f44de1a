"""What a fine-tuning method does to a model: which parts it adds, what trains, what is counted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

import loralib
from loralib.allocator import check_schedule
from nlu.arguments import SVD, MethodArguments, parse_widths
from nlu.errors import UsageError
from nlu.methods.adapters import add_adapters
from nlu.methods.peft_methods import PeftAdaLora, check_targets, inject_peft, load_peft_config
from nlu.methods.sora import ProximalGates, inject_sora


@dataclass
class AppliedMethod:
    """A model made ready for training.

    Attributes:
        model: what to train; ``requires_grad`` says which parameters do.
        allocator: prunes singular values after every optimiser step, or None.
        gates: SoRA's, which close ranks without a budget, or None.
        regulariser: its (weighted) value is added to the loss, or None.
        callbacks: further steps of the method inside the training loop.
        stateful: what must travel in a checkpoint beside the trainable parameters; each has state_dict/load_state_dict.
        own_rates: (parameters, what the learning rate is multiplied by for them).
        needs_autocast: in bfloat16, whether parameters train inside stock modules, so that autocast has to cast them.
    """

    model: nn.Module
    allocator: loralib.RankAllocator | None = None
    gates: ProximalGates | None = None
    regulariser: Callable[[], Tensor] | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    stateful: dict[str, Any] = field(default_factory=dict)
    own_rates: list[tuple[list[nn.Parameter], float]] = field(default_factory=list)
    needs_autocast: bool = False

    @property
    def ranks(self) -> loralib.RankAllocator | ProximalGates | None:
        """What knows which ranks are live; None where the method prunes none."""
        return self.allocator or self.gates


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


def live_adapter_params(applied: AppliedMethod, adapter_params: int) -> int:
    """Adapter parameters without those that belong to pruned singular values."""
    if "peft" in applied.stateful:
        return adapter_params - applied.stateful["peft"].pruned_params()
    pruned = 0
    for name, mask in applied.ranks.rank_pattern.items() if applied.ranks else ():
        layer = applied.model.get_submodule(name)
        pruned += sum(t.numel() for t in layer.lora_parameters())
        pruned -= sum(t.numel() for t in layer.select([i for i, live in enumerate(mask) if live]))
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


def module_patterns(args: MethodArguments) -> list[str]:
    """``--lora_module`` as a list; the comma of a quantifier such as ``{1,2}`` belongs to its expression."""
    return [pattern.strip() for pattern in re.split(r",(?!\d*\})", args.lora_module)]


def encoder_modules(model: nn.Module, args: MethodArguments) -> list[str]:
    """Names of the encoder's linear layers that ``--lora_module`` selects; the head trains whole and gets no update.

    Raises:
        UsageError: for a pattern that selects none of them.
    """
    head = {id(p) for p in head_parameters(model)}
    chosen: dict[str, None] = {}
    for pattern in module_patterns(args):
        try:
            names = loralib.match_modules(model, pattern)
        except ValueError as error:
            raise UsageError(f"--lora_module: {error}") from None
        inside = [name for name in names if id(model.get_submodule(name).weight) not in head]
        if not inside:
            raise UsageError(f"--lora_module: {pattern!r} selects only the head, which trains whole: leave it out")
        chosen |= dict.fromkeys(inside)
    return list(chosen)


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
            encoder_modules(model, args),
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
    _train_only(model, [p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()])
    applied = AppliedMethod(model)
    if args.method in SVD and args.reg_orth_coef > 0:
        regulariser = loralib.OrthogonalityRegulariser(model, args.orth_terms, args.orth_squared)
        applied.regulariser = lambda: args.reg_orth_coef * regulariser()
    if args.value_lr_ratio != 1:
        values = [layer.lora_E for layer in loralib.lora_layers(model).values()]
        applied.own_rates.append((values, args.value_lr_ratio))
    if allocates(args) and total_steps:
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


def _train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze all but the given parameters and the head."""
    model.requires_grad_(False)
    for parameter in [*parameters, *head_parameters(model)]:
        parameter.requires_grad_(True)


def _full(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    _train_only(model, model.parameters())
    return AppliedMethod(model, needs_autocast=True)


def _bitfit(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    _train_only(model, [p for name, p in model.base_model.named_parameters() if name.split(".")[-1] == "bias"])
    return AppliedMethod(model, needs_autocast=True)


def _adapters(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    adapters = add_adapters(model, args.method, args.adapter_size)
    _train_only(model, [p for adapter in adapters for p in adapter.parameters()])
    return AppliedMethod(model)


def _sora(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    modules = encoder_modules(model, args)
    try:
        inject_sora(model, modules, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None
    _train_only(model, [p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()])
    gates = ProximalGates(model, args.sora_lambda)
    return AppliedMethod(model, gates=gates, callbacks=[gates])


def _refuse_ignored_modules(config: Any, args: MethodArguments) -> None:
    if config.target_modules is not None and args.lora_module != MethodArguments.lora_module:
        raise UsageError(f"--lora_module: {args.peft_config} names its own target_modules: change them there")


def _peft(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    config = load_peft_config(args.peft_config, total_steps)
    _refuse_ignored_modules(config, args)
    tuner = inject_peft(model, config, encoder_modules(model, args) if config.target_modules is None else [])
    _train_only(model, [p for p in model.base_model.parameters() if p.requires_grad])
    applied = AppliedMethod(model, needs_autocast=True)
    if config.peft_type.value == "ADALORA":
        loop = PeftAdaLora(tuner)
        applied.regulariser, applied.callbacks, applied.stateful = loop.regulariser, [loop], {"peft": loop}
    return applied


METHODS: dict[str, Callable[[nn.Module, MethodArguments, int], AppliedMethod]] = {
    "lora": _low_rank,
    "adalora": _low_rank,
    "lora2": _low_rank,
    "full": _full,
    "bitfit": _bitfit,
    "hadapter": _adapters,
    "padapter": _adapters,
    "sora": _sora,
    "peft": _peft,
}


def apply_method(model: nn.Module, args: MethodArguments, total_steps: int) -> AppliedMethod:
    """Make ``model`` ready for the chosen method, in place.

    Args:
        total_steps: optimiser steps of the whole training; the rank allocation is scheduled over them. 0 where nothing
            is trained: there is no allocation then.

    Raises:
        UsageError: for arguments that do not fit the model or the length of the training.
    """
    return METHODS[args.method](model, args, total_steps)


def check_method_fits(model: nn.Module, args: MethodArguments, total_steps: int) -> None:
    """Raise what :func:`apply_method` would, on a model without weights (on the meta device).

    Args:
        total_steps: as there.
    """
    if args.method == "peft":
        config = load_peft_config(args.peft_config, total_steps)
        _refuse_ignored_modules(config, args)
        modules = encoder_modules(model, args) if config.target_modules is None else []
        check_targets(model, config, modules)  # not all of peft's layers can be made without weights
        looks_at_whole_parameters = config.peft_type.value == "ADALORA"
    else:
        applied = METHODS[args.method](model, args, total_steps)
        looks_at_whole_parameters = applied.ranks is not None or applied.regulariser is not None
    # What FSDP splits over the devices, no process has whole.
    if looks_at_whole_parameters and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError(
            "pruning and the orthogonality regulariser need whole parameters, which FSDP splits: use torchrun, or a "
            "method without them (lora, full, hadapter, …)"
        )
