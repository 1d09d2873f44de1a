"""Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method.

    python nlu/run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name cola --method lora2 \\
        --do_train --do_eval --root_output_dir output/cola

``--help`` explains every argument. The run leaves results.json, rank_pattern.json, adapter/, model/ and log/ in
root_output_dir; given again, an interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

import loralib
from nlu.arguments import Arguments, parse_arguments
from nlu.data.glue import limit, load_task_data
from nlu.data.own import load_own_files
from nlu.data.predictions import load_predict_task, predict, to_labels
from nlu.data.tokens import longest_input, tokenize
from nlu.errors import RunError, UsageError, exit_code, reason
from nlu.fast.speed import speed_up
from nlu.methods.method import AppliedMethod, head_parameters
from nlu.methods.registry import apply_method, check_method_fits
from nlu.metrics import compute_glue_metrics
from nlu.ranges import check_optimisation
from nlu.runs.adapter import (
    check_warm_start,
    importance_scores,
    load_warm_start,
    read_warm_start,
    save_run_adapter,
    spectra,
)
from nlu.runs.checkpoints import last_whole_checkpoint
from nlu.runs.folder import check_run_folder, hold_run_folder
from nlu.runs.record import (
    RunRecord,
    one_line,
)
from nlu.runs.start import report, start_record
from nlu.tasks import Task, get_task
from nlu.trainer import GlueTrainer, end_processes, updates_per_epoch, wait_for_all

logger = logging.getLogger("nlu")


@dataclass
class Splits:
    """Token ids of one task: training rows, validation sets (MNLI has two), test sets by name."""

    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code, with one line on stderr unless it is 0.

    2: bad arguments or input; 1: a run that cannot go on; 128 + the signal's number: stopped, to be gone on with.
    """
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        return run(arguments)
    except (UsageError, RunError, OSError, KeyboardInterrupt) as error:
        return exit_code(error)


def run(arguments: Arguments) -> int:
    """One run from data to records."""
    training = arguments.training
    folder = Path(training.root_output_dir)
    state = check_run_folder(folder, arguments.record, training.overwrite_output_dir)
    if state == "finished":
        print(f"{folder} holds this run, finished: give --overwrite_output_dir to run it again")
        return 0

    task, splits = load_data(arguments)
    total_steps = plan_steps(arguments, splits)
    config, tokenizer = load_config(arguments, task)
    warm_start = read_warm_start(arguments.model.lora_path) if arguments.model.lora_path else None
    check_model_arguments(arguments, config, tokenizer, total_steps, warm_start)
    splits = tokenize_splits(arguments, task, splits, tokenizer)
    tests = [(task, splits.test), *load_predict_task(arguments, task, tokenizer)]

    wait_for_all()  # every process has read the folder
    held = hold_run_folder(folder, state, arguments.record, training.overwrite_output_dir)
    with held if training.should_save else contextlib.nullcontext():
        wait_for_all()  # it is ready
        set_seed(training.seed)
        model = load_model(arguments, config)
        applied = apply_method(model, arguments.method, total_steps)
        if warm_start is not None:
            load_warm_start(*warm_start, model)
        set_precision(arguments, applied)
        trainer = build_trainer(arguments, task, applied, splits, tokenizer)
        eval_rows = sum(map(len, splits.validation.values()))
        record = start_record(arguments, trainer, eval_rows, folder, state, warm_start)
        with trainer.signals:
            run_recorded(arguments, tests, trainer, record, folder, state)
    return 0


