"""Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method.

    python nlu/run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name cola --method lora2 \\
        --do_train --do_eval --root_output_dir output/cola

``--help_all`` lists every argument. The run writes results.json, adapter/, model/ and log/ (and, where it prunes,
rank_pattern.json) to root_output_dir; the same command continues an interrupted run from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import packages_missing

if packages_missing():
    sys.exit(2)

import numpy as np
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, EvalPrediction, set_seed

from nlu.argument_checks import check_an_evaluation, fit_schedule
from nlu.arguments import Arguments, parse_arguments
from nlu.data.batching import updates_per_epoch
from nlu.data.glue import reorder_labels
from nlu.data.splits import Splits, load_data, load_predict_task, tokenize_splits, tokenize_tests
from nlu.data.submission import predict, to_labels
from nlu.errors import UsageError, exit_code, one_line
from nlu.fast.sharding import shard, sharding_asked_for, without_accelerates_own
from nlu.json_yaml import read_json
from nlu.methods.method import AppliedMethod
from nlu.methods.registry import apply_method
from nlu.metrics import compute_glue_metrics
from nlu.model import check_model_arguments, load_config, load_model, set_precision
from nlu.runs.adapter import (
    check_upload,
    load_warm_start,
    read_warm_start,
    save_run_adapter,
    spectra,
    upload_adapter,
)
from nlu.runs.checkpoints import check_best, last_whole_checkpoint, remove_checkpoints
from nlu.runs.folder import RunFolder, shared_digests, shared_state
from nlu.runs.log import Bars, ConsoleLog, TrainingLines
from nlu.runs.processes import end_processes, wait_for_all
from nlu.runs.record import RunRecord, report, start_record
from nlu.runs.signals import SignalWatch
from nlu.tasks import Task
from nlu.trainer import GlueTrainer

logger = logging.getLogger("nlu")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code, with one line on stderr unless it is 0.

    2: bad arguments or input; 1: a run that cannot go on; 128 + the signal's number: stopped, to be gone on with.
    """
    with ConsoleLog() as log, SignalWatch():
        try:
            return run(parse_arguments(sys.argv[1:] if argv is None else argv), log)
        except BaseException as error:
            return exit_code(error)


def run(arguments: Arguments, log: ConsoleLog) -> int:
    """One run from data to records."""
    training = arguments.training
    folder = Path(training.root_output_dir)
    run_folder = RunFolder(folder, arguments.record, shared_digests(arguments.record), training.overwrite_output_dir)
    state = shared_state(run_folder)
    if state == "finished":
        print(f"{folder} holds this run, finished: give --overwrite_output_dir to run it again")
        if training.push_to_hub and training.should_save:
            check_upload(arguments)
            upload_adapter(training, folder)
        return 0

    check_upload(arguments)
    task, splits = load_data(arguments)
    others = load_predict_task(arguments, task)
    total_steps = plan_steps(arguments, splits)
    config, tokenizer, head = load_config(arguments, task, labels_of_run(folder, task) if state == "resume" else None)
    if head.labels is not None:
        task, splits = reorder_labels(task, splits, head.labels)
    warm_start = read_warm_start(arguments.model.lora_path) if arguments.model.lora_path else None
    check_model_arguments(arguments, config, tokenizer, total_steps, warm_start)
    splits = tokenize_splits(arguments, task, splits, tokenizer)
    tests = [(task, splits.test), *tokenize_tests(arguments, others, task.labels, tokenizer)]

    weights = class_weights(arguments, task, splits.train)

    wait_for_all()  # every process has read the folder
    held = run_folder.hold(state, log)
    with held if training.should_save else contextlib.nullcontext():
        wait_for_all()  # it is ready
        if not training.should_save:
            log.join(folder / "log" / "run.log")
        set_seed(training.seed)
        sharded = sharding_asked_for()
        with without_accelerates_own():
            model = load_model(arguments, config, head)
            applied = apply_method(model, arguments.method, total_steps)
            if warm_start is not None:
                load_warm_start(*warm_start, model, arguments)
            set_precision(arguments, applied)
            if sharded:
                shard(model, training)
            trainer = build_trainer(arguments, task, applied, splits, tokenizer, weights)
        eval_rows = sum(map(len, splits.validation.values()))
        bars = not training.disable_tqdm and sys.stderr is not None and sys.stderr.isatty()
        trainer.show_progress(TrainingLines(task.metric, log), *([Bars()] if bars else []))
        checkpoint = last_whole_checkpoint(folder / "model") if state == "resume" and training.do_train else None
        if checkpoint is not None and training.load_best_model_at_end:
            check_best(checkpoint)
        record = start_record(arguments, trainer, eval_rows, run_folder, state, warm_start)
        with trainer.signals:
            run_recorded(arguments, tests, trainer, record, folder, checkpoint)
        if arguments.record["push_to_hub"] and training.should_save:
            upload_adapter(training, folder)
    return 0


