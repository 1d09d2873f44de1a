"""What a run predicts at its end: its own test sets, and GLUE's diagnostic set AX by the model trained on MNLI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from nlu.arguments import Arguments
from nlu.data.glue import limit, load_task_data, reorder_labels, tokenize
from nlu.data.submission import write_predictions
from nlu.errors import UsageError
from nlu.tasks import Task, get_task
from nlu.trainer import GlueTrainer


def load_predict_task(arguments: Arguments, task: Task, tokenizer: Any) -> list[tuple[Task, dict[str, Dataset]]]:
    """The task of ``--predict_task`` with the token ids of its test sets; empty where none is asked for.

    Raises:
        UsageError: without ``--do_predict``, or for a task that asks for other classes than the trained one.
    """
    data = arguments.data
    if data.predict_task is None:
        return []
    other = get_task(data.predict_task)
    if not arguments.training.do_predict:
        raise UsageError("--predict_task needs --do_predict")
    same_classes = sorted(other.labels or ()) == sorted(task.labels or ())
    if not same_classes or len(other.text_fields) != len(task.text_fields) or other.name == task.name:
        raise UsageError(f"--predict_task {other.name} has other classes than {task.name}: ax goes with mnli")
    splits = load_task_data(other, data.glue_dir or os.environ.get("GLUE_DIR"), arguments.model.cache_dir, ["test"])
    if task.labels is not None:
        other, splits = reorder_labels(other, splits, task.labels)
    splits = {name: limit(rows, data.max_predict_samples) for name, rows in splits.items()}
    tokens = tokenize(splits, other, tokenizer, data.max_seq_length, data.pad_to_max_length)
    return [(other, {name: rows.sort("length") for name, rows in tokens.items()})]


def to_labels(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or for regression the number itself, from logits (n, labels)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, 0] if task.is_regression else logits.argmax(-1)


def predict(
    arguments: Arguments, tests: list[tuple[Task, dict[str, Dataset]]], trainer: GlueTrainer, folder: Path
) -> None:
    """Write the GLUE server's TSV files for the test sets of each task into ``predictions/``."""
    for task, split, rows in ((task, split, rows) for task, splits in tests for split, rows in splits.items()):
        output = trainer.predict(rows.remove_columns("labels") if "labels" in rows.column_names else rows)
        if arguments.training.should_save:
            write_predictions(task, split, rows["idx"][:], to_labels(task, output.predictions), folder / "predictions")
