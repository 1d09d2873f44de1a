"""One run, from its arguments to its record: data, model, training, evaluation, predictions and the adapter."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError
from sklearn.utils.class_weight import compute_class_weight
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, EvalPrediction, TrainingArguments, set_seed

from nlu.arguments import Arguments, fit_schedule
from nlu.data.batching import effective_batch_size, updates_per_epoch
from nlu.data.predictions import predict_sets, to_labels
from nlu.data.splits import (
    Splits,
    describe,
    description_lines,
    load_data,
    load_predict_task,
    needed,
    reorder_labels,
    save_splits,
    tokenize_splits,
)
from nlu.errors import UsageError, one_line, reason
from nlu.experiments.records import publish_run
from nlu.fast.sharding import shard, sharding_asked_for, without_accelerates_own
from nlu.methods.method import AppliedMethod
from nlu.methods.registry import apply_method
from nlu.metrics import compute_glue_metrics
from nlu.model import check_model_arguments, load_config, load_model, set_precision
from nlu.runs.adapter import (
    save_run_adapter,
    spectra,
    start_from_adapter,
    upload_adapter,
)
from nlu.runs.checkpoints import last_checkpoint, rotate
from nlu.runs.digests import content_digests
from nlu.runs.folder import RunFolder
from nlu.runs.log import ProgressLines, log_to, say
from nlu.runs.processes import first_computes, is_first, start_processes, wait_for_all
from nlu.runs.record import RunRecord, begin_record, say_outcome
from nlu.tasks import Task
from nlu.trainer import GlueTrainer
from nlu.trainer_arguments import trainer_arguments

logger = logging.getLogger("nlu")


def run(arguments: Arguments) -> None:
    """One run from data to records; nothing where the folder holds it, finished.

    Raises:
        UsageError: for whatever the arguments, the data, the model or the folder cannot do together.
        RunError: for a training that cannot go on. Interrupted: after a signal.
    """
    training = arguments.training
    start_processes(training.use_cpu)
    folder = RunFolder(
        Path(training.root_output_dir),
        arguments.record,
        first_computes(lambda: content_digests(arguments.record)),
        effective_batch_size(training),
        training.overwrite_output_dir,
    )
    with contextlib.ExitStack() as held:  # by the first process, for all
        state = first_computes(lambda: held.enter_context(folder.hold()))
        if state == "finished":
            if is_first():
                say(f"{folder.path} holds this run, finished: give --overwrite_output_dir to run it again")
        else:
            _run_in(folder, state, arguments, held)
        if arguments.record["push_to_hub"] and is_first():
            upload_adapter(training, folder.path)


def _run_in(folder: RunFolder, state: str, arguments: Arguments, held: contextlib.ExitStack) -> None:
    """The run in its folder, whose log is open from where nothing can be refused any more."""
    data, path = arguments.data, folder.path
    task, rows, skipped = load_data(data, needed(arguments.training), arguments.model.cache_dir)
    tests = load_predict_task(data, task, arguments.model.cache_dir)
    total_steps = plan_steps(arguments.training, rows)
    arguments = fit_schedule(arguments, total_steps)
    training = trainer_arguments(arguments, task.metric)
    config, tokenizer, head = load_config(arguments, task)
    if head.labels is not None:
        task, rows = reorder_labels(task, rows, head.labels)
        tests = [reorder_labels(*test, head.labels) for test in tests]
    check_model_arguments(arguments, config, tokenizer, total_steps)
    how = (tokenizer, data.max_seq_length, data.pad_to_max_length)
    splits = tokenize_splits(task, rows, *how)
    tests = [(test, tokenize_splits(test, of_test, *how).test) for test, of_test in tests]
    described = describe(task, rows, skipped, splits.cut)
    weights = class_weights(arguments, task, splits.train)

    set_seed(training.seed)
    sharded = sharding_asked_for()
    with without_accelerates_own():
        model = load_model(arguments, config, head)
        applied = apply_method(model, arguments.method, total_steps)
        warm_start = start_from_adapter(model, arguments) if arguments.model.lora_path else None
        set_precision(arguments, applied.model)
        if sharded:
            shard(model, training)
        trainer = build_trainer(arguments, training, task, applied, splits, tokenizer, weights)

    wait_for_all()  # every process has read what it needs of the folder
    if is_first():
        folder.clean(state)
        held.enter_context(log_to(path / "log" / "run.log"))
        for line in description_lines(task, described, data.max_seq_length):
            say(line)
        if data.save_splits:
            save_splits(data, rows)
    wait_for_all()
    facts = {
        "data": described,
        "train_examples": len(splits.train) if splits.train is not None else 0,
        "eval_examples": sum(map(len, splits.validation.values())),
        "warm_start": warm_start,
    }
    record = begin_record(arguments, trainer, facts, folder, state)
    checkpoint = last_checkpoint(path / "model") if state == "resume" and training.do_train else None
    with trainer.signals:
        run_recorded(arguments, [(task, splits.validation | splits.test), *tests], trainer, record, path, checkpoint)


def run_recorded(
    arguments: Arguments, sets: list, trainer: GlueTrainer, record: RunRecord, folder: Path, checkpoint: Path | None
) -> None:
    """Training, evaluation, prediction and the adapter; whatever ends it early is in the record."""
    try:
        train_and_evaluate(arguments, trainer, checkpoint)
        if arguments.training.do_predict:
            record.static["test_scores"], record.static["class_reports"] = predict_sets(sets, trainer, folder)
        record.log_history = trainer.state.log_history
        if is_first():
            record.static["spectra"] = spectra(trainer.model)
            if trainer.applied.ranks is not None:
                live = trainer.applied.ranks.rank_pattern
                record.static["module_ranks"] = {name: sum(flags) for name, flags in live.items()}
            running = record.write("running")
            tokenizer = trainer.processing_class
            save_run_adapter(arguments, trainer.task, trainer.applied, tokenizer, running, trainer.weights_step, folder)
            finished = record.write("finished")
            if arguments.training.save_strategy == "no":  # they served while the run was at work
                rotate(folder / "model", 0)
    except BaseException as error:
        record.error = one_line(error)
        with contextlib.suppress(OSError):  # a full disk: the record stays as it was
            if isinstance(error, KeyboardInterrupt):
                record.write("interrupted")
            else:
                _publish(arguments, folder, record.write("failed"))
        raise
    if is_first():
        say_outcome(finished, folder)
        _publish(arguments, folder, finished)


def _publish(arguments: Arguments, folder: Path, record: dict[str, Any]) -> None:
    """Add the run's line to the folder that --measured_dir names, from which tables are made."""
    measured = arguments.record.get("measured_dir")
    if measured and is_first():
        say(f"line:    {publish_run(folder, Path(measured), record)}")


