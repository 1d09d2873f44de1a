"""What a method is: its flags, what it does to a model, and the parts that all methods share.

The files of methods import torch and loralib only in functions that need a model, so that a command line is read fast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nlu.arguments import Flag

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training


@dataclass(frozen=True)
class Method:
    """One way to fine-tune an encoder; ``args`` below holds the values of the methods' flags, as ``Arguments`` does.

    Attributes:
        name: the base method that a file in configs/methods/ names.
        display: its name in tables and figures.
        order: its place in tables, ascending.
        apply: (model, args, total_steps) → what the method does beside the optimiser (a loralib.training.Training):
            changes ``model`` in place and freezes what is not trained. ``total_steps`` is the number of optimiser
            steps, over which pruning is scheduled; 0 without training. Raises UsageError for arguments that do not fit
            the model or the length of the training.
        flags: the flags that the method reads; the command line refuses other methods' flags.
        check: (args, given): refuses contradictions between flags, and sets values that follow from others in ``args``;
            ``given`` has the names on the command line.
        card: (args) → the values of flags from which ``apply`` makes the method's modules again, before an adapter's
            tensors are loaded; None if loading them needs no such modules.
        own_rates: (model, args) → pairs (parameters, factor of their learning rate).
        needs_autocast: whether parameters inside stock modules are trained, so that bfloat16 needs autocast.
    """

    name: str
    display: str
    order: int
    apply: Callable[[nn.Module, Any, int], Training]
    flags: tuple[Flag, ...] = ()
    check: Callable[[Any, Collection[str]], None] = lambda args, given: None
    card: Callable[[Any], dict[str, Any]] | None = None
    own_rates: Callable[[nn.Module, Any], list[tuple[list[nn.Parameter], float]]] = lambda model, args: []
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


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Training:
    """Freeze everything except the given parameters and the head.

    Returns:
        The training of a method that does nothing beside the optimiser.
    """
    from loralib import LowRankTraining

    model.requires_grad_(False)
    for parameter in [*parameters, *head_parameters(model)]:
        parameter.requires_grad_(True)
    return LowRankTraining(model, regu_weight=0)
