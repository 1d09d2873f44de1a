"""transformers' Trainer with a method's training hooks, losses that count each row once, and atomic checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)  # fmt: skip
from transformers.trainer_utils import EvalLoopOutput

from loralib.recipes.trainer_mixin import LowRankTrainerMixin
from loralib.training import Training
from nlu.arguments import Arguments
from nlu.data.batching import LengthBucketSampler, SeededRandomSampler, effective_batch_size
from nlu.errors import RunError, UsageError, reason
from nlu.methods.method import head_parameters
from nlu.methods.registry import METHODS, update_numbers
from nlu.metrics import compute_glue_metrics, to_labels
from nlu.runs.console import ProgressLines
from nlu.runs.machine import peak_memory_bytes
from nlu.runs.progress import Progress
from nlu.runs.resume import WholeCheckpoints, last_checkpoint
from nlu.runs.signals import Interrupted, StopRequest
from nlu.tasks import Task

_IGNORED = -100  # the label that torch's cross entropy ignores


def _logits_alone(outputs: Tensor | tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """Keep only the logits, so that a model's further outputs are not gathered."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


class GlueTrainer(WholeCheckpoints, LowRankTrainerMixin, Trainer):
    """transformers' Trainer for one task and one method.

    Args:
        arguments: the run's. training: transformers' arguments, made from them.
        task: decides whether the loss is a squared error or a cross entropy.
        model: the method is applied to it already. low_rank: what the method does beside the optimiser.
        splits: the tokens of each split.
        class_weights: weight of each class in the training loss, with a mean of 1 over the rows; None for equal ones.
    """

    def __init__(
        self,
        arguments: Arguments,
        training: TrainingArguments,
        task: Task,
        model: nn.Module,
        low_rank: Training,
        splits: dict[str, Dataset],
        tokenizer: Any,
        class_weights: list[float] | None = None,
    ) -> None:
        self.arguments, self.task, self.splits = arguments, task, splits
        self.validation = [splits[split] for split in task.validation_splits if split in splits]
        self.progress = Progress(self)
        self.stop_request = StopRequest()
        callbacks: list[TrainerCallback] = [ProgressLines(task.metric)]
        if arguments.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
        # The Trainer makes this folder at once; the first checkpoint makes model/, when all arguments are checked.
        checkpoints, training.output_dir = training.output_dir, arguments.root_output_dir
        super().__init__(
            model=model,
            low_rank=low_rank,
            args=training,
            train_dataset=splits.get("train"),
            eval_dataset=self.validation[0] if self.validation else None,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_loss_func=self.task_loss,
            compute_metrics=self.task_metrics,
            preprocess_logits_for_metrics=_logits_alone,
            callbacks=callbacks,
        )
        self.args.output_dir = checkpoints
        device = self.args.device
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=device)
        self.remove_callback(PrinterCallback)  # the run prints lines of its own
        self.add_callback(self.progress)

    # ---- metrics and loss ---------------------------------------------------------------------------------------

    def task_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return compute_glue_metrics(self.task, to_labels(self.task, prediction.predictions), prediction.label_ids)

    def task_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss summed over the rows, divided by the rows of the whole optimiser step.

        Args:
            outputs: with ``logits``, (rows, labels). labels: (rows,); rows labelled -100 (regression: NaN) are ignored.
            num_items_in_batch: rows over all processes and accumulated batches; None for the rows given.
        """
        logits = outputs["logits"].float()
        if self.task.is_regression:
            logits = logits.squeeze(-1)
            labels = torch.where(labels.isnan(), logits.detach(), labels.float())
            total = F.mse_loss(logits, labels, reduction="sum")
        else:
            weights = self.class_weights if self.model.training else None
            total = F.cross_entropy(logits, labels, weights, reduction="sum", ignore_index=_IGNORED)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; the step's loss, a sum over the batches it accumulates, stays on the device."""
        loss = super().training_step(*args, **kwargs)
        self.progress.step_losses[self.state.global_step] += loss
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, int | None]:
        """The batches of one optimiser step, and how many rows it has over all processes.

        accelerate repeats rows if those of an epoch's last batch do not fill the batches of all processes; the loss
        ignores the repeated rows.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        batch_size = self.args.train_batch_size  # of one process
        whole = batch_size * self.args.world_size
        rows = len(batches) * whole
        left = len(self.train_sampler) % whole
        if batches and left and self.accelerator.gradient_state.end_of_dataloader:
            rows += left - whole
            repeated = batches[-1]["labels"][max(0, left - batch_size * self.args.process_index) :]
            repeated.fill_(math.nan if self.task.is_regression else _IGNORED)
        return batches, rows

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *, metric_key_prefix: str, **kwargs: Any
    ) -> EvalLoopOutput:
        """As the Trainer's, but the loss counts each row once: the Trainer's own mean includes repeated rows.

        Raises:
            RunError: if a logit is not finite: rows of NaN would all be predicted as class 0.
        """
        output = super().evaluation_loop(dataloader, description, metric_key_prefix=metric_key_prefix, **kwargs)
        logits = torch.from_numpy(output.predictions)
        if not logits.isfinite().all():
            raise RunError(
                f"the model gives NaN or infinity in the {description.lower()}: check the weights of the base, and "
                "the number format (--bf16 overflows less than --fp16)"
            )
        if output.label_ids is not None:
            loss = self.task_loss({"logits": logits}, torch.from_numpy(np.asarray(output.label_ids)))
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's, with a further group for parameters that have their own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = METHODS[self.arguments.method].own_rates(self.model, self.arguments)
        if self.arguments.head_learning_rate is not None:
            ratio = self.arguments.head_learning_rate / self.args.learning_rate
            rates.append((head_parameters(self.model), ratio))
        for parameters, ratio in rates:
            apart = set(map(id, parameters))
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in apart]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in apart]
                    optimizer.add_param_group({**group, "params": moved, "lr": ratio * group["lr"]})
        return optimizer

    # ---- data ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        """Overridden because the Trainer takes no sampler, and its own order depends on the number of processes."""
        if self.arguments.length_bucketing:
            lengths = self.train_dataset["length"][:]
            self.train_sampler = LengthBucketSampler(lengths, effective_batch_size(self.args), self.args.seed)
        else:
            self.train_sampler = SeededRandomSampler(len(self.train_dataset), self.args.seed)
        return self.train_sampler

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            RunError: if the loss or a trained weight is not finite, or a checkpoint cannot be written.
            Interrupted: after a signal, when the state is saved.
        """
        with self.stop_request.awaited():
            result = super().train(resume_from_checkpoint, **kwargs)
            self.progress.gather_losses()
            if not self.args.load_best_model_at_end:  # the model holds the best step's weights then
                self._save_checkpoint(self.model, None)  # a run that stops while it predicts need not train again
            signum = self.stop_request.agreed()  # it came after the last step
            if signum is not None:
                raise Interrupted(signum, f"stopped after step {self.state.global_step}")
        return result

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """Works around two Trainer resume bugs that callbacks can't fix.

        If the last step is done or early stopping has ended the training, a resumed Trainer would train one step more.
        It also does not set the sampler's epoch when it skips the batches of a resumed epoch.
        """
        if self.control.should_training_stop:
            return
        self.train_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Overridden to save after an epoch's evaluation, and to stop for a signal once the step is logged.

        The Trainer calls this after the last step of an epoch and again at the epoch's end, which may ask for an
        evaluation. A checkpoint written in between would lose that evaluation: a run resumed there starts with the
        next epoch. So the first of the two calls is skipped.
        """
        last_step = float(self.state.epoch).is_integer() or self.control.should_training_stop
        if not self.progress.epoch_ended and last_step:
            return
        self.control.should_log |= self.control.should_training_stop  # the record then has the loss of every step
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.check_finite(tr_loss)  # waits for the GPU
            self.progress.stop_clock()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        signum = self.stop_request.agreed()
        if signum is not None:
            self._save_checkpoint(model, trial)
            raise Interrupted(signum, f"stopped after step {self.state.global_step}, which is saved")

    def check_finite(self, loss: Tensor | float = 0.0) -> None:
        """Check a loss and the trained weights; not in every step, but before logging, evaluating or saving.

        Raises:
            RunError: if a value is not finite; the message names the last good checkpoint.
        """
        trained = [p.detach().isfinite().all() for p in self.model.parameters() if p.requires_grad]
        if math.isfinite(loss) and torch.stack(trained).all():
            return
        good = last_checkpoint(Path(self.args.output_dir))
        raise RunError(
            f"the loss or a trained weight is not finite at step {self.state.global_step}; last good checkpoint: "
            f"{good or 'none'}. Lower --learning_rate"
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None and len(self.validation) > 1:  # MNLI's mismatched set
            # Not with evaluate(), after which early stopping would look for its metric.
            second = self.predict(self.validation[1], ignore_keys, f"{metric_key_prefix}_mismatched").metrics
            self.log(second)
            metrics |= second
        return metrics

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {"seconds": round(self.progress.seconds, 3), "memory_bytes": peak_memory_bytes()}
            logs |= update_numbers(self.model)
            if (ranks := self.low_rank.ranks) is not None:
                logs |= {"budget": ranks.budget, "live": ranks.live}
        super().log(logs, *args, **kwargs)

    @property
    def weights_step(self) -> int:
        """The optimiser step whose weights the model holds: the last one, or the best checkpoint's after training."""
        loads_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if loads_best else self.state.global_step