def plan_steps(training: Any, splits: dict[str, Dataset]) -> int:
    """Optimiser steps of the whole training, as the Trainer will count them; 0 without training."""
    if not training.do_train:
        return 0
    per_epoch = updates_per_epoch(training, len(splits["train"]))
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)


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


def build_trainer(
    arguments: Arguments,
    training: TrainingArguments,
    task: Task,
    applied: AppliedMethod,
    splits: Splits,
    tokenizer: Any,
    class_weights: list[float] | None = None,
) -> GlueTrainer:
    """The Trainer with data, metrics and the folders of this run."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(training.output_dir).parent / "log")  # not that of an earlier run

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(prediction.predictions).all():
            return {}  # GlueTrainer.evaluation_loop ends the run then, and says why
        return compute_glue_metrics(task, to_labels(task, prediction.predictions), prediction.label_ids)

    validation = list(splits.validation.values()) or [None]
    bucketed = arguments.data.length_bucketing and splits.train is not None
    trainer = GlueTrainer(
        task,
        applied,
        class_weights=class_weights,
        train_lengths=splits.train["length"][:] if bucketed else None,
        head_learning_rate=arguments.training.head_learning_rate,
        second_eval_dataset=validation[1] if len(validation) > 1 else None,
        args=training,
        train_dataset=splits.train,
        eval_dataset=validation[0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
        compute_metrics=metrics,
        callbacks=[ProgressLines(task.metric)],
    )
    patience, threshold = arguments.training.early_stopping_patience, arguments.training.early_stopping_threshold
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience, threshold))
    return trainer


def train_and_evaluate(arguments: Arguments, trainer: GlueTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or without one from the start, and evaluate what training ended with."""
    if arguments.training.do_train:
        if checkpoint is not None and is_first():
            logger.warning("continuing from %s", checkpoint)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (UnpicklingError, SafetensorError) as error:  # only tensors and plain values are read from a checkpoint
            raise UsageError(f"the checkpoint {checkpoint} cannot be read ({reason(error, 100)}): delete it") from None
    if trainer.lacks_evaluation:
        trainer.evaluate()
