"""The losses and the time of a training's steps, which go into its checkpoints and its record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback


class Progress(TrainerCallback):
    """Measures the time of the steps, keeps their losses, notes the end of an epoch, and restores all that the Trainer
    forgets when a training is resumed.

    The clock runs on between steps, because a GPU ends a step while the next batch is fetched. To log, evaluate or
    save, the trainer waits for the GPU and stops the clock; the next step starts it again.

    Attributes:
        step_losses: (steps,), of this process, on the device; 0 for the steps that are still to do.
        mean_losses: of the steps so far, over all processes, when they last met.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.step_losses = torch.zeros(0)
        self.mean_losses: list[float] = []
        self.epoch_ended = False
        self._before, self._since = 0.0, None

    # ---- losses ------------------------------------------------------------------------------------------------------

    def gather_losses(self) -> list[float]:
        """The loss of each step so far, the mean over the processes, which all must call this. Waits for the GPU."""
        done = self.step_losses[None, : self.trainer.state.global_step]
        self.mean_losses = self.trainer.accelerator.gather(done).mean(0).tolist()
        return self.mean_losses

    def training_losses(self) -> list[float] | None:
        """The mean loss in each twentieth of the steps, whatever is logged; the last two are the last tenth."""
        parts = np.array_split(self.mean_losses, min(20, len(self.mean_losses)) or 1)
        return [float(f"{part.mean():.6g}") for part in parts] if self.mean_losses else None

    # ---- the clock ---------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Time of all steps, including those before a resume."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop_clock(self) -> None:
        self._before, self._since = self.seconds, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = False
        if self._since is None:
            self._since = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ended = True

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def attributes(self) -> dict[str, Any]:
        """What ``trainer_state.json`` holds of this, beside the states of the Trainer's own callbacks."""
        trainer = self.trainer
        return {
            "train_seconds": self.seconds,
            "step_losses": self.gather_losses(),
            "unlogged_loss": trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).tolist(),  # one a process
            "logged_loss": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_losses = torch.zeros(state.max_steps, device=args.device)
        if state.global_step:
            self._restore(state, control)

    def _restore(self, state: Any, control: Any) -> None:
        """Restore the losses, the time, early stopping and the path of the best checkpoint.

        Raises:
            FileNotFoundError: if the checkpoint is of an older version.
        """
        trainer, saved = self.trainer, state.stateful_callbacks
        own = saved[type(self).__name__]["attributes"]
        if len(own.get("step_losses", ())) != state.global_step:
            raise FileNotFoundError("it lacks the losses of its steps")
        self.step_losses[: state.global_step] = torch.tensor(own["step_losses"])
        losses = own["unlogged_loss"]
        same = len(losses) == trainer.args.world_size
        trainer._tr_loss += losses[trainer.args.process_index] if same else sum(losses) / len(losses)
        trainer._total_loss_scalar = own["logged_loss"]
        trainer._globalstep_last_logged = own["last_logged_step"]
        self._before = own["train_seconds"]
        control.should_training_stop = saved["TrainerControl"]["args"]["should_training_stop"]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                count = saved[type(callback).__name__]["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = count
        best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the run's folder may have moved
            state.best_model_checkpoint = str(best)
