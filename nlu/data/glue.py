"""GLUE's data, from local files or the hub, checked row by row; and its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from torch import nn

from nlu.data.own_files import load_own_files
from nlu.data.rows import build_dataset, read_labels
from nlu.data.tables import Table, read_table, read_tsv
from nlu.errors import UsageError
from nlu.tasks import TASKS, Task, get_task

__all__ = ["limit", "load_own_files", "load_task_data", "longest_input", "reorder_labels", "tokenize"]

HUB_DATASET = "nyu-mll/glue"
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def load_task_data(
    task: Task | str,
    glue_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    need: Sequence[str] = ("train", "validation", "test"),
) -> dict[str, Dataset]:
    """Load the splits of a GLUE task as the hub's `nyu-mll/glue` holds them.

    A split in `glue_dir` is `<task>/<split>.jsonl`, `.json`, `.parquet` or `.csv` (also in the hub's pieces, as in
    `<split>-00000-of-00002.parquet`), or the official release's TSV file under `<task>/` or its own folder name
    (`CoLA/dev.tsv`, `MRPC/msr_paraphrase_train.txt` with `dev_ids.tsv`, `diagnostic/diagnostic.tsv`); the first of
    these that is there counts.

    Args:
        need: the splits to load; "validation" and "test" stand for all of a task's validation and test splits.

    Returns:
        Split name -> rows with the task's text fields, `label` (its number in `task.labels`, or a float; -1 where
        hidden) and `idx`.

    Raises:
        UsageError: a needed split is missing, or a file is malformed, naming the file and the line.
    """
    task = get_task(task) if isinstance(task, str) else task
    hub = TASKS.get(task.name, task)  # files and the hub number the classes in this order, whatever the order of `task`
    splits = _needed(hub, need)
    if glue_dir is None:
        rows = _load_hub(hub, splits, cache_dir)
    else:
        root = Path(glue_dir)
        if not root.is_dir():
            raise UsageError(f"--glue_dir {root}: no such folder")
        rows = {split: _load_split(hub, split, root) for split in splits}
    return rows if task.labels == hub.labels else reorder_labels(hub, rows, task.labels)[1]


def reorder_labels(task: Task, splits: dict[str, Dataset], order: Sequence[str]) -> tuple[Task, dict[str, Dataset]]:
    """Number the classes of a task and of its rows in another order, such as the one a checkpoint was trained with.

    Args:
        splits: rows with a `label` column in the order of `task.labels`; a hidden label (-1) stays hidden.
        order: the words of `task.labels` in the new order.

    Returns:
        The task whose labels, submission labels and positive class follow `order`, and the renumbered splits.

    Raises:
        ValueError: `order` does not hold exactly the task's labels.
    """
    order = tuple(order)
    if task.labels is None or sorted(order) != sorted(task.labels):
        raise ValueError(f"the labels of {task.name} are {task.labels}, not {order}")
    if order == task.labels:
        return task, splits
    new_number = [order.index(word) for word in task.labels]
    server = task.submission_labels
    reordered = replace(
        task,
        labels=order,
        submission_labels=server and tuple(server[task.labels.index(word)] for word in order),
        positive=new_number[task.positive],
    )
    numbers = np.array([*new_number, -1])  # the last place is the one that -1 looks up

    def renumber(rows: Dataset) -> Dataset:
        labels = numbers[np.asarray(rows["label"][:])]
        names = rows.column_names
        rows = rows.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=list(order)))
        return rows.select_columns(names)

    return reordered, {name: renumber(rows) for name, rows in splits.items()}


def limit(dataset: Dataset, n: int | None) -> Dataset:
    """The first n rows (all of them for None or where there are fewer); UsageError where n is not positive."""
    if n is None:
        return dataset
    if n < 1:
        raise UsageError(f"the number of samples must be at least 1, got {n}")
    return dataset.select(range(min(n, len(dataset))))


def tokenize(
    splits: dict[str, Dataset], task: Task, tokenizer, max_seq_length: int, pad_to_max_length: bool = False
) -> dict[str, Dataset]:
    """Turn text into token ids, in memory (nothing is written beside the source or into a cache).

    Args:
        tokenizer: a transformers tokenizer; where it allows fewer than `max_seq_length` tokens, its limit holds.
        pad_to_max_length: pad every row to `max_seq_length` here; otherwise the collator pads to a batch's longest row.

    Returns:
        The same splits with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer has them, `labels`
        (left out of a split whose labels are hidden), `idx`, and `length`, the number of tokens without padding.
    """
    pair = len(task.text_fields) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_seq_length <= special:
        raise UsageError(f"--max_seq_length {max_seq_length} has no room for text: {special} tokens are special ones")
    max_length = min(max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            *(batch[field] for field in task.text_fields),
            truncation=True,
            max_length=max_length,
            padding="max_length" if pad_to_max_length else False,
            return_attention_mask=True,
        )
        return {**encoded, "length": [sum(mask) for mask in encoded["attention_mask"]]}

    result = {}
    for split, dataset in splits.items():
        dataset = dataset.select_columns([*task.text_fields, "label", "idx"])
        dataset = dataset.map(
            encode,
            batched=True,
            remove_columns=list(task.text_fields),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"tokens-{split}",
            desc=f"Tokenizing {task.name} {split}",
        )
        hidden = split in task.test_splits and _any_hidden(task, dataset["label"][:])
        result[split] = dataset.remove_columns("label") if hidden else dataset.rename_column("label", "labels")
    return result


def longest_input(model: nn.Module) -> int | None:
    """The most tokens that a model with a table of positions reads; None for one without (DeBERTa).

    RoBERTa's table has padding's row and those before it on top, which no token uses.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _any_hidden(task: Task, labels: list) -> bool:
    """Whether labels are missing: NaN where any number may be a label, -1 elsewhere."""
    unbounded = task.is_regression and task.value_range is None
    return any(map(math.isnan, labels)) if unbounded else min(labels) < 0


