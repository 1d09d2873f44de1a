"""Train peft's AdaLoRA in a loop, or in a Trainer with the mix-in of :mod:`loralib.recipes.trainer_mixin`:

    trainer = MyTrainer(model=peft_model, low_rank=AdaLoraTraining(peft_model), args=args, train_dataset=rows)

peft leaves calling ``update_and_allocate`` to the training loop. transformers' Trainer never calls it, so that no rank
is ever pruned. The command ``python -m loralib.export PEFT_ADALORA --to peft OUT`` converts an adapter of peft's
AdaLoRA to an ordinary LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel, RankAllocator
from torch import Tensor, nn

from loralib.allocator import Ranks
from loralib.budget_schedule_with_warmup import BudgetSchedule
from loralib.training import Training, check_optimizers

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # peft's names


class _Unregularised(AdaLoraModel):
    """peft's model, whose loss is the task's alone. With peft's regulariser in it, a Trainer that accumulates gradients
    would count the regulariser several times, and one that computes its own loss not at all."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


class AdaLoraTraining(Training):
    """Runs peft's AdaLoRA.

    The regulariser is in :meth:`penalty` alone: the model's loss no longer includes it. In a loop of your own, add the
    penalty to the loss, and call :meth:`before_step` and :meth:`after_step` around the optimiser's step.

    Args:
        model: a ``PeftModel`` with a trainable AdaLoRA adapter, or peft's ``AdaLoraModel``.
    """

    def __init__(self, model: nn.Module) -> None:
        tuner: Any = model.base_model if isinstance(model, PeftModel) else model
        self.tuner, self.adapter = tuner, tuner.trainable_adapter_name
        self.config = tuner.peft_config[self.adapter]
        tuner.rankallocator = RankAllocator(tuner.model, self.config, self.adapter)  # for the ranks as loaded
        self.layers = {name: module for name, module in tuner.model.named_modules()
                       if isinstance(module, AdaLoraLayer) and self.adapter in module.lora_E}  # fmt: skip
        self.steps_done = 0
        tuner.__class__ = _Unregularised  # last: a model of another kind has raised AttributeError, and is unchanged

    def start(self, total_steps: int) -> None:
        """Begin a training of ``total_steps`` optimiser steps. Raises ValueError unless tinit + tfinal is less."""
        BudgetSchedule(total_steps, self.config.tinit, self.config.tfinal)  # peft checks only new configurations
        self.config.total_step, self.steps_done = total_steps, 0

    def penalty(self) -> Tensor:
        """orth_reg_weight × the mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all layers."""
        sides = ((layer.lora_A[self.adapter], layer.lora_B[self.adapter]) for layer in self.layers.values())
        grams = [gram for a, b in sides for gram in (a @ a.T, b.T @ b)]
        eyes = (torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams)
        norms = [torch.linalg.matrix_norm(gram - eye) for gram, eye in zip(grams, eyes, strict=True)]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def before_step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Raises ValueError as :func:`loralib.training.check_optimizers`."""
        check_optimizers(optimizers, self.tuner.model)

    def after_step(self) -> None:
        """Calls peft's allocator, as peft documents it."""
        self.steps_done += 1
        for layer in self.layers.values():
            for factor in (each[self.adapter] for each in (layer.lora_A, layer.lora_E, layer.lora_B)):
                if factor.grad is None:  # the step did not use this module
                    factor.grad = torch.zeros_like(factor)
        allocator = self.tuner.rankallocator
        if allocator.target_bgt < allocator.init_bgt:  # else peft raises (its issue 2337)
            self.tuner.update_and_allocate(self.steps_done)
        if self.steps_done < self.config.total_step - self.config.tfinal:  # the last masking is still to come
            # With a pattern, peft would save the factors without the singular values that the last mask pruned, though
            # the optimiser has moved them away from 0 since. A model with other ranks could not load such a file.
            self.config.rank_pattern = None

    @property
    def ranks(self) -> Ranks | None:
        """The singular values, with the budget of peft's schedule."""
        allocator = self.tuner.rankallocator
        if allocator.target_bgt >= allocator.init_bgt:
            return None
        values = {name: layer.lora_E[self.adapter] for name, layer in self.layers.items()}
        factors = {
            name: [(layer.lora_B[self.adapter], 1), (values[name], 0), (layer.lora_A[self.adapter], 0)]
            for name, layer in self.layers.items()
        }
        budget, _ = allocator.budget_schedule(self.steps_done)
        return Ranks(allocator.init_bgt, budget, allocator.target_bgt, values, factors)

    def state_dict(self) -> dict[str, Any]:
        """The moving averages of the scores, the ranks and the steps."""
        allocator = self.tuner.rankallocator
        scores = {key: dict(getattr(allocator, key)) for key in _SCORES}
        rank_pattern, total_steps = self.config.rank_pattern, self.config.total_step
        return {"step": self.steps_done, "total_steps": total_steps, "rank_pattern": rank_pattern, **scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a training of another length: peft would prune anew, and values come back."""
        if (saved := state["total_steps"]) != self.config.total_step:
            raise ValueError(f"the saved pruning has {saved} steps, but now there are {self.config.total_step}")
        devices = {name: p.device for name, p in self.tuner.model.named_parameters()}
        for key in _SCORES:
            setattr(self.tuner.rankallocator, key, {n: t.to(devices[n]) for n, t in state[key].items()})
        self.config.rank_pattern, self.steps_done = state["rank_pattern"], state["step"]
