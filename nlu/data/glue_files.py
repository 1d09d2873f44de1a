"""Which files hold a split of a GLUE task. The loader reads them, and a run's digests identify them by content."""

from __future__ import annotations

from pathlib import Path

from nlu.tasks import Task

HUB_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MSR_TRAIN, MSR_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
_MSR_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


def split_files(task: Task, split: str, glue_dir: str | Path) -> list[Path]:
    """The files of a split, from the first place that has any; empty where there are none.

    The places, in this order: `<task>/<split>` with one of `HUB_SUFFIXES`, whole or in the hub's pieces
    (`<split>-00000-of-00002.parquet`); then the official release's file under `<task>/` or its own folder names. For
    MRPC that may be Microsoft's file, followed by the file with the ids of GLUE's dev set if it is there.
    """
    folder = Path(glue_dir) / task.name
    for suffix in HUB_SUFFIXES:
        path = folder / f"{split}{suffix}"
        paths = [path] if path.is_file() else sorted(folder.glob(f"{split}-*-of-*{suffix}"))
        if paths:
            return paths
    for folder in official_folders(task, glue_dir):
        released = [path for path in [folder / official_file(task, split)] if path.is_file()]
        original = _msr_files(folder, split) if task.name == "mrpc" else []
        if original and (split == "test" or len(original) == 2 or not released):
            return original
        if released:
            return released
    return []


def official_folders(task: Task, glue_dir: str | Path) -> list[Path]:
    """The folders in which the official release's files may lie."""
    return [Path(glue_dir) / name for name in dict.fromkeys((task.name, task.display, *task.official_folders))]


def official_file(task: Task, split: str) -> str:
    """The name of a split's file in the official release."""
    return dict(task.official_files).get(split, split.replace("validation", "dev") + ".tsv")


def _msr_files(folder: Path, split: str) -> list[Path]:
    """MRPC's file as Microsoft publishes it, and the ids of GLUE's dev set, which part it into two splits."""
    path = folder / (MSR_TEST if split == "test" else MSR_TRAIN)
    if not path.is_file():
        return []
    ids = [folder / name for name in _MSR_IDS if (folder / name).is_file()]
    return [path] if split == "test" else [path, *ids[:1]]
