"""Rows of text as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nlu.data.file_formats import shown
from nlu.tasks import TASKS, Task

if TYPE_CHECKING:  # predict.py needs neither
    from datasets import Dataset

    from nlu.data.splits import Data


def tokenize(data: Data, tokenizer: Any) -> tuple[dict[str, Dataset], dict[str, dict[str, Any]]]:
    """Turn texts into token ids, cut to the tokenizer's `model_max_length`.

    Training rows keep their order. Validation and test rows are sorted by length, short ones first, which saves
    padding.

    Returns:
        The rows of each split, with the tokenizer's output (input_ids, attention_mask, …), `labels` (absent if a test
        set hides labels), `idx`, and `length`, the number of tokens; and, for the record, counts of each split: all
        rows, rows left out, cut, without a label, and of each class.
    """
    task = data.task
    tokens: dict[str, Dataset] = {}
    counts: dict[str, dict[str, Any]] = {}

    def encode_rows(batch: dict[str, list], split: str) -> dict[str, list]:
        encoded, too_long = encode(tokenizer, [batch[field] for field in task.text_fields])
        counts[split]["cut"] += too_long
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    for split, dataset in data.rows.items():
        labels = np.asarray(dataset["label"][:])
        # A test set hides labels by NaN, and by -1 if that is not a label.
        hidden = np.isnan(labels) | ((not task.is_regression or task.value_range is not None) & (labels < 0))
        counts[split] = {"rows": len(dataset), "skipped": data.skipped.get(split, 0), "cut": 0}
        counts[split]["hidden"] = int(hidden.sum())
        if task.labels and not hidden.all():
            of_each = np.bincount(labels[~hidden], minlength=task.num_labels).tolist()
            counts[split]["classes"] = dict(zip(task.labels, of_each, strict=True))
        encoded = dataset.map(
            encode_rows,
            fn_kwargs={"split": split},
            batched=True,
            remove_columns=[*task.text_fields, "label"],
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"tokens-{split}",
            desc=f"Tokenizing {task.display} {split}",
        )
        if not hidden.any():
            encoded = encoded.add_column("labels", labels)
        if split != "train":
            encoded = encoded.select(np.argsort(encoded["length"][:], kind="stable"))
        tokens[split] = encoded
    return tokens, counts


def encode(tokenizer: Any, texts: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """Tokenize one or two columns of texts, each row cut to the tokenizer's maximum; also returns how many were cut."""
    encoded = tokenizer(*map(list, texts), truncation=True)
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= tokenizer.model_max_length]
    if not full:
        return encoded, 0
    whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
    # A tokenizer returns a row whole if not even its special tokens fit.
    return encoded, sum(len(ids) > len(encoded["input_ids"][row]) for row, ids in zip(full, whole, strict=True))


def description_lines(task: Task, counts: dict[str, dict[str, Any]], max_seq_length: int) -> list[str]:
    """The counts of :func:`tokenize` as lines for the console."""
    lines = []
    for split, of in counts.items():
        line = f"{split}: {of['rows']:,} rows"
        if "classes" in of:
            line += f" ({shown(of['classes'])[1:-1]})"
        if task.name not in TASKS and task.is_regression and of["hidden"] < of["rows"]:
            line += " of a regression: labels have a decimal point"
        line += f", not scored: {of['hidden']:,} have no label" if 0 < of["hidden"] < of["rows"] else ""
        line += f", {of['skipped']:,} bad and left out" if of["skipped"] else ""
        line += f", {of['cut']:,} cut at {max_seq_length} tokens (--max_seq_length)" if of["cut"] else ""
        lines.append(line)
    return lines
