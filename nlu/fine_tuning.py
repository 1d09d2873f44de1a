"""One run, from its arguments to its record: data, model, training, evaluation, predictions and the adapter."""

from __future__ import annotations

import contextlib
import logging
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import set_seed

from nlu.arguments import Arguments
from nlu.command_line import fit_schedule
from nlu.data.batching import planned_steps
from nlu.data.prediction_files import draw_confusion, write_predictions
from nlu.data.splits import Data
from nlu.data.tokens import description_lines, tokenize
from nlu.errors import UsageError, reason
from nlu.experiments.lines import publish_run
from nlu.methods.registry import METHODS, apply_without_weights
from nlu.metrics import class_report, compute_glue_metrics, constant_loss, to_labels
from nlu.model import limit_length, load_config, load_model, set_precision, without_weights
from nlu.runs.console import log_to, say, say_outcome, say_start
from nlu.runs.folder import RunFolder
from nlu.runs.identity import PLACES, changes, content_digests
from nlu.runs.machine import commit_of_code, instructions
from nlu.runs.processes import first_computes, gathered, is_first, wait_for_all
from nlu.runs.record import RunRecord
from nlu.runs.resume import last_checkpoint
from nlu.runs.saved_adapter import save_run_adapter, start_from_adapter
from nlu.tasks import TASKS, Task
from nlu.trackers import tracked
from nlu.trainer import GlueTrainer, trainer_arguments

logger = logging.getLogger("nlu")


def run(arguments: Arguments, data: Data) -> None:
    """Carry out one run on the data loaded for its arguments; a run that is finished already is not repeated.

    Raises:
        UsageError: if the arguments, the data, the model and the folder do not fit together.
        RunError: if the training cannot continue. Interrupted: after a signal.
    """
    commit_of_code()
    folder = RunFolder(arguments, common_digests(arguments))
    with contextlib.ExitStack() as held:  # the folder's lock: rank 0 holds it for all
        state, previous = first_computes(lambda: held.enter_context(folder.hold()))
        if state == "finished":
            say(f"this run has finished already, in {folder.path}: give --overwrite_output_dir to run it again")
            _publish(arguments, previous)
        else:
            _run_in(folder, previous, arguments, data, held)


def common_digests(arguments: Arguments) -> dict[str, str]:
    """The digests of the contents that the arguments name, which all processes must have in common.

    Raises:
        UsageError: if the processes differ in arguments or contents: each would train another run.
    """
    digests = content_digests(arguments.values)
    every = gathered({"arguments": arguments.values, "digests": digests})
    differ = set().union(*(changes(arguments, digests, other, PLACES) for other in every))
    if differ:
        raise UsageError(f"the processes of this run differ ({', '.join(sorted(differ)[:5])}): start all of them alike")
    return digests


def _run_in(
    folder: RunFolder, previous: dict[str, Any] | None, arguments: Arguments, data: Data, held: contextlib.ExitStack
) -> None:
    """Carry out the run in its folder, which is changed only once all arguments have been accepted."""
    if previous and previous["model_commit"]:  # a name on the hub may stand for other weights by now
        arguments = copy(arguments)
        arguments.model_revision = previous["model_commit"]
    trainer, facts = build_trainer(arguments, data)
    wait_for_all()  # until every process has read what it needs from the folder
    if is_first():
        if arguments.measured_dir:  # one that cannot be made shows now, not after the training
            Path(arguments.measured_dir).mkdir(parents=True, exist_ok=True)
        folder.clean(new=previous is None)
        held.enter_context(log_to(folder.path / "log" / "run.log", arguments.command))
    wait_for_all()
    for line in description_lines(trainer.task, facts["data"], trainer.processing_class.model_max_length):
        say(line)
    record = RunRecord(trainer, facts | {"digests": folder.digests}, previous)
    trainer.add_callback(record)
    record.write("running")
    wait_for_all()
    if len({*gathered(record.path.read_bytes() if record.path.exists() else b"")}) > 1:
        raise UsageError(f"{folder.path} is not one folder for all processes: name one that all machines share")
    say_start(record.fields, trainer)
    checkpoints, resumes = folder.path / "model", previous is not None and trainer.args.do_train
    # All processes resume from one step: on a network disk the others may not see the newest checkpoint yet.
    found = first_computes(lambda: last_checkpoint(checkpoints)) if resumes else None
    if found is None and resumes and record.after_finished:
        say("no checkpoint of the finished run is left to predict from (--save_strategy no): it is trained again")
    held.enter_context(tracked(trainer))
    run_recorded(trainer, record, found and str(checkpoints / Path(found).name))


