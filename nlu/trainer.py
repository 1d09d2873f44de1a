"""The Trainer with a method's regulariser, allocator and checkpoints in it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from loralib.files import new_folder_of, remove_leftovers, start_folder
from nlu.data.batching import LengthBucketSampler, SeededRandomSampler
from nlu.errors import RunError
from nlu.methods.method import AppliedMethod, head_parameters
from nlu.runs.checkpoints import last_whole_checkpoint, rotate, seal
from nlu.runs.record import one_line, peak_memory_bytes
from nlu.runs.signals import Interrupted, SignalWatch
from nlu.tasks import Task

EXTRA_STATE = "extra_state.pt"
_MOST_UNCHECKED = 1000  # losses that wait on the device, at most, to be looked at


class MethodCallback(TrainerCallback):
    """Drives the rank allocator and keeps the time.

    The allocator runs after the optimiser step and before the gradients are cleared, as in the published loop; the
    step counted from 1 is ``global_step + 1`` there.
    """

    def __init__(self, trainer: GlueTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_progress()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = False
        self.trainer.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_seconds += time.perf_counter() - self.trainer.step_started

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        allocator = self.trainer.applied.allocator
        if allocator is not None:
            self.trainer.budget, _ = allocator.update_and_mask(self.trainer.model, state.global_step + 1)


class GlueTrainer(Trainer):
    """transformers' Trainer for one task and one method.

    Args:
        task: says whether the loss is a squared error or a cross entropy.
        applied: the method, already applied to its model.
        train_lengths: tokens of each training example, for batches of similar length; None for a plain random order.
        second_eval_dataset: MNLI's mismatched set, evaluated with the prefix ``eval_mm``.
        kwargs: as for the Trainer.
    """

    def __init__(
        self,
        task: Task,
        applied: AppliedMethod,
        train_lengths: list[int] | None = None,
        second_eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self.task, self.applied = task, applied
        self.train_lengths = train_lengths
        self.second_eval_dataset = second_eval_dataset
        self.train_seconds = 0.0
        self.step_started = 0.0
        self.epoch_ended = False
        self.budget = applied.allocator.initial_total_rank if applied.allocator else None
        self.signals = SignalWatch()
        self._saved_step: int | None = None
        self._restored: dict[str, Any] = {}
        self._unchecked: list[tuple[int, str, Tensor]] = []
        super().__init__(model=applied.model, compute_loss_func=self._task_loss, **kwargs)
        self.add_callback(MethodCallback(self))
        for callback in applied.callbacks:
            self.add_callback(callback)

    # ---- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Summed over the rows and divided by those of the whole optimiser step, so that accumulation is exact."""
        logits = outputs["logits"].float()
        if self.task.is_regression:
            total = F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        else:
            smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.applied.regulariser is None or not model.training:
            return result
        return result + self.applied.regulariser() / self.current_gradient_accumulation_steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's, with a group of its own for what has a learning rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self.applied.own_rates()
        if self.args.head_learning_rate is not None:
            rates.append((list(head_parameters(self.model)), self.args.head_learning_rate / self.args.learning_rate))
        for parameters, ratio in rates:
            apart = {id(parameter) for parameter in parameters}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in apart]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in apart]
                    optimizer.add_param_group({**group, "params": own, "lr": ratio * group["lr"]})
        return optimizer

    # ---- data ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        self.train_sampler = self._make_sampler()
        return self.train_sampler

    def _make_sampler(self) -> SeededRandomSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.train_lengths is None:
            return SeededRandomSampler(len(self.train_dataset), seed)
        return LengthBucketSampler(self.train_lengths, effective_batch_size(self.args), seed)

    def rows_of_step(self, step: int) -> list[int]:
        """``idx`` of the training rows that all processes together see in that optimiser step, counted from 1."""
        epoch, position = divmod(step - 1, updates_per_epoch(self.args, len(self.train_dataset)))
        sampler, size = self._make_sampler(), effective_batch_size(self.args)
        sampler.set_epoch(epoch)
        return self.train_dataset[list(sampler)[position * size : (position + 1) * size]]["idx"]

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            RunError: for a loss, gradient or weight that is not finite, and for a checkpoint that cannot be written.
            Interrupted: after a signal, the state saved.
        """
        result = super().train(*args, **kwargs)
        self.check_finite(weights=True)
        return result

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step: the Trainer would do one more
            self.control.should_training_stop = True
            return
        # The Trainer's own call does not reach the sampler through the batches it skips in a resumed epoch.
        self.train_sampler.set_epoch(epoch)
        with self.signals.deferred():
            super()._run_epoch(epoch=epoch, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._unchecked.append((self.state.global_step + 1, "loss", loss))
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Once for the last step of an epoch: the epoch's end follows it and may ask for an evaluation.

        A checkpoint written before that evaluation would lose it: a run resumed there starts with the next epoch.
        """
        last_step = float(self.state.epoch).is_integer() or self.control.should_training_stop
        if not self.epoch_ended and last_step:
            return
        if grad_norm is not None and self.accelerator.scaler is None:  # float16 skips steps that overflow
            self._unchecked.append((self.state.global_step, "gradient", torch.as_tensor(grad_norm)))
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if due or self.checks_every_step or len(self._unchecked) > _MOST_UNCHECKED:
            self.check_finite()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        signum = self.signals.agreed()
        if signum is not None:
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            raise Interrupted(signum, f"stopped after step {self.state.global_step}, which is saved")

    @property
    def checks_every_step(self) -> bool:
        """Whether looking at a loss costs nothing; on a GPU it would make the CPU wait in every step."""
        return self.args.device.type == "cpu"

    def check_finite(self, weights: bool = False) -> None:
        """Look at the losses and gradients since the last check, and at the trained weights if asked for.

        Raises:
            RunError: names the first step with a value that is not finite, its rows and the last good checkpoint.
        """
        if self._unchecked:
            values = torch.stack([value.detach().float().reshape(()) for _, _, value in self._unchecked]).tolist()
            for (step, what, _), value in zip(self._unchecked, values, strict=True):
                if not math.isfinite(value):
                    self._diverged(step, f"the {what} is {value}")
            self._unchecked.clear()
        if weights:
            trained = [p.detach().isfinite().all() for p in self.model.parameters() if p.requires_grad]
            if not torch.stack(trained).all():
                self._diverged(self.state.global_step, "a trained weight is not finite")

    def _diverged(self, step: int, what: str) -> None:
        rows = self.rows_of_step(step)
        shown = ", ".join(map(str, rows[:32])) + (", …" if len(rows) > 32 else "")
        good = last_whole_checkpoint(Path(self.args.output_dir))
        raise RunError(
            f"{what} at step {step}, whose rows have the idx {shown}; last good checkpoint: {good or 'none'}. Lower "
            "--learning_rate, or look at these rows"
        )

    def _load_best_model(self) -> None:
        """The best weights, and the ranks that were live with them."""
        super()._load_best_model()
        state = torch.load(Path(self.state.best_model_checkpoint) / EXTRA_STATE, map_location="cpu", weights_only=True)
        self._load_stateful(state)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Only training drops an incomplete last batch: every row is evaluated and predicted."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        if is_training:
            self.args.dataloader_drop_last = drop
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and self.second_eval_dataset is not None:
            metrics |= super().evaluate(self.second_eval_dataset, ignore_keys, f"{metric_key_prefix}_mm")
        return metrics

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {"seconds": round(self.train_seconds, 3), "memory_bytes": peak_memory_bytes()}
            logs |= self.applied.statistics()
            if self.applied.ranks is not None:
                logs |= {"budget": self.budget, "live": self.applied.ranks.live_rank}
        super().log(logs, *args, **kwargs)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what trains: the frozen base is not written again. A parameter that layers share is stored once."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        if state_dict is not None:
            trained = {name: state_dict[name] for name in trained}
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Frozen weights are missing from a checkpoint by design; anything unknown in it is not."""
        if load_result.unexpected_keys:
            raise ValueError(f"the checkpoint holds parameters this model lacks: {load_result.unexpected_keys[:3]}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything a resumed run needs, written beside its final place and renamed into it when whole."""
        self.check_finite(weights=True)
        run_folder = Path(self._get_output_dir(trial=trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(run_folder, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                remove_leftovers(final)
            raise RunError(
                f"the checkpoint of step {self.state.global_step} cannot be written ({one_line(error)}); last good "
                f"checkpoint: {last_whole_checkpoint(run_folder) or 'none'}. Make room, and give the same command again"
            ) from error
        self._saved_step = self.state.global_step

    def _write_checkpoint(self, run_folder: Path, final: Path) -> None:
        temporary = new_folder_of(final)
        if self.args.should_save:
            start_folder(final)
        wait_for_all()
        self.store_flos()
        self.save_model(str(temporary), _internal_call=True)
        self._save_optimizer_and_scheduler(str(temporary))
        self._save_scaler(str(temporary))
        self._save_rng_state(str(temporary))
        unlogged_loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).cpu()  # one number a process
        if self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        wait_for_all()
        if self.args.should_save:
            torch.save(self._extra_state(unlogged_loss), temporary / EXTRA_STATE)
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(os.path.join(temporary, TRAINER_STATE_NAME))
            seal(final)
            best = self.state.best_model_checkpoint
            rotate(run_folder, self.args.save_total_limit, {final, Path(best or final)})
        wait_for_all()

    def _extra_state(self, unlogged_loss: Tensor) -> dict[str, Any]:
        return {
            "stateful": {name: part.state_dict() for name, part in self.applied.stateful.items()},
            "budget": self.budget,
            "train_seconds": self.train_seconds,
            # The Trainer keeps the loss since the last logging step outside its own saved state.
            "unlogged_loss": unlogged_loss,
            "logged_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._restored = torch.load(Path(checkpoint) / EXTRA_STATE, map_location="cpu", weights_only=True)
        self._load_stateful(self._restored)
        self.budget = self._restored["budget"]
        self.train_seconds = self._restored["train_seconds"]

    def _load_stateful(self, state: dict[str, Any]) -> None:
        for name, part in self.applied.stateful.items():
            part.load_state_dict(state["stateful"][name])

    @property
    def weights_step(self) -> int:
        """The optimiser step whose weights the model holds: the last one, or the best checkpoint's after training."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return self.state.global_step
        return int(Path(best).name.rpartition("-")[2])

    def restore_progress(self) -> None:
        """Take up the running loss where the checkpoint left it, and the best one; called when training begins."""
        if self._restored:
            losses = self._restored["unlogged_loss"]
            own = losses[self.args.process_index] if len(losses) == self.args.world_size else losses.mean()
            self._tr_loss += own.to(self._tr_loss.device)
            self._total_loss_scalar = self._restored["logged_loss"]
            self._globalstep_last_logged = self._restored["last_logged_step"]
            self.args.eval_on_start = False  # done, before the first step
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None  # the folder may have moved


def wait_for_all() -> None:
    """A barrier where there are several processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def end_processes() -> None:
    """Leave the process group together: one that ends while another still talks to it can abort that one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def effective_batch_size(args: Any) -> int:
    """Rows of one optimiser step, over all processes and accumulation steps."""
    return args.per_device_train_batch_size * max(1, args.n_gpu) * args.gradient_accumulation_steps * args.world_size


def updates_per_epoch(args: Any, rows: int) -> int:
    """Optimiser steps of one epoch over that many training rows, as the Trainer counts them."""
    batch = args.per_device_train_batch_size * max(1, args.n_gpu) * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
