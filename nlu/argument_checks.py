"""Checks of the command line, made before data or model are touched, and the values that follow from it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from nlu.errors import UsageError
from nlu.methods.registry import FLAGS, check_arguments, flag_methods
from nlu.tasks import get_task


def check_method_flags(given: set[str], of_file: set[str], config: str, method: str) -> None:
    """Refuse flags that the method would ignore.

    Args:
        given: the arguments that the command line sets. of_file: those of the method's file.
        config, method: the method's file and its base method.

    Raises:
        UsageError: one line.
    """
    for name in sorted(given):
        readers = flag_methods(name)
        if readers and method not in readers:
            raise UsageError(
                f"--{name} has no meaning with --method {method} (only with {', '.join(readers)}): leave it out"
            )
        if name in of_file and name in FLAGS and FLAGS[name].fixed:
            raise UsageError(f"--method {config} has a {name} of its own: give --method {method} with --{name}")


def check_values(model: Any, data: Any, method: Any, training: Any, given: set[str]) -> None:
    """Refuse missing arguments and contradictions, and fill in what follows from others.

    Args:
        model, data, method, training: the parts of the run's arguments. given: what the command line sets.

    Raises:
        UsageError: one line.
    """
    if training.root_output_dir is None and method.published is None:
        raise UsageError("--root_output_dir is missing: name the folder that the run writes to")
    training.do_eval = training.do_eval or training.eval_strategy != "no"
    if training.eval_steps is None and training.eval_strategy == "steps":
        training.eval_steps = training.logging_steps
    _check_task(data, training)
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.bf16 and training.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    if training.report_to != "none" and find_spec(training.report_to) is None:
        raise UsageError(f"--report_to {training.report_to} needs a package: pip install {training.report_to}")
    if training.push_to_hub != (training.hub_model_id is not None):
        raise UsageError("--push_to_hub and --hub_model_id OWNER/NAME belong together: give both or neither")
    _check_evaluations(training)
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
        for name, default in (("text_columns", None), ("label_column", "label"), ("metric", None)):
            if getattr(data, name) != default:
                raise UsageError(f"--{name} is for your own files: leave it out, or give --train_file")
    elif training.do_eval and data.validation_file is None and data.holdout_fraction is None:
        raise UsageError(
            "nothing to evaluate on: give --validation_file or --holdout_fraction, or leave --do_eval "
            "and --eval_strategy out"
        )
    elif training.do_predict and data.test_file is None and not training.do_eval:
        raise UsageError("nothing to predict: give --test_file, or leave --do_predict out")


def _check_evaluations(training: Any) -> None:
    """What acts on evaluations needs some, and the best checkpoint one of each."""
    evaluates = training.do_train and training.eval_strategy != "no"
    for flag, on in (
        ("load_best_model_at_end", training.load_best_model_at_end),
        ("save_strategy best", training.save_strategy == "best"),
        ("early_stopping_patience", training.early_stopping_patience is not None),
    ):
        if on and not evaluates:
            raise UsageError(f"--{flag} needs evaluations: give --do_train and --eval_strategy steps")
    rhythms = ("strategy", "steps") if training.eval_strategy == "steps" else ("strategy",)
    unlike = [n for n in rhythms if getattr(training, f"save_{n}") != getattr(training, f"eval_{n}")]
    if training.load_best_model_at_end and training.save_strategy != "best" and unlike:
        raise UsageError(
            f"--load_best_model_at_end needs a checkpoint of every evaluation: give --save_{unlike[0]} and "
            f"--eval_{unlike[0]} one value"
        )
    if training.early_stopping_patience and training.logging_strategy == "epoch" != training.eval_strategy:
        raise UsageError(
            "--logging_strategy epoch with --early_stopping_patience would lose an entry where a run that stopped "
            "within an epoch is continued: give --logging_strategy steps, or --eval_strategy epoch"
        )


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
