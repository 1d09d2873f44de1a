"""Regulariser and rank allocation in any training loop. For transformers' Trainer see loralib.recipes.trainer_mixin.

A plain loop calls the model's optimiser through ``step``::

    low_rank = LowRankTraining(model, total_steps=1000, target_rank=4)
    ...
        loss = loss + low_rank.penalty()      # before backward()
        loss.backward()
        low_rank.step(optimizer)              # in place of optimizer.step() and optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loralib.allocator import RankAllocator, Ranks
from loralib.checks import check_number
from loralib.model import lora_layers
from loralib.orthogonality import compute_orth_regu


class Training(Protocol):
    """What a method does beside the optimiser; :class:`loralib.recipes.trainer_mixin.LowRankTrainerMixin` calls it.
    :class:`LowRankTraining` is the one for the layers of this library."""

    @property
    def ranks(self) -> Ranks | None:
        """What the method prunes; None if it prunes nothing."""

    def start(self, total_steps: int) -> None:
        """Begin a training of ``total_steps`` optimiser steps."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss of one optimiser step."""
        ...

    def before_step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Called when the gradients are complete and clipped, before the optimisers' step."""

    def after_step(self) -> None:
        """Called after the optimisers' step, before the gradients are cleared."""

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume, besides the model and the optimiser."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state. Raises ValueError if it belongs to another training."""


