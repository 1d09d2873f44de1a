"""GLUE's metrics as an `evaluate` module that needs no network: `evaluate.load("nlu/metrics/glue.py", "cola")`.

Importing `evaluate` takes seconds; code that does not need its interface imports `nlu.metrics.scores` instead.
"""

import datasets
import evaluate

from nlu.metrics.scores import compute_glue_metrics
from nlu.tasks import get_task

__all__ = ["Glue", "compute_glue_metrics"]


class Glue(evaluate.Metric):
    """The metrics of the task that `config_name` names, by scikit-learn and SciPy."""

    def _info(self) -> evaluate.MetricInfo:
        kind = "float64" if get_task(self.config_name).is_regression else "int64"
        return evaluate.MetricInfo(
            description="The metrics of the General Language Understanding Evaluation benchmark.",
            citation="Wang et al. 2018, GLUE, arXiv:1804.07461",
            inputs_description="predictions and references: class numbers, or numbers for STS-B.",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return compute_glue_metrics(get_task(self.config_name), predictions, references)
