"""Writes the files of a run's predictions: test sets in the GLUE server's form, and a report on each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loralib.files import write_text
from nlu.tasks import Task


def write_predictions(
    task: Task,
    split: str,
    indices: Sequence[int],
    predictions: Sequence[float],
    folder: str | Path,
    labels: Sequence[float] | None = None,
) -> Path:
    """Write one split's predictions, ordered by index, and return the file.

    A GLUE test set goes into the server's file (`MNLI-m.tsv`), with the columns `index` and `prediction`. Any other set
    goes into `<task>_<split>.tsv`, with the true `label` too if it is known. Classes are written in the server's words,
    numbers with seven significant digits; the server's file of STS-B has three decimals, and scores between 0 and 5.

    Args:
        indices: the `idx` of each row. predictions, labels: (n,) class numbers, or numbers for a regression task.
    """
    server = dict(zip(task.test_splits, (name for name, _ in task.submission_files), strict=False)).get(split)
    if server and task.value_range:
        words = [f"{value:.3f}" for value in np.clip(predictions, *task.value_range)]
    else:
        words = [_word(task, value) for value in predictions]
    table = pd.DataFrame({"index": indices, "prediction": words})
    if server is None and labels is not None:
        table["label"] = [_word(task, value) for value in labels]
    path = Path(folder) / (server or f"{task.name}_{split}.tsv")
    write_text(path, table.sort_values("index").to_csv(sep="\t", index=False))
    return path


def _word(task: Task, value: float) -> str:
    if task.is_regression:
        return f"{value:.7g}"
    return str(int(value)) if task.server_numbers else task.labels[int(value)]


def draw_confusion(report: dict[str, Any], path: Path) -> None:
    """Draw the confusion matrix of a report of :func:`~nlu.metrics.class_report`."""
    import matplotlib  # these imports take a second
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    names = report["labels"]
    side = 2.5 + 0.45 * min(len(names), 40)  # inches
    figure = Figure((side, side), layout="constrained")
    display = ConfusionMatrixDisplay(np.array(report["confusion_matrix"]), display_labels=names)
    counts = len(names) <= 40  # more would take a minute to draw
    style = {"colorbar": False, "cmap": "Blues", "xticks_rotation": "vertical", "include_values": counts}
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a label is no formula
        display.plot(ax=figure.subplots(), **style)
        figure.savefig(path, dpi=150)