def build_trainer(arguments: Arguments, data: Data) -> tuple[GlueTrainer, dict[str, Any]]:
    """Load the model and apply the method; cheap checks come first. Nothing is written to the run's folder.

    Returns:
        The trainer, and what the record says of its data, of the loss of a constant answer, and of a warm start.
    """
    total_steps = planned_steps(arguments, len(data.rows.get("train", ())))
    arguments = fit_schedule(arguments, total_steps)
    task, training = data.task, trainer_arguments(arguments, data.task.metric)
    if arguments.bf16 and training.use_cpu and instructions() in ("avx2", "avx512f"):
        logger.warning("this processor has no instructions for bfloat16: without --bf16 a step is 3 to 18 times faster")
    config, tokenizer, head = load_config(arguments, task)
    blank = without_weights(arguments, config)
    limit_length(tokenizer, arguments.max_seq_length, blank)
    apply_without_weights(blank, arguments, total_steps)
    splits, counts = tokenize(data, tokenizer)
    labels = np.array(splits["train"]["labels"][:]) if "train" in splits else None
    weights = class_weights(arguments, task, labels)

    set_seed(training.seed)
    model = load_model(arguments, config, head)
    low_rank = METHODS[arguments.method].apply(model, arguments, total_steps)
    warm_start = start_from_adapter(model, arguments) if arguments.lora_path else None
    set_precision(arguments, model)
    trainer = GlueTrainer(arguments, training, task, model, low_rank, splits, tokenizer, weights)
    if training.do_train:  # a missing package or a wrong argument of theirs shows before an older run is deleted
        try:
            trainer.create_optimizer_and_scheduler(total_steps)
        except (ImportError, TypeError, ValueError) as error:
            names = f"--optim {training.optim.value}, --lr_scheduler_type {training.lr_scheduler_type.value}"
            raise UsageError(f"{names}: {reason(error, 200)}") from None
        trainer.optimizer = trainer.lr_scheduler = None
    if training.process_index > 0:  # until here all processes drew the same numbers; now each has its own dropout masks
        torch.manual_seed(training.seed + training.process_index)
    constant = None if labels is None else constant_loss(task, labels, weights)
    return trainer, {"data": counts, "warm_start": warm_start, "constant_loss": constant}


def run_recorded(trainer: GlueTrainer, record: RunRecord, checkpoint: str | None) -> None:
    """Train, evaluate, predict and save the adapter; an error that ends the run early goes into the record."""
    arguments = trainer.arguments
    try:
        train_and_evaluate(trainer, checkpoint)
        trained = record.write("running")
        if is_first():
            save_run_adapter(trainer, trained)
        if arguments.do_predict:
            record.fields["test_scores"], record.fields["class_reports"] = predict_splits(trainer)
        finished = record.write("finished")
        if is_first() and arguments.save_strategy == "no":  # checkpoints served only to resume
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk: the record stays as it was
            if isinstance(error, KeyboardInterrupt):
                record.write("interrupted", error)
            elif not record.after_finished:
                _publish(arguments, record.write("failed", error))
        raise
    say_outcome(finished)
    _publish(arguments, finished)


def _publish(arguments: Arguments, record: dict[str, Any]) -> None:
    """Add the run's line to the folder that --measured_dir names, from which tables are made."""
    if arguments.measured_dir and is_first():
        path = publish_run(Path(arguments.root_output_dir), Path(arguments.measured_dir), record)
        say(f"line:    {path}")


def class_weights(arguments: Arguments, task: Task, labels: np.ndarray | None) -> list[float] | None:
    """The weight n / (classes · rows of the class) of each class in the training loss; None if all count equally.

    Raises:
        UsageError: in regression, or if a class has no training row.
    """
    if arguments.class_weights is None or labels is None:
        return None
    if task.is_regression:
        raise UsageError(f"--class_weights is for classes, but the labels of {task.name} are numbers: leave it out")
    from sklearn.utils.class_weight import compute_class_weight  # takes half a second

    try:
        return compute_class_weight(arguments.class_weights, classes=np.arange(task.num_labels), y=labels).tolist()
    except ValueError as error:
        raise UsageError(f"--class_weights: not every class has a training row ({reason(error)})") from None


def train_and_evaluate(trainer: GlueTrainer, checkpoint: str | None) -> None:
    """Train from the checkpoint, or from scratch without one, and evaluate the final weights if not yet done."""
    if trainer.args.do_train:
        try:
            if checkpoint is not None:
                logger.warning("continuing from %s", checkpoint)
                # What is missing the Trainer starts anew, without a word.
                for name in ("optimizer*", "scheduler.pt", "rng_state*"):
                    if not any(Path(checkpoint).glob(name)):
                        raise FileNotFoundError(f"it has no {name}")
            trainer.train(resume_from_checkpoint=checkpoint)
        except (UnpicklingError, SafetensorError, FileNotFoundError) as error:  # damaged, or from an older version
            raise UsageError(f"the checkpoint {checkpoint} cannot be read ({reason(error, 100)}): delete it") from None
    scored = [entry["step"] for entry in trainer.state.log_history if f"eval_{trainer.task.metric}" in entry]
    if trainer.args.do_eval and trainer.weights_step not in scored:
        trainer.evaluate()


def predict_splits(trainer: GlueTrainer) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """Predict the validation and test splits, and write the predictions into ``predictions/``.

    Returns:
        File stem -> metrics of each test set, and file stem -> :func:`~nlu.metrics.class_report` of each set with
        classes. Both cover only sets whose labels are known (validation sets, MRPC's test set, a user's own). Each
        report's confusion matrix is drawn beside the predictions.
    """
    task, folder = trainer.task, Path(trainer.arguments.root_output_dir) / "predictions"
    scores, reports = {}, {}
    for split, rows in trainer.splits.items():
        if split == "train":
            continue
        known = "labels" in rows.column_names  # tokenize leaves hidden labels out
        output = trainer.predict(rows.remove_columns("labels") if known else rows)
        if not trainer.args.should_save:
            continue
        labels, truth = to_labels(task, output.predictions), rows["labels"][:] if known else None
        path = write_predictions(task, split, rows["idx"][:], labels, folder, truth)
        if known and split in task.test_splits:
            metrics = TASKS.get(split.removeprefix("test_"), task).metrics  # AX has its own
            scores[path.stem] = compute_glue_metrics(replace(task, metrics=metrics), labels, truth)
        if known and not task.is_regression:
            reports[path.stem] = class_report(task, labels, truth)
            draw_confusion(reports[path.stem], path.with_suffix(".png"))
    return scores, reports
