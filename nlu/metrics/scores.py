"""GLUE's metrics by scikit-learn and SciPy, with a value for every prediction a model can make."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from nlu.errors import UsageError
from nlu.tasks import Task


def _correlation(function, predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's or Spearman's correlation; 0 where one side is constant, since it then tells nothing of the other."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of nearly constant input, of which an untrained head makes much
        value = float(function(predictions, references).statistic)
    return value if np.isfinite(value) else 0.0


_METRICS = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    # F1 of class 1, as GLUE has it; 0 where the class is neither there nor predicted
    "f1": lambda predictions, references: float(
        f1_score(references, predictions, labels=[1], average="macro", zero_division=0)
    ),
    "matthews_correlation": lambda predictions, references: _matthews(predictions, references),
    "pearson": lambda predictions, references: _correlation(pearsonr, predictions, references),
    "spearmanr": lambda predictions, references: _correlation(spearmanr, predictions, references),
}


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation; 0 where one side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def compute_glue_metrics(task: Task, predictions: Sequence, references: Sequence) -> dict[str, float]:
    """All metrics of a task, the main one first.

    Args:
        predictions: (n,) class numbers, or (n,) or (n, 1) numbers for a regression task.
        references: the true labels, (n,).

    Returns:
        Metric key -> value, as a fraction from -1 or 0 to 1; 0, never NaN, for constant predictions.

    Raises:
        UsageError: the predictions of a regression task are not finite (training diverged).
        ValueError: the two differ in length, are empty, or have more dimensions.
    """
    dtype = np.float64 if task.is_regression else np.int64
    predictions, references = np.asarray(predictions, dtype=dtype), np.asarray(references, dtype=dtype)
    if predictions.ndim == 2 and predictions.shape[1] == 1:
        predictions = predictions[:, 0]
    if predictions.ndim != 1 or predictions.shape != references.shape or not len(predictions):
        raise ValueError(f"one prediction for each label is needed, got {predictions.shape} for {references.shape}")
    if not np.isfinite(predictions).all():
        raise UsageError("the model predicts NaN or infinity: training diverged; lower --learning_rate")
    return {name: _METRICS[name](predictions, references) for name in task.metrics}
