"""What a method is: its flags, what it does to a model, and the parts that all methods share.

The files of this package import torch and loralib where they touch a model, so that a command line is read without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nlu.errors import UsageError
from nlu.flags import Flag

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    import loralib


@dataclass
class AppliedMethod:
    """A model made ready for training.

    Attributes:
        model: what to train; ``requires_grad`` says which parameters do.
        low_rank: the regulariser and the rank allocation, as the Trainer mix-in of loralib drives them; by
            default neither.
        gates: SoRA's, which close ranks without a budget, or None.
        callbacks: further steps of the method inside the training loop.
        own_rates: gives (parameters, what the learning rate is multiplied by for them), asked for when the optimiser is
            made.
        statistics: gives numbers by name for the history, asked for at every logging step.
        pruned_params: counts the adapter's parameters that belong to pruned ranks; None: those of the low-rank layers.
    """

    model: nn.Module
    low_rank: Any = None
    gates: Any = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    own_rates: Callable[[], list[tuple[list[nn.Parameter], float]]] = list
    statistics: Callable[[], dict[str, float]] = dict
    pruned_params: Callable[[], int] | None = None

    def __post_init__(self) -> None:
        import loralib

        if self.low_rank is None:
            self.low_rank = loralib.LowRankTraining(self.model, regu_weight=0)
        if self.pruned_params is None:
            self.pruned_params = functools.partial(_pruned_factor_params, self)

    @property
    def allocator(self) -> loralib.RankAllocator | None:
        """What prunes singular values against a budget; None where nothing does."""
        return self.low_rank.allocator

    @property
    def ranks(self) -> Any:
        """What knows which ranks are live (the allocator or SoRA's gates); None where the method prunes none."""
        return self.allocator or self.gates


def _accept(*_: Any) -> None:
    """The check of a method whose flags contradict nothing."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune an encoder; ``args`` below are the run's flags of methods, ``Arguments.method``.

    Attributes:
        name: the base method that a file in configs/methods/ names.
        display: its name in tables and figures.
        order: its place in tables, ascending.
        apply: (model, args, total_steps) → AppliedMethod: changes ``model`` in place and freezes what does not train.
        flags: what the command line may set; every other method's flags are refused.
        check: (args, given): refuses contradictions between flags; ``given`` are the names on the command line.
        card: (args) → what ``rebuild`` needs from an adapter's card; None where the adapter's tensors say everything.
        rebuild: (model, args, card): puts the method's modules into a base before the adapter's tensors are loaded.
        takes_warm_start: whether ``--lora_path`` can start it.
        needs_autocast: in bfloat16, whether parameters train inside stock modules, so that autocast has to cast them.
    """

    name: str
    display: str
    order: int
    apply: Callable[[nn.Module, Any, int], AppliedMethod]
    flags: tuple[Flag, ...] = ()
    check: Callable[[Any, set[str]], None] = _accept
    card: Callable[[Any], dict[str, Any]] | None = None
    rebuild: Callable[[nn.Module, Any, dict[str, Any]], Any] = _accept
    takes_warm_start: bool = False
    needs_autocast: bool = False


# ---- the head, the encoder's layers, and what trains ---------------------------------------------------------------


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The classification head: the modules outside the encoder, and the encoder's pooler where it has one."""
    encoder = model.base_model
    modules = [child for child in model.children() if child is not encoder]
    pooler = getattr(encoder, "pooler", None)
    return modules if pooler is None else [*modules, pooler]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of :func:`head_modules`."""
    return [p for module in head_modules(model) for p in module.parameters()]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze everything except the given parameters and the head."""
    model.requires_grad_(False)
    for parameter in [*parameters, *head_parameters(model)]:
        parameter.requires_grad_(True)


def encoder_modules(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the encoder's linear layers that the patterns select; the head trains whole and gets no update.

    Args:
        patterns: as :func:`loralib.match_modules` takes them.

    Raises:
        UsageError: for a pattern that selects none of them.
    """
    from loralib import match_modules

    head = {id(p) for p in head_parameters(model)}
    chosen: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = match_modules(model, pattern)
        except ValueError as error:
            raise UsageError(f"--lora_module: {error}") from None
        inside = [name for name in names if id(model.get_submodule(name).weight) not in head]
        if not inside:
            raise UsageError(f"--lora_module: {pattern!r} selects only the head, which trains whole: leave it out")
        chosen |= dict.fromkeys(inside)
    return list(chosen)


def _pruned_factor_params(applied: AppliedMethod) -> int:
    """Parameters of low-rank layers that no live singular value uses, and the saved adapter leaves out: also the outer
    factors of layers without one."""
    every: dict[int, int] = {}
    kept: dict[int, int] = {}
    for name, mask in applied.ranks.rank_pattern.items() if applied.ranks else ():
        layer, live = applied.model.get_submodule(name), [i for i, is_live in enumerate(mask) if is_live]
        for parameter, values in zip(layer.lora_parameters(), layer.select(live), strict=True):
            every[id(parameter)] = parameter.numel()
            if live:
                kept[id(parameter)] = values.numel()
    return sum(every.values()) - sum(kept.values())