def trainer_arguments(arguments: Arguments, metric: str) -> TrainingArguments:
    """transformers' arguments for a run; the defaults and help of the flags are in ``nlu/arguments.py``.

    Args:
        metric: the task's main metric, by which the best checkpoint is chosen.

    Raises:
        UsageError: for float16 without a GPU, and for arguments that transformers refuses.
    """
    if arguments.fp16 and not torch.accelerator.is_available():
        raise UsageError("--fp16 needs a GPU: give --bf16")
    given = vars(arguments)
    values = {field.name: given[field.name] for field in fields(TrainingArguments) if field.name in given}
    values |= {
        "output_dir": str(Path(arguments.root_output_dir) / "model"),
        # The Trainer refuses bfloat16 on a machine without an accelerator unless it is told to use the CPU.
        "use_cpu": arguments.use_cpu or not torch.accelerator.is_available(),
        # Without autocast if only the method's own layers and the head are trained, so that no step casts a weight.
        "bf16": arguments.bf16 and METHODS[arguments.method].needs_autocast,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run
        "metric_for_best_model": f"eval_{metric}",
        "greater_is_better": True,
        "disable_tqdm": True,  # the run prints lines of its own
        "ddp_find_unused_parameters": False,  # every step uses all
    }
    if not values["gradient_checkpointing"]:  # newer transformers renamed it, and warn even if it is given as False
        del values["gradient_checkpointing"]
    try:
        training = TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise UsageError(reason(error, 400)) from None
    if training.n_gpu > 1:  # DataParallel over all visible GPUs would multiply the batch unasked
        training._n_gpu = 1
    if not training.fp16 and not training.bf16:  # transformers also reads it from accelerate's environment
        training.mixed_precision = "no"
    return training