# ---- GLUE's splits ---------------------------------------------------------------------------------------------------


def _needed(task: Task, need: Sequence[str]) -> list[str]:
    groups = {"train": task.train_splits, "validation": task.validation_splits, "test": task.test_splits}
    splits = [split for name in need for split in groups.get(name, (name,))]
    unknown = [split for split in splits if split not in task.splits]
    if unknown:
        raise UsageError(f"task {task.name} has no split {unknown[0]!r}: choose from {', '.join(task.splits)}")
    if not splits:
        raise UsageError(f"task {task.name} has only {', '.join(task.splits)}: it is predicted, not trained")
    return list(dict.fromkeys(splits))


def _load_hub(task: Task, splits: list[str], cache_dir: str | Path | None) -> dict[str, Dataset]:
    try:
        loaded = load_dataset(HUB_DATASET, task.name, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:  # the hub's client raises dozens of unrelated types, all meaning the same to the user
        reason = str(error).split("\n")[0][:200]
        raise UsageError(
            f"cannot load {HUB_DATASET} ({task.name}) from the hub: {reason}; pass --glue_dir DIR"
        ) from error
    columns = [*task.text_fields, "label", "idx"]
    for split in splits:
        if not isinstance(loaded, DatasetDict) or split not in loaded:
            raise UsageError(f"{HUB_DATASET} ({task.name}) has no split {split!r}; pass --glue_dir DIR")
        missing = [name for name in columns if name not in loaded[split].column_names]
        if missing:
            raise UsageError(f"{HUB_DATASET} ({task.name}) {split} has no column {missing[0]!r}; pass --glue_dir DIR")
    return {split: loaded[split].select_columns(columns) for split in splits}


def _load_split(task: Task, split: str, root: Path) -> Dataset:
    folders = [root / task.name, *(root / name for name in task.official_folders)]
    for suffix in _SUFFIXES:
        path = folders[0] / f"{split}{suffix}"
        paths = [path] if path.is_file() else sorted(folders[0].glob(f"{split}-*-of-*{suffix}"))
        if paths:
            tables = [_glue_table(path, task, split) for path in paths]
            return build_dataset(task, [(table, read_labels(table, task, split)) for table in tables])
    for folder in folders:
        table = _read_official(task, split, folder)
        if table is not None:
            return build_dataset(task, [(table, read_labels(table, task, split))])
    known = f"{split}.jsonl (.json, .parquet, .csv) or {_official_file(task, split)}"
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise UsageError(f"no {split} split of {task.name}: looked for {known} in {looked}")


def _glue_table(path: Path, task: Task, split: str) -> Table:
    hidden = split in task.test_splits
    required = [*task.text_fields] if hidden else [*task.text_fields, "label"]
    return read_table(path, required, ["label", "idx"] if hidden else ["idx"])


def _official_file(task: Task, split: str) -> str:
    return dict(task.official_files).get(split, split.replace("validation", "dev") + ".tsv")


def _read_official(task: Task, split: str, folder: Path) -> Table | None:
    """The split from the release's TSV files under the hub's column names; None where there is no such file."""
    text = task.official_text or task.text_fields
    hidden = split in task.test_splits
    required = [*text] if hidden else [*text, task.official_label]
    if task.name == "mrpc":
        table = _read_msr(folder, split, required, task.official_label)
        if table is not None:
            return _renamed(table, task, text)
    path = folder / _official_file(task, split)
    if not path.is_file():
        return None
    header = None if hidden else task.official_header
    optional = [task.official_label] if hidden else []
    return _renamed(read_tsv(path, required, optional, header, task.short_rows_skipped), task, text)


def _renamed(table: Table, task: Task, text: Sequence[str]) -> Table:
    names = {**dict(zip(text, task.text_fields, strict=True)), task.official_label: "label"}
    table.columns = {names.get(name, name): values for name, values in table.columns.items()}
    return table


def _read_msr(folder: Path, split: str, required: list[str], label: str) -> Table | None:
    """MRPC as Microsoft publishes it: the rows of the training file that `dev_ids.tsv` names are GLUE's dev set.

    `idx` is the row in the training file for both, as on the hub. The test file has its true labels.
    """
    if split == "test":
        path = folder / "msr_paraphrase_test.txt"
        return read_tsv(path, required, [label]) if path.is_file() else None
    path = folder / "msr_paraphrase_train.txt"
    ids_path = next((p for p in (folder / "dev_ids.tsv", folder / "mrpc_dev_ids.tsv") if p.is_file()), None)
    if not path.is_file() or ids_path is None:
        return None
    keys = ["#1 ID", "#2 ID"]
    ids = read_tsv(ids_path, keys, [], header=keys)
    table = read_tsv(path, required + keys, [])
    dev = dict.fromkeys(zip(*(ids.columns[key] for key in keys), strict=True))
    rows = list(zip(*(table.columns[key] for key in keys), strict=True))
    lost = set(dev) - set(rows)
    if lost:
        row = next(row for row, key in enumerate(dev) if key in lost)
        raise ids.error(row, f"this pair of ids is not in {path.name}")
    kept = [row for row, key in enumerate(rows) if (key in dev) == (split == "validation")]
    if not kept:
        raise UsageError(f"{path}: no rows are left for {split} beside {ids_path.name}")
    columns = {name: [table.columns[name][row] for row in kept] for name in required}
    return Table(path, {**columns, "row": kept}, [table.places[row] for row in kept], "line", typed=False)
