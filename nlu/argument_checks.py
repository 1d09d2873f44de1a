"""Checks of the command line, made before data or model are touched, and the values that follow from it."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from nlu.errors import UsageError
from nlu.methods.registry import FLAGS, check_arguments, flag_methods
from nlu.tasks import get_task

logger = logging.getLogger("nlu")

# Flags of the Trainer that a run would ignore or that would break it, each with what to do.
REFUSED_FLAGS = {
    "label_names": "the label's name is fixed",
    "resume_from_checkpoint": "the same command continues from the run's last checkpoint",
    "metric_for_best_model": "the best checkpoint is the one where the task's main metric is highest",
    "greater_is_better": "the best checkpoint is the one where the task's main metric is highest",
    "train_sampling_strategy": "the order is random; --length_bucketing batches similar lengths together",
    "auto_find_batch_size": "it would change the effective batch; set --per_device_train_batch_size",
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "prediction_loss_only": "every evaluation computes the task's metrics",
    "batch_eval_metrics": "the metrics are computed over the whole set",
    "eval_do_concat_batches": "the metrics are computed over the whole set",
    "accelerator_config": "it could change the batch and the order of the rows",
    "save_only_model": "a checkpoint holds what a stopped run needs to continue",
    "use_liger_kernel": "nlu/fast/ has the code that makes a step faster",
    "eval_use_gather_object": "predictions are gathered as tensors",
    "optim_target_modules": "the method says what trains",
    "bf16_full_eval": "it would round what trains; evaluations compute in bfloat16 with --bf16",
    "fp16_full_eval": "it would round what trains; evaluations compute in float16 with --fp16",
    "ignore_data_skip": "a continued run always goes on with the next rows",
    "skip_memory_metrics": "results.json has the peak memory; the Trainer's own count makes a step many times slower",
    "deepspeed": "set ACCELERATE=configs/accelerate/fsdp.yaml to share the frozen weights among processes",
    "debug": "a loss, gradient or weight that is not finite always stops the run",
}

_TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of its package too
_SEEDS = 2**32  # numpy's global generator takes no larger ones
# name → (lowest, first number above that is too large); None for the argument's value means that it is not set.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed", "holdout_seed"), (0, _SEEDS)),
    **dict.fromkeys(
        ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples",
         "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "eval_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor", "total_batch_size",
         "schedule_steps", "early_stopping_patience"),
        (1, 2**31),
    ),
    **dict.fromkeys(
        ("early_stopping_threshold", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps",
         "dataloader_num_workers", "eval_delay", "neftune_noise_alpha"),
        (0, math.inf),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "cls_dropout"), (0, 1)),
}  # fmt: skip
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules whose next rate depends on the last evaluation
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")  # schedules that read no --lr_scheduler_kwargs
_WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")  # optimisers that read no --optim_args
_POSITIVE = ("learning_rate", "head_learning_rate", "logging_steps", "eval_steps", "save_steps")


def check_given(named: set[str], replaced: set[str], config: str, method: str) -> None:
    """Refuse flags that this pipeline does not support or that the method would ignore.

    Args:
        named: all arguments that flags set. replaced: those in the method's file that the command line sets again.
        config, method: the method's file and its base method.

    Raises:
        UsageError: one line.
    """
    for name in sorted(named):
        if name in REFUSED_FLAGS:
            raise UsageError(f"--{name} is not supported here ({REFUSED_FLAGS[name]}): leave it out")
        readers = flag_methods(name)
        if readers and method not in readers:
            raise UsageError(
                f"--{name} has no meaning with --method {method} (only with {', '.join(readers)}): leave it out"
            )
        if name in replaced and name in FLAGS and FLAGS[name].fixed:
            raise UsageError(f"--method {config} has a {name} of its own: give --method {method} with --{name}")


def check_values(model: Any, data: Any, method: Any, training: Any, given: set[str]) -> None:
    """Refuse missing arguments, values out of range and contradictions.

    Args:
        model, data, method, training: the parts of the run's arguments. given: what the command line sets.

    Raises:
        UsageError: one line.
    """
    if training.root_output_dir is None:
        raise UsageError("--root_output_dir is missing: name the folder that the run writes to")
    _check_task(data, training)
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.load_best_model_at_end and not training.do_train:
        raise UsageError("--load_best_model_at_end has no meaning without --do_train: leave it out")
    _check_reporting(training)
    _check_what_needs_evaluations(training, given)
    _check_schedule(training)
    _check_checkpointing(training, given)
    if training.optim_args and training.optim in _WITHOUT_ARGS:
        raise UsageError(f"--optim_args has no meaning with --optim {training.optim.value}: leave it out")
    if training.torch_compile and training.torch_compile_backend not in torch.compiler.list_backends(None):
        usual = ", ".join(torch.compiler.list_backends())
        raise UsageError(f"--torch_compile_backend {training.torch_compile_backend} is unknown; usual ones: {usual}")
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        raise UsageError("--dataloader_persistent_workers needs --dataloader_num_workers: give both or neither")
    if training.fsdp:
        raise UsageError("--fsdp would also split what trains: set ACCELERATE=configs/accelerate/fsdp.yaml instead")
    _check_data(data)
    _check_ranges(vars(model) | vars(data) | vars(training))
    if data.holdout_fraction is not None and not 0 < data.holdout_fraction < 1:
        raise UsageError(f"--holdout_fraction must lie between 0 and 1, got {data.holdout_fraction}")
    check_arguments(method, given)


def _check_task(data: Any, training: Any) -> None:
    """The task, or the files of one's own, and what is asked of them; the task's name gets its usual form."""
    if data.task_name is None and data.train_file is None:
        raise UsageError("no data: give --task_name, or --train_file, whose labels say what the task is")
    if data.predict_task is not None and not training.do_predict:
        raise UsageError("--predict_task needs --do_predict: give both or neither")
    if data.task_name is not None:
        task = get_task(data.task_name)
        data.task_name = task.name
        if not task.train_splits and (training.do_train or training.do_eval or data.holdout_fraction is not None):
            raise UsageError(f"{task.name} has a test set only: give --task_name mnli --predict_task {task.name}")
        if data.train_file or data.validation_file or data.test_file:
            raise UsageError("--task_name and --train_file/--validation_file/--test_file exclude each other")
    elif training.do_eval and data.validation_file is None and data.holdout_fraction is None:
        raise UsageError(
            "nothing to evaluate on: give --validation_file or --holdout_fraction, or leave --do_eval "
            "and --eval_strategy out"
        )
    elif training.do_predict and data.test_file is None and not training.do_eval:
        raise UsageError("nothing to predict: give --test_file, or leave --do_predict out")


def _check_schedule(training: Any) -> None:
    """The number of steps and the learning rates over them."""
    if training.max_steps == 0 or (training.max_steps < 0 and not 0 < training.num_train_epochs < float("inf")):
        raise UsageError("there is no step to train: --max_steps or --num_train_epochs must be positive and finite")
    if training.lr_scheduler_type in _BY_METRIC:
        raise UsageError("--lr_scheduler_type must plan the whole training: choose one that does not watch a metric")
    if training.lr_scheduler_kwargs and training.lr_scheduler_type in _WITHOUT_KWARGS:
        raise UsageError(
            f"--lr_scheduler_kwargs has no meaning with --lr_scheduler_type {training.lr_scheduler_type.value}: leave "
            "it out"
        )
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        logger.warning("--lr_scheduler_type constant ignores the warm-up: constant_with_warmup has one")


def _check_reporting(training: Any) -> None:
    """Trackers that are there, and a name for what is uploaded."""
    absent = sorted({*training.report_to} - {*get_available_reporting_integrations()})
    if absent and absent[0] in _TRACKERS:
        raise UsageError(f"--report_to {absent[0]} needs the package {absent[0]}: pip install {absent[0]}")
    if absent:
        raise UsageError(f"--report_to {absent[0]}: unknown, or not installed here: install it, or leave it out")
    if training.push_to_hub and training.hub_model_id is None:
        raise UsageError("--push_to_hub needs --hub_model_id OWNER/NAME: where the adapter goes")
    if training.hub_model_id is not None and not training.push_to_hub:
        raise UsageError("--hub_model_id has no meaning without --push_to_hub: give both or neither")


def _check_what_needs_evaluations(training: Any, given: set[str]) -> None:
    evaluates = training.do_train and training.do_eval and training.eval_strategy != "no"
    if training.save_strategy == "best" and not evaluates:
        raise UsageError("--save_strategy best needs evaluations: give --do_eval and --eval_strategy steps")
    if training.load_best_model_at_end and not evaluates:
        raise UsageError("--load_best_model_at_end needs evaluations: give --do_eval and --eval_strategy steps")
    if training.early_stopping_patience is None:
        if "early_stopping_threshold" in given:
            raise UsageError("--early_stopping_threshold has no meaning without --early_stopping_patience")
    elif not evaluates:
        raise UsageError("--early_stopping_patience needs evaluations: give --do_eval and --eval_strategy steps")
    elif training.logging_strategy == "epoch" and training.eval_strategy != "epoch":
        raise UsageError(
            "--logging_strategy epoch with --early_stopping_patience would lose an entry where a run that stopped "
            "within an epoch is continued: give --logging_strategy steps, or --eval_strategy epoch"
        )
    if training.load_best_model_at_end:
        if training.save_strategy == "steps" and training.save_steps != training.eval_steps:
            raise UsageError(
                "--load_best_model_at_end needs a checkpoint of every evaluation: give --save_steps and --eval_steps "
                f"one value, not {training.save_steps:g} and {training.eval_steps:g}"
            )
        if training.eval_on_start:
            raise UsageError(
                "--load_best_model_at_end cannot keep the start, which has no checkpoint: leave --eval_on_start out"
            )


def _check_checkpointing(training: Any, given: set[str]) -> None:
    """The keywords of transformers' and torch's checkpointing, whose own check comes in the first step."""
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state", "every_n_layers", "offload"}
    known -= {"function", "args", "kwargs", "context_fn"}
    for flag in given & {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}:
        unknown = sorted({*(getattr(training, flag) or ())} - known)
        if unknown:
            raise UsageError(f"--{flag} has no {unknown[0]!r}; it takes {', '.join(sorted(known))}")


def _check_ranges(values: dict[str, Any]) -> None:
    """Check every argument that has a range.

    Args:
        values: arguments by name; those that are None, and names without a range, are passed over.

    Raises:
        UsageError: for a number out of its range, NaN and infinity included.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _RANGES:
            low, high = _RANGES[name]
            if not low <= value < high:
                limit = "and finite" if high == math.inf else f"and below {high}"
                raise UsageError(f"--{name} must be at least {low} {limit}, got {value}")
        elif name in _POSITIVE and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be positive and finite, got {value}")