def run_recorded(
    arguments: Arguments, tests: list, trainer: GlueTrainer, record: RunRecord, folder: Path, state: str
) -> None:
    """Training, evaluation, prediction and the adapter; whatever ends it early is in the record."""
    save = arguments.training.should_save
    try:
        train_and_evaluate(arguments, trainer, folder, state)
        if arguments.training.do_predict:
            predict(arguments, tests, trainer, folder)
        record.log_history = trainer.state.log_history
        if save:
            record.static["spectra"] = spectra(trainer.model)
            record.static["importance_scores"] = importance_scores(trainer.applied.allocator)
            running = record.write("running")
            save_run_adapter(arguments, trainer.task, trainer.applied, running, trainer.weights_step, folder)
            report(record.write("finished"))
    except BaseException as error:
        record.error = one_line(error)
        if save:
            with contextlib.suppress(OSError):  # a full disk: the record stays as it was
                record.write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise


# ---- data ----------------------------------------------------------------------------------------------------------


def load_data(arguments: Arguments) -> tuple[Task, dict[str, Dataset]]:
    """The task and its rows as text, cut to the asked-for numbers; a held-out part in place of validation if asked."""
    data, training = arguments.data, arguments.training
    need = [name for name, wanted in (("train", training.do_train), ("validation", training.do_eval),
                                      ("test", training.do_predict)) if wanted]  # fmt: skip
    if data.task_name is None:
        task, splits = load_own_files(data.train_file, data.validation_file, data.test_file)
    else:
        task = get_task(data.task_name)
        if data.holdout_fraction is not None:
            need = ["train", *(name for name in need if name == "test")]
        splits = load_task_data(task, data.glue_dir or os.environ.get("GLUE_DIR"), arguments.model.cache_dir, need)
    if data.holdout_fraction is not None:
        rows = len(splits["train"])
        if math.ceil(rows * data.holdout_fraction) >= rows:
            raise UsageError(f"--holdout_fraction {data.holdout_fraction} of {rows} rows leaves none to train on")
        parts = splits["train"].train_test_split(data.holdout_fraction, seed=data.holdout_seed)
        splits |= {"train": parts["train"], task.validation_splits[0]: parts["test"]}
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    return task, {name: limit(rows, limits[name.split("_")[0]]) for name, rows in splits.items()}


def plan_steps(arguments: Arguments, splits: dict[str, Dataset]) -> int:
    """Optimiser steps of the whole training, as the Trainer will count them; 0 without training."""
    training = arguments.training
    if not training.do_train:
        return 0
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * updates_per_epoch(training, len(splits["train"])))


def tokenize_splits(arguments: Arguments, task: Task, splits: dict[str, Dataset], tokenizer: Any) -> Splits:
    """Token ids; what is only read, not trained on, is sorted by length, so that its batches need little padding."""
    data = arguments.data
    tokens = tokenize(splits, task, tokenizer, data.max_seq_length, data.pad_to_max_length)
    by_length = {
        n: rows.select(np.argsort(rows["length"][:], kind="stable")) for n, rows in tokens.items() if n != "train"
    }
    return Splits(
        tokens.get("train"),
        {name: by_length[name] for name in task.validation_splits if name in by_length},
        {name: by_length[name] for name in task.test_splits if name in by_length},
    )


# ---- model ---------------------------------------------------------------------------------------------------------


def load_config(arguments: Arguments, task: Task) -> tuple[Any, Any]:
    """The encoder's configuration, with the task's labels in it, and its tokenizer."""
    model = arguments.model
    source = {"revision": model.model_revision, "cache_dir": model.cache_dir, "trust_remote_code": False}
    labels = {"num_labels": task.num_labels, "problem_type": "regression" if task.is_regression else None}
    if task.labels is not None:
        labels |= {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, **source, **labels)
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **source)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {model.model_name_or_path}: {reason(error, 300)}") from None
    if tokenizer.pad_token is None:
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path}: its tokenizer has no padding token, which batches need: "
            "save a copy with pad_token set (and pad_token_id in config.json)"
        )
    if model.cls_dropout is not None:
        for name in ("cls_dropout", "classifier_dropout", "seq_classif_dropout"):
            if hasattr(config, name) or name == "cls_dropout":
                setattr(config, name, model.cls_dropout)
    return config, tokenizer


