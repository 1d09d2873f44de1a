"""What a method is: its flags, what it does to a model, and the parts that all methods share.

The files of methods import torch and loralib only in functions that need a model, so that a command line is read fast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nlu.arguments import Flag

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training


@dataclass
class AppliedMethod:
    """A model made ready for training.

    Attributes:
        model: the model; ``requires_grad`` marks the trainable parameters.
        low_rank: what the method does beside the optimiser; by default a :class:`loralib.LowRankTraining` that neither
            regularises nor prunes.
        own_rates: returns pairs (parameters, factor of their learning rate); called when the optimiser is made.
    """

    model: nn.Module
    low_rank: Training = None
    own_rates: Callable[[], list[tuple[list[nn.Parameter], float]]] = list

    def __post_init__(self) -> None:
        import loralib

        self.low_rank = self.low_rank or loralib.LowRankTraining(self.model, regu_weight=0)

    def statistics(self) -> dict[str, float]:
        """For the history: ‖ΔW‖_F, singular values, orthonormality; empty without low-rank layers."""
        from loralib.model import lora_layers
        from loralib.recipes.diagnostics import update_statistics

        if not lora_layers(self.model):
            return {}
        found = update_statistics(self.model)
        numbers = {
            "delta_norm": fmean(found.delta_norms.values()),
            "largest_value": found.largest_value,
            "smallest_value": found.smallest_value,
            "orthonormality": found.deviation,
        }
        return {name: number for name, number in numbers.items() if number is not None}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune an encoder; ``args`` below holds the values of the methods' flags, as ``Arguments`` does.

    Attributes:
        name: the base method that a file in configs/methods/ names.
        display: its name in tables and figures.
        order: its place in tables, ascending.
        apply: (model, args, total_steps) → AppliedMethod: changes ``model`` in place and freezes what is not trained.
            ``total_steps`` is the number of optimiser steps, over which pruning is scheduled; 0 without training.
            Raises UsageError for arguments that do not fit the model or the length of the training.
        flags: the flags that the method reads; the command line refuses other methods' flags.
        check: (args, given): refuses contradictions between flags, and sets values that follow from others in ``args``;
            ``given`` has the names on the command line.
        rebuild: (model, args, card): puts the method's modules into a base before an adapter's tensors are loaded;
            None if loading the tensors needs no such modules.
        card: (args) → what ``rebuild`` needs from the card beside the values of the flags.
        needs_autocast: whether parameters inside stock modules are trained, so that bfloat16 needs autocast.
    """

    name: str
    display: str
    order: int
    apply: Callable[[nn.Module, Any, int], AppliedMethod]
    flags: tuple[Flag, ...] = ()
    check: Callable[[Any, Collection[str]], None] = lambda args, given: None
    rebuild: Callable[[nn.Module, Any, dict[str, Any]], Any] | None = None
    card: Callable[[Any], dict[str, Any]] = lambda args: {}
    needs_autocast: bool = False


# ---- the head, and the trainable parameters ------------------------------------------------------------------------


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The classification head: the modules outside the encoder, and the encoder's pooler if it has one."""
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