def one_device(training: TrainingArguments) -> None:
    """A process trains on one device: DataParallel over all that it sees would multiply the batch unasked."""
    if training.n_gpu > 1:
        logger.warning("%d devices are visible, one is used: nlu/launch.py starts more processes", training.n_gpu)
        training._n_gpu = 1


def share_batch(training: Any, named: set[str]) -> None:
    """Share ``--total_batch_size`` out: rows a process takes at once, and steps that it accumulates.

    Args:
        training: ``world_size`` is the number of processes; set in place. named: the arguments that are given:
            ``per_device_train_batch_size`` is an upper bound where it is.

    Raises:
        UsageError: for a batch that the processes, or the rows at once, do not divide.
    """
    total, processes = training.total_batch_size, training.world_size
    if total is None:
        return
    if "gradient_accumulation_steps" in named:
        raise UsageError(
            "--gradient_accumulation_steps follows from --total_batch_size: leave it out, or bound the rows at once "
            "with --per_device_train_batch_size"
        )
    if total % processes:
        raise UsageError(
            f"--total_batch_size {total} does not divide among {processes} processes: start one of "
            f"{_divisors(total)} processes"
        )
    share = total // processes
    at_once = min(share, training.per_device_train_batch_size) if "per_device_train_batch_size" in named else share
    if share % at_once:
        raise UsageError(
            f"--per_device_train_batch_size {at_once} does not divide the {share} rows of a process: give one of "
            f"{_divisors(share)}"
        )
    training.per_device_train_batch_size, training.gradient_accumulation_steps = at_once, share // at_once


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def fit_schedule(training: Any, method: Any, total_steps: int) -> None:
    """Shrink the warm-ups and the masking interval, in place, for a training shorter than ``--schedule_steps``.

    Args:
        training, method: parts of the run's arguments. total_steps: optimiser steps of this training.

    Each number n of steps becomes ⌊n · total_steps / schedule_steps⌋, the masking interval at least 1. A warm-up given
    as a share of the training stays, and so does a number that is not set.
    """
    made_for = training.schedule_steps
    if made_for is None or not 0 < total_steps < made_for:
        return
    if training.process_index == 0:
        logger.warning(
            "the training has %d steps, its schedule was made for %d: warm-ups and masking interval shrink in "
            "proportion", total_steps, made_for,
        )  # fmt: skip
    if training.warmup_steps >= 1:
        training.warmup_steps = int(training.warmup_steps) * total_steps // made_for
    for name, least in (("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1)):
        steps = getattr(method, name)
        if steps is not None:
            setattr(method, name, max(least, steps * total_steps // made_for))


def check_an_evaluation(training: Any, total_steps: int, steps_per_epoch: int) -> None:
    """Refuse a training that acts on its evaluations and is over before the first one; one at its end there always is.

    Raises:
        UsageError: one line.
    """
    acting = (training.load_best_model_at_end, training.save_strategy == "best", training.early_stopping_patience)
    by_epoch = training.eval_strategy == "epoch"
    end = total_steps / steps_per_epoch if by_epoch else total_steps
    if any(acting) and training.eval_delay > end:
        where = f"{end:g} {'epochs' if by_epoch else 'steps'}"
        raise UsageError(f"--eval_delay {training.eval_delay:g} is beyond the end of training ({where}): lower it")


def _check_data(data: Any) -> None:
    """The flags for a user's own files."""
    for name, default in (("text_columns", None), ("label_column", "label"), ("on_error", "stop"), ("metric", None)):
        if data.task_name is not None and getattr(data, name) != default:
            raise UsageError(f"--{name} is for your own files: leave it out, or give --train_file, not --task_name")