def run_recorded(
    arguments: Arguments, tests: list, trainer: GlueTrainer, record: RunRecord, folder: Path, checkpoint: Path | None
) -> None:
    """Training, evaluation, prediction and the adapter; whatever ends it early is in the record."""
    save = arguments.training.should_save
    try:
        train_and_evaluate(arguments, trainer, checkpoint)
        if arguments.training.do_predict:
            record.static["test_scores"] = predict(tests, trainer, folder)
        record.log_history = trainer.state.log_history
        if save:
            record.static["spectra"] = spectra(trainer.model)
            if trainer.applied.ranks is not None:
                live = trainer.applied.ranks.rank_pattern
                record.static["module_ranks"] = {name: sum(flags) for name, flags in live.items()}
            running = record.write("running")
            tokenizer = trainer.processing_class
            save_run_adapter(arguments, trainer.task, trainer.applied, tokenizer, running, trainer.weights_step, folder)
            report(record.write("finished"), folder)
            if arguments.training.save_strategy == "no":
                remove_checkpoints(folder / "model")
    except BaseException as error:
        record.error = one_line(error)
        if save:
            with contextlib.suppress(OSError):  # a full disk: the record stays as it was
                record.write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise


def labels_of_run(folder: Path, task: Task) -> list[str] | None:
    """The order of the labels with which the interrupted run in the folder was started."""
    return (read_json(folder / "results.json") or {}).get("labels", task.labels)


def plan_steps(arguments: Arguments, splits: dict[str, Dataset]) -> int:
    """Optimiser steps of the whole training, as the Trainer will count them; 0 without training. Fits the schedule."""
    training = arguments.training
    if not training.do_train:
        return 0
    steps, per_epoch = training.max_steps, updates_per_epoch(training, len(splits["train"]))
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * per_epoch)
    check_an_evaluation(training, steps, per_epoch)
    fit_schedule(training, arguments.method, steps)
    return steps


def class_weights(arguments: Arguments, task: Task, train: Dataset | None) -> list[float] | None:
    """The weight n / (classes · rows of the class) of each class in the training loss; None where all count alike.

    Raises:
        UsageError: for weights of classes, or smoothed labels, where the labels are numbers; for a class without a row.
    """
    asked, smoothing = arguments.data.class_weights, arguments.training.label_smoothing_factor
    for flag, value in (("class_weights", asked), ("label_smoothing_factor", smoothing)):
        if value and task.is_regression:
            raise UsageError(f"--{flag} is for classes, and the labels of {task.name} are numbers: leave it out")
    if asked is None or train is None:
        return None
    labels, classes = np.asarray(train["labels"][:]), np.arange(task.num_labels)
    if missing := sorted(set(classes.tolist()) - set(labels.tolist())):
        raise UsageError(f"--class_weights balanced: no training row has class {task.labels[missing[0]]!r}")
    return compute_class_weight("balanced", classes=classes, y=labels).tolist()


# ---- training ------------------------------------------------------------------------------------------------------


def build_trainer(
    arguments: Arguments,
    task: Task,
    applied: AppliedMethod,
    splits: Splits,
    tokenizer: Any,
    class_weights: list[float] | None = None,
) -> GlueTrainer:
    """The Trainer with data, metrics and the folders of this run."""
    training, data = arguments.training, arguments.data
    training.output_dir = str(Path(training.root_output_dir) / "model")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(training.root_output_dir) / "log")  # not that of an earlier run
    training.label_names = ["labels"]
    training.push_to_hub = False  # the Trainer would upload checkpoints; the run uploads its adapter
    training.metric_for_best_model, training.greater_is_better = f"eval_{task.metric}", True

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(prediction.predictions).all():
            return {}  # GlueTrainer.evaluation_loop ends the run then, and says why
        return compute_glue_metrics(task, to_labels(task, prediction.predictions), prediction.label_ids)

    validation = list(splits.validation.values()) or [None]
    bucketed = data.length_bucketing and splits.train is not None
    trainer = GlueTrainer(
        task,
        applied,
        class_weights=class_weights,
        train_lengths=splits.train["length"][:] if bucketed else None,
        second_eval_dataset=validation[1] if len(validation) > 1 else None,
        args=training,
        train_dataset=splits.train,
        eval_dataset=validation[0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
        compute_metrics=metrics,
    )
    if training.early_stopping_patience is not None:
        threshold = training.early_stopping_threshold or 0.0
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience, threshold))
    return trainer


def train_and_evaluate(arguments: Arguments, trainer: GlueTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or without one from the start, and evaluate what training ended with."""
    training = arguments.training
    if training.do_train:
        if checkpoint is not None and training.process_index == 0:
            logger.warning("continuing from %s", checkpoint)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except UnpicklingError:  # only tensors and plain values are read, nothing that could run
            raise UsageError(f"the checkpoint {checkpoint} was not made here (it holds objects): delete it") from None
    if trainer.lacks_evaluation:
        trainer.evaluate()


if __name__ == "__main__":
    code = main()
    if code == 0:  # after an error the others may never come
        end_processes()
    sys.exit(code)
