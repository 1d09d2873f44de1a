"""What a run resumes from: whole checkpoints alone, and the progress that the Trainer forgets.

The files of a checkpoint are those of :mod:`loralib.recipes.trainer_mixin` (``trained.safetensors``, ``low_rank.pt``)
and of the Trainer. Here the losses and the training time are added to ``trainer_state.json``.
The Trainer writes ``model/checkpoint-STEP`` in ``model/.unfinished/``; it moves to its place when it is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from nlu.errors import RunError, one_line
from nlu.runs.processes import first_computes, wait_for_all

UNFINISHED = ".unfinished"
_PROGRESS = "Progress"  # in trainer_state.json, beside the states of the Trainer's own callbacks


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder; None if it has none or does not exist."""
    return get_last_checkpoint(folder) if folder.is_dir() else None


class WholeCheckpoints:
    """The first base class of GlueTrainer: it writes each checkpoint completely or not at all."""

    clock: Any  # the trainer's StepClock
    step_losses: Any  # of this process, on the device

    def _get_output_dir(self, trial: Any) -> str:
        """Overridden so that the Trainer writes checkpoints in a folder apart from the complete ones."""
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overridden to save the running loss and the time too, and to move a complete checkpoint to its place.

        Raises:
            RunError: if a trained weight is not finite, or a file cannot be written.
        """
        folder, state = Path(self.args.output_dir), self.state
        final, best = (folder / f"checkpoint-{step}" for step in (state.global_step, state.best_global_step))
        if first_computes(final.exists):  # saved already; on a network disk the others may not see it yet
            return
        unfinished = folder / UNFINISHED / final.name
        self.check_finite()
        progress = {
            "train_seconds": self.clock.seconds,
            "step_losses": self.gather_losses(),
            "unlogged_loss": self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist(),  # one per process
            "logged_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }
        state.stateful_callbacks[_PROGRESS] = {"args": {}, "attributes": progress}
        best_before = state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            state.best_model_checkpoint = str(best) if best == final or best.is_dir() else best_before
            wait_for_all()
            if self.args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))  # now with the final path of the best one
                os.rename(unfinished, final)
                unfinished.parent.rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            # torch's exception does not say that a disk is full.
            raise RunError(
                f"the checkpoint of step {state.global_step} cannot be written ({one_line(error)}); last good "
                f"checkpoint: {last_checkpoint(folder) or 'none'}. If the disk is full, make room; if another process "
                "ended first, see its message. Then give the same command again"
            ) from error
        wait_for_all()
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, state.best_model_checkpoint)

    def restore_progress(self) -> None:
        """Restore what a resumed Trainer does not: running loss, training time, early stopping and the best path."""
        progress = self.state.stateful_callbacks[_PROGRESS]["attributes"]
        steps = self.state.global_step
        if len(progress.get("step_losses", ())) != steps:
            raise FileNotFoundError("it lacks the losses of its steps")  # an older version
        self.step_losses[:steps] = torch.tensor(progress["step_losses"])
        losses = progress["unlogged_loss"]
        same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
        self.clock.before = progress["train_seconds"]
        self._total_loss_scalar = progress["logged_loss"]
        self._globalstep_last_logged = progress["last_logged_step"]
        control = self.state.stateful_callbacks["TrainerControl"]["args"]
        self.control.should_training_stop = control["should_training_stop"]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks[type(callback).__name__]["attributes"]
                callback.early_stopping_patience_counter = saved["early_stopping_patience_counter"]
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # the run's folder may have moved
            self.state.best_model_checkpoint = str(best)
