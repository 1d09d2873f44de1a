"""GLUE's metrics, computed by scikit-learn and SciPy, and defined for every prediction that a model can make.

``nlu/tasks.py`` says which metric is a task's score, and on which of MNLI's two sets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nlu.tasks import Task


def _correlation(function: Callable, references: np.ndarray, predictions: np.ndarray) -> float:
    """A correlation of SciPy; 0 if one side is constant, because it then says nothing about the other."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns about nearly constant input, which untrained heads produce
        value = function(predictions, references).statistic
    return value if np.isfinite(value) else 0.0


def _function(name: str, task: Task) -> Callable:
    """A metric as a function of (references, predictions). The libraries take half a second to import."""
    if name in ("pearson", "spearmanr"):
        from scipy.stats import pearsonr, spearmanr

        return partial(_correlation, pearsonr if name == "pearson" else spearmanr)
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    # Macro-F1 is the mean over the classes that are present or predicted; F1 is that of the second class.
    macro_f1 = partial(f1_score, average="macro", zero_division=0)
    return {
        "accuracy": accuracy_score,
        "f1": partial(macro_f1, labels=[1]),
        "macro_f1": macro_f1,
        "matthews_correlation": matthews_corrcoef,
    }[name]


def to_labels(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or for regression the number itself, from logits (n, labels)."""
    return logits[:, 0] if task.is_regression else logits.argmax(-1)


def compute_glue_metrics(task: Task, predictions: Sequence, references: Sequence) -> dict[str, float]:
    """All metrics of a task, the main one first.

    Args:
        predictions: (n,) class numbers, or numbers for a regression task. references: the true labels, (n,).

    Returns:
        Metric key -> value, from 0 to 1, or from -1 for correlations, which are 0 for constant predictions, never NaN.

    Raises:
        ValueError: if the two differ in length, or a reference is not a label of the task, such as a hidden one.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    low, high = (task.value_range or (-np.inf, np.inf)) if task.is_regression else (0, task.num_labels - 1)
    if not ((references >= low) & (references <= high)).all():
        raise ValueError(f"{task.name}: the references hold hidden labels; they cannot be scored")
    return {name: float(_function(name, task)(references, predictions)) for name in task.metrics}


def constant_loss(task: Task, labels: Sequence, class_weights: Sequence[float] | None = None) -> float:
    """The training loss of the best constant answer: a training that ends near it has learned nothing.

    Args:
        task: says whether the loss is a squared error or a cross entropy. labels: of the training rows, (n,).
        class_weights: as in the training loss.
    """
    labels = np.asarray(labels)
    if task.is_regression:
        return float(labels.var())
    mass = np.bincount(labels, minlength=task.num_labels) / len(labels)
    mass = mass * (1.0 if class_weights is None else class_weights)
    mass = mass[mass > 0]
    return float(-(mass * np.log(mass / mass.sum())).sum())


def class_report(task: Task, predictions: Sequence, references: Sequence) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and the confusion matrix.

    Args:
        predictions, references: (n,) class numbers, as for :func:`compute_glue_metrics`.

    Returns:
        "labels": the class words; "classes": class word -> precision, recall, f1-score (in [0, 1]) and support (its
        rows); "confusion_matrix": counts, (true class, predicted class).
    """
    from sklearn.metrics import classification_report, confusion_matrix

    classes = range(task.num_labels)
    report = classification_report(references, predictions, labels=classes, output_dict=True, zero_division=0)
    return {
        "labels": list(task.labels),
        "classes": {name: report[str(number)] for number, name in enumerate(task.labels)},
        "confusion_matrix": confusion_matrix(references, predictions, labels=classes).tolist(),
    }
