"""The splits that one run needs: rows as text, and then as token ids."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

from loralib.adapter_folder import has_tokenizer
from nlu.data.glue import load_split
from nlu.data.own_files import load_own_files
from nlu.data.reader import names_shown, read_file
from nlu.errors import UsageError, reason
from nlu.runs.files import open_new
from nlu.tasks import TASKS, Task, get_task

logger = logging.getLogger("nlu")

Rows = dict[str, Dataset]  # by split: the text fields, `label` (-1 or in own regression NaN where hidden) and `idx`


@dataclass
class Splits:
    """Token ids of one task: training rows, validation sets (MNLI has two), test sets; and rows cut, by split."""

    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    cut: dict[str, int]


# ---- rows as text ----------------------------------------------------------------------------------------------------


def needed(training: Any) -> list[str]:
    """The splits that --do_train, --do_eval and --do_predict ask for, as :func:`load_data` takes them."""
    wanted = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    return [name for name, asked in wanted.items() if asked]


def load_data(data: Any, need: Sequence[str], cache_dir: str | None = None) -> tuple[Task, Rows, dict[str, int]]:
    """The task, its rows as text, cut to --max_*_samples, and how many rows of each of one's own files were left out.

    Args:
        data: the run's arguments about data, by name, see ``nlu/arguments.py``.
        need: of "train", "validation" and "test" (which stand for all of a task's validation and test splits) those
            to load. With --holdout_fraction training rows are held out in place of the validation sets.

    Raises:
        UsageError: a needed split is missing, or a file is malformed, naming the file and the line.
    """
    need = list(dict.fromkeys("train" if name == "validation" and data.holdout_fraction else name for name in need))
    if data.save_splits is not None and (data.train_file is None or data.holdout_fraction is None):
        raise UsageError("--save_splits writes what --holdout_fraction parts of --train_file: give all three")
    skipped: dict[str, int] = {}
    if data.task_name is None:
        paths = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        task, columns, skipped = load_own_files(
            {split: path for split, path in paths.items() if path is not None and split in ("train", *need)},
            text_columns=data.text_columns.split(",") if data.text_columns else None,
            label_column=data.label_column,
            metric=data.metric,
            encoding=data.encoding,
            skip_bad_rows=data.on_error == "skip",
        )
    else:
        task = get_task(data.task_name)
        columns = _load_glue(task, need, data.glue_dir, cache_dir)
    rows = {split: _dataset(task, values) for split, values in columns.items()}
    if data.holdout_fraction is not None:
        rows |= _hold_out(task, rows["train"], data.holdout_fraction, data.holdout_seed)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    rows = {split: limit(each, limits[split.partition("_")[0]]) for split, each in rows.items()}
    second = task.validation_splits[-1]
    if task.second_rows and len(rows.get(second, ())) not in (0, task.second_rows):
        part = len(rows.pop(second))
        logger.warning("%s: %d of the official %d rows are not scored as that set", second, part, task.second_rows)
    return task, rows, skipped


def load_predict_task(data: Any, task: Task, cache_dir: str | None = None) -> list[tuple[Task, Rows]]:
    """The task of ``--predict_task`` with the rows of its test sets; empty where none is asked for.

    Raises:
        UsageError: for a task that asks for other classes than the trained one.
    """
    if data.predict_task is None:
        return []
    other = get_task(data.predict_task)
    if sorted(other.labels or ()) != sorted(task.labels or ()) or len(other.text_fields) != len(task.text_fields):
        raise UsageError(f"--predict_task {other.name} has other classes than {task.name}: ax goes with mnli")
    columns = _load_glue(other, ["test"], data.glue_dir, cache_dir)
    return [(other, {split: limit(_dataset(other, each), data.max_predict_samples) for split, each in columns.items()})]


def reorder_labels(task: Task, rows: Rows, order: Sequence[str]) -> tuple[Task, Rows]:
    """Number the classes of a task and of its rows in another order, such as the one a checkpoint was trained with.

    Returns:
        The task whose labels, submission labels and positive class follow `order`, and the renumbered rows.

    Raises:
        ValueError: `order` does not hold exactly the task's labels.
    """
    order = tuple(order)
    if task.labels is None or sorted(order) != sorted(task.labels):
        raise ValueError(f"the labels of {task.name} are {task.labels}, not {order}")
    if order == task.labels:
        return task, rows
    new_number = [order.index(word) for word in task.labels]
    reordered = replace(
        task,
        labels=order,
        server_labels=tuple(task.submission_labels[task.labels.index(word)] for word in order),
        positive=new_number[task.positive],
    )
    numbers = np.array([*new_number, -1])  # the last place is the one that -1 looks up
    return reordered, {
        split: _dataset(reordered, each[:] | {"label": numbers[np.asarray(each["label"][:])]})
        for split, each in rows.items()
    }


def limit(dataset: Dataset, n: int | None) -> Dataset:
    """The first n rows; all of them for None or where there are fewer."""
    return dataset if n is None else dataset.select(range(min(n, len(dataset))))


def _load_glue(
    task: Task, need: Sequence[str], glue_dir: str | None, cache_dir: str | None
) -> dict[str, dict[str, list]]:
    glue_dir = glue_dir or os.environ.get("GLUE_DIR")
    if glue_dir is not None and not Path(glue_dir).is_dir():
        raise UsageError(f"--glue_dir {glue_dir}: no such folder")
    splits = {"train": task.train_splits, "validation": task.validation_splits, "test": task.test_splits}
    wanted = [split for name in need for split in splits[name]]
    if not wanted:
        raise UsageError(f"task {task.name} has only {', '.join(task.splits)}: it is predicted, not trained")
    return {split: load_split(task, split, glue_dir, cache_dir) for split in wanted}


def _dataset(task: Task, columns: dict[str, list]) -> Dataset:
    """In the hub's columns and types."""
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    features = {**{name: Value("string") for name in task.text_fields}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


def _hold_out(task: Task, train: Dataset, fraction: float, seed: int) -> Rows:
    """Training and held-out rows. Of one's own classes each gives its share; GLUE's rows are drawn without regard."""
    if math.ceil(len(train) * fraction) >= len(train):
        raise UsageError(f"--holdout_fraction {fraction} of {len(train)} rows leaves none to train on")
    own_classes = task.name not in TASKS and not task.is_regression
    try:
        parts = train.train_test_split(fraction, seed=seed, stratify_by_column="label" if own_classes else None)
    except ValueError as error:  # a class of one row
        counts = np.bincount(train["label"][:]).tolist()
        shown = ", ".join(f"{name} {rows}" for name, rows in zip(task.labels, counts, strict=True))
        raise UsageError(f"--holdout_fraction {fraction}: {reason(error)} (rows of each class: {shown})") from None
    return {"train": parts["train"], task.validation_splits[0]: parts["test"]}


def save_splits(data: Any, rows: Rows) -> None:
    """Write the rows of --train_file that are trained on and held out, with all their columns, to --save_splits."""
    reader, lines = read_file(data.train_file, encoding=data.encoding)
    Path(data.save_splits).mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        numbers = set(rows[split]["idx"])
        with open_new(Path(data.save_splits) / f"{split}.csv") as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            table = csv.DictWriter(text, reader.columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(line.values for line in lines if line.number in numbers)
            text.detach()


# ---- token ids -------------------------------------------------------------------------------------------------------


def tokenize_splits(
    task: Task, rows: Rows, tokenizer: Any, max_seq_length: int, pad_to_max_length: bool = False
) -> Splits:
    """Token ids, in memory. Validation and test sets are sorted by length, so that their batches need little padding.

    Args:
        tokenizer: a transformers tokenizer; where it allows fewer than `max_seq_length` tokens, its limit holds.
        pad_to_max_length: pad every row to that length here; otherwise the collator pads to a batch's longest row.

    Returns:
        Data sets with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer has them, `labels` (left out
        of a split whose labels are hidden), `idx`, and `length`, the number of tokens without padding.
    """
    check_room(tokenizer, max_seq_length, len(task.text_fields))
    max_length = min(max_seq_length, tokenizer.model_max_length)
    tokens: dict[str, Dataset] = {}
    cut = dict.fromkeys(rows, 0)

    def encode_rows(batch: dict[str, list], split: str) -> dict[str, list]:
        texts = [batch[field] for field in task.text_fields]
        encoded, too_long = encode(tokenizer, texts, max_length, return_attention_mask=True)
        cut[split] += len(too_long)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if pad_to_max_length:
            encoded = tokenizer.pad(encoded, padding="max_length", max_length=max_length)
        return {**encoded, "length": lengths}

    for split, dataset in rows.items():
        encoded = dataset.map(
            encode_rows,
            fn_kwargs={"split": split},
            batched=True,
            remove_columns=list(task.text_fields),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"tokens-{split}",
            desc=f"Tokenizing {task.name} {split}",
        )
        if split != "train":
            encoded = encoded.select(np.argsort(encoded["length"][:], kind="stable"))
        hidden = split in task.test_splits and _any_hidden(task, dataset["label"][:])
        tokens[split] = encoded.remove_columns("label") if hidden else encoded.rename_column("label", "labels")
    validation, test = ({split: tokens[split] for split in names if split in tokens}
                        for names in (task.validation_splits, task.test_splits))  # fmt: skip
    return Splits(tokens.get("train"), validation, test, cut)


def encode(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int, **options: Any) -> tuple[Any, list[int]]:
    """Token ids of at most that many tokens a row, and the rows that were cut.

    Args:
        texts: one or two columns of texts.
    """
    encoded = tokenizer(*map(list, texts), truncation=True, max_length=max_length, **options)
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
    if not full:
        return encoded, []
    whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
    return encoded, [row for row, ids in zip(full, whole, strict=True) if len(ids) > max_length]


def check_tokenizer(tokenizer: Any, source: str, flag: str = "") -> None:
    """Raises UsageError for a tokenizer that cannot pad, and a folder ``source`` without a tokenizer's files.

    For such a folder transformers makes one of special tokens alone, which reads any text as unknown.
    """
    if os.path.isdir(source) and not has_tokenizer(source):
        raise UsageError(f"{flag}{source} has no tokenizer: save it into that folder (tokenizer.save_pretrained)")
    if tokenizer.pad_token is None:
        raise UsageError(
            f"{flag}{source}: its tokenizer has no padding token, which batches need: save a copy with pad_token set "
            "(and pad_token_id in config.json)"
        )


def check_room(tokenizer: Any, max_seq_length: int, texts: int) -> None:
    """Raises UsageError where so many tokens leave no room for one or two texts beside the special ones."""
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_seq_length <= special:
        raise UsageError(f"--max_seq_length {max_seq_length} has no room for text: {special} tokens are special ones")


def longest_input(model: nn.Module) -> int | None:
    """The most tokens that a model with a table of positions reads; None for one without (DeBERTa).

    RoBERTa's table has padding's row and those before it on top, which no token uses, and those of OPT and BART begin
    with an offset.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions") and isinstance(
            module, nn.Embedding
        ):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", first)
    return None


def _any_hidden(task: Task, labels: list) -> bool:
    """Whether labels are missing: NaN where any number may be a label, -1 elsewhere."""
    unbounded = task.is_regression and task.value_range is None
    return any(map(math.isnan, labels)) if unbounded else min(labels) < 0


# ---- what the data are -----------------------------------------------------------------------------------------------


def describe(task: Task, rows: Rows, skipped: dict[str, int], cut: dict[str, int]) -> dict[str, dict[str, Any]]:
    """For each split, as the record has it: its rows, those left out and cut, and the rows of each class."""
    found = {}
    for split, each in rows.items():
        found[split] = {"rows": len(each), "skipped": skipped.get(split, 0), "cut": cut[split]}
        if task.labels is not None:
            labels = np.asarray(each["label"][:])
            counts = np.bincount(labels[labels >= 0], minlength=task.num_labels).tolist()
            found[split] |= {"classes": dict(zip(task.labels, counts, strict=True))} if any(counts) else {}
    return found


def description_lines(task: Task, found: dict[str, dict[str, Any]], max_seq_length: int) -> list[str]:
    """What :func:`describe` found, for the console; of one's own data also labels that may be typing errors."""
    lines = []
    for split, of in found.items():
        line = f"{split}: {of['rows']:,} rows"
        if "classes" in of:
            counts = ", ".join(f"{name} {rows:,}" for name, rows in of["classes"].items())
            line += f" ({counts if len(counts) <= 200 else counts[:197] + '...'})"
        line += f", {of['skipped']:,} bad and left out" if of["skipped"] else ""
        line += f", {of['cut']:,} cut at {max_seq_length} tokens (--max_seq_length)" if of["cut"] else ""
        lines.append(line)
    classes = found.get("train", {}).get("classes", {}) if task.name not in TASKS else {}
    alike = [name for name in classes if [other.casefold() for other in classes].count(name.casefold()) > 1]
    single = [name for name, rows in classes.items() if rows == 1]
    if alike:
        lines.append(f"labels that differ in case alone, and are classes of their own: {names_shown(alike)}")
    if single:
        lines.append(f"labels of a single training row: {names_shown(single)}")
    return lines
