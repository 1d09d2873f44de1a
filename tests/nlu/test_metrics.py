"""GLUE's metrics against their textbook formulas and SciPy."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nlu.metrics import class_report, compute_glue_metrics
from nlu.tasks import TASKS


def test_scores_of_two_classes_are_those_of_the_textbook():
    """Two hits, two misses, one false alarm and three correct rejections of the second class."""
    predictions, references = [1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]
    accuracy, f1, matthews = 5 / 8, 4 / (4 + 2 + 1), (2 * 3 - 2 * 1) / (4 * 4 * 3 * 5) ** 0.5
    for name, expected in (("mrpc", [accuracy, f1]), ("cola", [matthews, accuracy])):
        assert list(compute_glue_metrics(TASKS[name], predictions, references).values()) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.floats(0, 5, width=32)), min_size=1, max_size=60))
@example(list(zip(np.random.default_rng(0).normal(2, 3, 500), np.linspace(0, 5, 500), strict=True)))
@settings(max_examples=40, deadline=None)
def test_correlations_against_scipy_and_never_nan(pairs):
    predictions, references = np.transpose(pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = compute_glue_metrics(TASKS["stsb"], predictions, references)
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in values.values())
    if len(pairs) == 500:
        expected = np.corrcoef(predictions, references)[0, 1], scipy.stats.spearmanr(predictions, references)[0]
        assert (values["pearson"], values["spearmanr"]) == pytest.approx(expected)


def test_classes_may_be_called_as_scikit_learn_calls_its_averages():
    task = replace(TASKS["mnli"], labels=("accuracy", "macro avg", "value"))
    report = class_report(task, [0, 0, 1, 1], [0, 1, 1, 1])
    assert list(report["classes"]) == report["labels"] == ["accuracy", "macro avg", "value"]
    expected = {"precision": 0.5, "recall": 1, "f1-score": 2 / 3, "support": 1}
    assert report["classes"]["accuracy"] == pytest.approx(expected)
    assert report["classes"]["macro avg"]["recall"] == pytest.approx(2 / 3)
    assert report["confusion_matrix"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]


def test_constant_predictions_score_zero():
    assert compute_glue_metrics(TASKS["cola"], [1, 1, 1], [0, 1, 1])["matthews_correlation"] == 0.0
    assert compute_glue_metrics(TASKS["stsb"], [2.5] * 3, [0, 1, 2]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute_glue_metrics(TASKS["stsb"], [1.0, 2.0], [3, 3]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute_glue_metrics(TASKS["mrpc"], [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_hidden_labels_are_not_scored():
    for task, predictions, references in (("rte", [0], [-1]), ("rte", [0], [2]), ("stsb", [1.0, 2.0], [3.0, -1.0])):
        with pytest.raises(ValueError, match="hidden labels"):
            compute_glue_metrics(TASKS[task], predictions, references)
