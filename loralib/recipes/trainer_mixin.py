"""A mix-in for transformers' Trainer: the regulariser, the allocator, and checkpoints of the trainable parameters.

    class MyTrainer(LowRankTrainerMixin, Trainer): ...
    trainer = MyTrainer(model=model, low_rank=LowRankTraining(model, target_rank=4), args=args, train_dataset=rows)

Beside the Trainer's own files, a checkpoint contains those of :mod:`loralib.recipes.checkpoint`. Resuming and
``load_best_model_at_end`` read these, so that the names under which transformers saves a model do not matter.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from loralib.model import unwrapped
from loralib.recipes.checkpoint import load_model, load_training, save_checkpoint
from loralib.training import Training, unscale


class LowRankTrainerMixin(Trainer):
    """Goes before transformers' Trainer (or a subclass) in the bases of a class.

    It adds the regulariser's gradient, calls the allocator after every optimiser step, and saves its state
    in the checkpoints, so that ``resume_from_checkpoint`` continues exactly where the training stopped.

    Evaluating and saving do not change the weights: between two maskings they are evaluated and saved as they are. The
    last of ``total_steps`` masks, so that the final ranks are the target; after early stopping, or with the best
    checkpoint loaded, they may be higher. ``save_model()`` writes what a checkpoint holds of the model;
    :func:`loralib.save_adapter` writes an adapter.

    Args:
        low_rank: a :class:`loralib.LowRankTraining`, or another :class:`loralib.training.Training`, made for the same
            model; it is started with the Trainer's number of steps.
        args, kwargs: the Trainer's.
    """

    def __init__(self, *args: Any, low_rank: Training, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.low_rank = low_rank
        # Weak references make no cycle, so that a deleted trainer frees its memory at once.
        self.add_callback(_Loop(weakref.proxy(self)))
        # The outermost method is wrapped, so that a subclass with its own loss or step keeps the penalty.
        outermost: Any = type(self)
        self.training_step = partial(_with_penalty, weakref.ref(self), outermost.training_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Overridden to write the trained tensors once, under the model's own names, and the state of ``low_rank``; and
        the adapter of a PeftModel."""
        folder, model = Path(output_dir or self.args.output_dir), unwrapped(self.model)
        peft = sys.modules.get("peft")  # imported already if the model is a PeftModel
        if peft is not None and isinstance(model, peft.PeftModel):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_checkpoint(model, self.low_rank, folder)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Overridden to read what :meth:`_save` writes."""
        load_model(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Overridden to read what :meth:`_save` writes, and the state of these weights (peft's AdaLoRA saves by it)."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        load_training(self.low_rank, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overridden to load the state of ``low_rank`` too: callbacks are not told which checkpoint is loaded."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.low_rank.start(self.state.max_steps)
            load_training(self.low_rank, checkpoint)


def _with_penalty(reference: Callable[[], Any], training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The trainer's step on a batch; the last one before an optimiser step adds the gradient of the penalty.

    The loss does not contain the penalty: neither accumulated batches nor several processes can count it twice, and the
    logged losses of all methods can be compared.
    """
    trainer = reference()
    loss = training_step(trainer, *args, **kwargs)
    penalty = trainer.low_rank.penalty() if trainer.accelerator.sync_gradients else 0.0
    if getattr(penalty, "requires_grad", False):  # 0.0 without a regulariser
        scaler = trainer.accelerator.scaler
        penalty = penalty if scaler is None else scaler.scale(penalty)
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return loss


class _Loop(TrainerCallback):
    """A callback of its own, because a subclass may be one too."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a resumed training was started when its state was loaded
            self.trainer.low_rank.start(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unscale(self.trainer.optimizer)
        self.trainer.low_rank.before_step(self.trainer.optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.low_rank.after_step()