def check_model_arguments(arguments: Arguments, config: Any, tokenizer: Any, total_steps: int, warm_start: Any) -> None:
    """Module patterns, schedule and warm start, on a model without weights: refused before anything is loaded.

    The tokenizer learns how many tokens the model reads, where its own files do not say so.
    """
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(model) or sys.maxsize)
        if total_steps:
            check_optimisation(arguments.training, model, total_steps)
        check_method_fits(model, arguments.method, total_steps)
    if warm_start is not None:
        check_warm_start(*warm_start, model, arguments)


def load_model(arguments: Arguments, config: Any) -> torch.nn.Module:
    """The pretrained encoder in float32 with a fresh head."""
    model = arguments.model
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns that the head is new, which is meant to be so
    try:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model.model_name_or_path, config=config, revision=model.model_revision, cache_dir=model.cache_dir,
            dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"--model_name_or_path {model.model_name_or_path}: {reason(error, 300)}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    head = {id(p) for p in head_parameters(loaded)}
    encoder = {name for name, p in loaded.named_parameters() if id(p) not in head}
    missing = sorted(encoder & set(info["missing_keys"]))
    if missing:
        raise UsageError(f"--model_name_or_path {model.model_name_or_path} lacks encoder weights: {missing[0]}, …")
    if arguments.training.do_predict and not arguments.training.do_train and set(info["missing_keys"]) - encoder:
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path} has no trained head, and nothing trains it before "
            "--do_predict: give --do_train, or predict a trained adapter with nlu/predict.py"
        )
    speed_up(loaded, not model.no_fast_attention, not model.no_fast_dropout)
    return loaded


def set_precision(arguments: Arguments, applied: AppliedMethod) -> None:
    """bfloat16 without autocast where only our own layers and the head train: no weight is cast in any step."""
    training = arguments.training
    if training.bf16 and not applied.needs_autocast:
        loralib.cast_frozen(applied.model, torch.bfloat16)
        training.bf16, training.mixed_precision = False, "no"


# ---- training ------------------------------------------------------------------------------------------------------


def build_trainer(
    arguments: Arguments, task: Task, applied: AppliedMethod, splits: Splits, tokenizer: Any
) -> GlueTrainer:
    """The Trainer with data, metrics and the folders of this run."""
    training, data = arguments.training, arguments.data
    training.output_dir = str(Path(training.root_output_dir) / "model")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(training.root_output_dir) / "log"))
    training.label_names = ["labels"]
    training.metric_for_best_model, training.greater_is_better = f"eval_{task.metric}", True

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return compute_glue_metrics(task, to_labels(task, prediction.predictions), prediction.label_ids)

    validation = list(splits.validation.values()) or [None]
    bucketed = data.length_bucketing and splits.train is not None
    return GlueTrainer(
        task,
        applied,
        train_lengths=splits.train["length"][:] if bucketed else None,
        second_eval_dataset=validation[1] if len(validation) > 1 else None,
        args=training,
        train_dataset=splits.train,
        eval_dataset=validation[0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
        compute_metrics=metrics,
    )


def train_and_evaluate(arguments: Arguments, trainer: GlueTrainer, folder: Path, state: str) -> None:
    """Train from the last whole checkpoint, if there is one, and evaluate what training ended with."""
    training = arguments.training
    if training.do_train:
        checkpoint = last_whole_checkpoint(folder / "model") if state == "resume" else None
        if checkpoint is not None:
            logger.warning("going on from %s", checkpoint)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except UnpicklingError:  # only tensors and plain values are read, nothing that could run
            raise UsageError(f"the checkpoint {checkpoint} was not made here (it holds objects): delete it") from None
    if training.do_eval:
        done = [entry["step"] for entry in trainer.state.log_history if f"eval_{trainer.task.metric}" in entry]
        if trainer.weights_step not in done:
            trainer.evaluate()


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    code = main()
    if code == 0:  # after an error the others may never come
        end_processes()
    sys.exit(code)
