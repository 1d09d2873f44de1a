"""Checks for contradictory arguments, and values that follow from other arguments, before data or model are read.

``nlu/arguments.py`` has the range of each single argument.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from nlu.errors import UsageError
from nlu.methods.registry import METHODS, flag_methods
from nlu.trackers import check_tracker

_OF_OWN_FILES = ("train_file", "validation_file", "test_file", "text_columns", "label_column", "metric")


def check_and_complete(args: Any, given: Collection[str], chosen: Collection[str]) -> None:
    """Reject arguments that contradict each other, and fill in the values that follow from others.

    Args:
        args: the run's ``Arguments``; changed in place.
        given: names of the flags in the command. chosen: the same, and those set by the method's file or --published.

    Raises:
        UsageError: one line that says what to change.
    """
    if args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing: give the encoder's folder, or its name on the hub")
    _check_method(args, given)
    args.glue_dir = args.glue_dir or os.environ.get("GLUE_DIR")
    if "eval_steps" in given and "eval_strategy" not in chosen:
        args.eval_strategy = "steps"
    args.do_eval = args.do_eval or args.eval_strategy != "no"
    args.do_predict = args.do_predict or args.predict_task is not None
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    if args.do_train and args.learning_rate is None:
        raise UsageError(
            f"no learning rate is known for {args.method_config}: give --learning_rate, or tune it (compare.py --tune)"
        )
    _check_data(args, given)
    if args.bf16 and args.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    check_tracker(args.report_to)
    for name in ("FSDP", "DEEPSPEED"):  # `accelerate launch` sets these variables
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UsageError(f"{name} (accelerate's configuration) leaves no whole factors to prune: use torchrun")
    _plan_evaluations(args)
    _share_batch(args, chosen)


def _check_method(args: Any, given: Collection[str]) -> None:
    for name in sorted(given):
        readers = flag_methods(name)
        if readers and args.method not in readers:
            raise UsageError(
                f"--{name} has no meaning with --method {args.method} (only with {', '.join(readers)}): leave it out"
            )
    if "peft_config" in given and args.method_config != "peft":
        raise UsageError(
            f"--method {args.method_config} has a peft_config of its own: give --method peft with --peft_config"
        )
    METHODS[args.method].check(args, given)


def _check_data(args: Any, given: Collection[str]) -> None:
    """Refuse a run without training data or rows to evaluate on, and flags that do not go with its data."""
    if args.predict_task is not None and args.task_name != "mnli":
        raise UsageError(f"--predict_task {args.predict_task} goes with --task_name mnli, whose classes it has")
    if args.task_name is None:
        if args.train_file is None:
            raise UsageError("no data: give --task_name, or --train_file, whose labels decide what the task is")
        if args.do_eval and args.validation_file is None and args.holdout_fraction is None:
            raise UsageError(
                "nothing to evaluate on: give --validation_file or --holdout_fraction, or leave --do_eval and "
                "--eval_strategy out"
            )
        return
    for name in _OF_OWN_FILES:
        if name in given:
            raise UsageError(f"--{name} is for your own files: leave out either it or --task_name")


def _plan_evaluations(args: Any) -> None:
    """Set when to evaluate during training, and which evaluations save a checkpoint."""
    if args.eval_steps is None and args.eval_strategy == "steps":
        args.eval_steps = args.logging_steps
    if args.eval_strategy == "no" and (args.load_best_model_at_end or args.early_stopping_patience is not None):
        raise UsageError(
            "--load_best_model_at_end and --early_stopping_patience need evaluations: give --eval_strategy steps"
        )
    if args.load_best_model_at_end:
        args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps or args.save_steps


def _share_batch(args: Any, chosen: Collection[str]) -> None:
    """Split ``--total_batch_size`` into the batch size of a process and the number of batches that it accumulates.

    The batch size is the largest divisor of a process's share that ``--per_device_train_batch_size`` allows.

    Raises:
        UsageError: if the rows cannot be divided evenly, or ``--gradient_accumulation_steps`` is set too.
    """
    total, processes = args.total_batch_size, args.world_size
    if total is None:
        return
    if "gradient_accumulation_steps" in chosen:
        raise UsageError(
            "--gradient_accumulation_steps follows from --total_batch_size: leave it out, or limit the rows "
            "that a process takes at once with --per_device_train_batch_size"
        )
    if total % processes:
        raise UsageError(f"--total_batch_size {total} does not divide among {processes} processes")
    share = total // processes
    most = args.per_device_train_batch_size if "per_device_train_batch_size" in chosen else share
    at_once = next(rows for rows in range(min(share, most), 0, -1) if share % rows == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = at_once, share // at_once