class LowRankTraining(Training):
    """What AdaLoRA and LoRA² add to a training loop.

    Args:
        model: has low-rank layers. The regulariser needs layers with singular values, pruning those of one rank.
        total_steps: optimiser steps of the whole training; may be given later to :meth:`start`.
        target_rank: average number of singular values that a layer keeps; without it nothing is pruned.
        constraint: the class :class:`loralib.recipes.exact_factors.ExactFactors`, or another that is made for a model
            and has its three methods, in place of the regulariser.
        regu_weight: weight of the regulariser (number or scalar tensor); 0 turns it off. Default: 0.1, or 0 with a
            constraint.
        terms, squared: as for :func:`loralib.compute_orth_regu`.
        pruning: init_warmup, final_warmup, mask_interval, beta1, beta2 and importance, as for
            :class:`loralib.RankAllocator`.

    Attributes:
        steps_done: optimiser steps since :meth:`start`.
        allocator: the :class:`loralib.RankAllocator`; None if nothing is pruned, and before :meth:`start`.

    Raises:
        TypeError: for an unknown option, or a constraint that is made for a model already.
        ValueError: for a value out of range, an option of pruning without ``target_rank``, or a model without the
            layers that the regulariser or the pruning needs.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        target_rank: int | None = None,
        constraint: Callable[[nn.Module], Any] | None = None,
        regu_weight: float | None = None,
        terms: str = "all",
        squared: bool = False,
        **pruning: Any,
    ) -> None:
        if pruning and target_rank is None:
            raise ValueError(f"{next(iter(pruning))} has no meaning without target_rank: give that, or leave it out")
        self.model, self.terms, self.squared = model, terms, squared
        if constraint is not None and not callable(constraint):
            raise TypeError(f"constraint must be a class, such as ExactFactors: got an object, {constraint!r:.80}")
        self.constraint = None if constraint is None else constraint(model)
        self.regu_weight = (0.1 if constraint is None else 0.0) if regu_weight is None else regu_weight
        check_number("regu_weight", float(self.regu_weight), lambda weight: 0 <= weight < math.inf, "a number ≥ 0")
        self.target_rank, self._pruning = target_rank, pruning
        self.total_steps, self.steps_done = total_steps, 0
        self.allocator: RankAllocator | None = None
        self.penalty()  # raises if it cannot be computed
        if total_steps is not None:
            self.start(total_steps)
        elif target_rank is not None:
            RankAllocator(model, sys.maxsize, target_rank, **pruning)  # refuses a wrong option now, not at start()

    def start(self, total_steps: int) -> None:
        """Begin a training of ``total_steps`` optimiser steps, with a new pruning schedule. Raises as
        :class:`loralib.RankAllocator`, for example if the steps are too few for the pruning."""
        if self.target_rank is not None:
            self.allocator = RankAllocator(self.model, total_steps, self.target_rank, **self._pruning)
        self.total_steps, self.steps_done = total_steps, 0

    def penalty(self) -> Tensor | float:
        """The weighted regulariser, to add to the loss; 0 if it is off."""
        if self.regu_weight == 0:
            return 0.0
        return compute_orth_regu(self.model, self.regu_weight, self.terms, self.squared)

    def step(self, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """One optimiser step: :func:`unscale`, :meth:`before_step`, ``optimizer.step()``, :meth:`after_step` and
        ``optimizer.zero_grad()``, so that a second ``optimizer.step()`` finds no gradients and undoes no pruning.

        Call it once the gradients are complete and clipped. Like ``optimizer.step()``, it does nothing for an optimiser
        that accelerate has prepared while ``accelerator.accumulate`` gathers gradients.

        Args:
            scaler: a ``torch.amp.GradScaler``, whose ``step(optimizer)`` is then called; call its ``update()`` after.
        """
        if not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True):
            return
        unscale(optimizer, scaler)
        self.before_step(optimizer)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        self.after_step()
        optimizer.zero_grad()

    def before_step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Called by :meth:`step`, or by a loop that steps its optimisers itself.

        Raises:
            ValueError: if the optimisers lack trainable parameters, see :func:`check_optimizers`.
        """
        check_optimizers(optimizers, self.model)
        if self.constraint is not None:
            if self.steps_done == 0:
                self.constraint.start()
            self.constraint.before_step()

    def after_step(self) -> None:
        """Called by :meth:`step`, or by a loop that steps its optimisers itself.

        Warns if layers got no gradient in the first step, and at each step beyond ``total_steps``.

        Raises:
            RuntimeError: if the number of steps is unknown, but needed for pruning.
            ValueError: if pruning finds no gradient at all.
        """
        if self.target_rank is not None and self.allocator is None:
            raise RuntimeError("pruning depends on the number of optimiser steps: give total_steps, or call start()")
        if self.steps_done == 0:
            self._warn_of_layers_without_gradient()
        if self.constraint is not None:
            self.constraint.after_step()
        self.steps_done += 1
        if self.total_steps is not None and self.steps_done > self.total_steps:
            warnings.warn(
                f"there are more steps than total_steps ({self.total_steps}): give the number of optimiser steps, and "
                "call step() or after_step() once for each of them, not for each accumulated batch",
                stacklevel=2,
            )
        if self.allocator is not None:
            self.allocator.step(self.steps_done)

    def _warn_of_layers_without_gradient(self) -> None:
        values = {name: layer.starts_at_zero for name, layer in lora_layers(self.model).items() if layer.r}
        trained = {name: value for name, value in values.items() if value.requires_grad}
        if missed := [name for name, parameter in trained.items() if parameter.grad is None]:
            warnings.warn(
                f"in the first step no gradient reached {len(missed)} of {len(trained)} low-rank layers, {missed[0]} "
                "among them: the model did not call them (one that reads their weights itself ignores their updates), "
                "or the gradients were cleared before after_step()",
                stacklevel=3,
            )

    @property
    def ranks(self) -> Ranks | None:
        """None also before :meth:`start`."""
        return None if self.allocator is None else self.allocator.ranks(self.steps_done)

    def state_dict(self) -> dict[str, Any]:
        allocator = None if self.allocator is None else self.allocator.state_dict()
        return {"step": self.steps_done, "allocator": allocator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["allocator"] is None) != (self.allocator is None):
            raise ValueError("only one of the two trainings prunes: give the same target_rank and total_steps")
        if self.allocator is not None:
            self.allocator.load_state_dict(state["allocator"])
        self.steps_done = state["step"]


def unscale(optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
    """Unscale the gradients of float16, unless clipping has.

    A fused optimiser that skips a step leaves them scaled: the pruning would count them thousands of times too large.

    Args:
        scaler: by default that of an optimiser that accelerate has prepared.
    """
    if scaler is None:
        scaler, optimizer = getattr(optimizer, "scaler", None), getattr(optimizer, "optimizer", optimizer)
    if scaler is not None:
        with contextlib.suppress(RuntimeError):  # they are unscaled already
            scaler.unscale_(optimizer)


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> None:
    """Raises ValueError if the optimisers lack a parameter of ``model`` that requires a gradient: it would never
    change. They were made before ``inject()``, ``compact()`` or the unfreezing of the head, or for another model."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(
                f"the optimiser lacks {name}, which would never train: make it after inject(), compact() and the "
                "unfreezing of the head, for the model whose training this is (in a Trainer: model=, not model_init=); "
                "if several optimisers hold its parameters, call before_step() with all of them, and after_step()"
            )
