"""How a learning rate is chosen from the runs of a tuning."""

import pandas as pd
import pytest

from nlu.experiments.tuning import choose_rates, chosen_rates
from tests.nlu.measured_lines import line


def test_choose_rates_takes_the_highest_mean_z_score_and_bars_a_rate_beside_a_failure():
    rows = []
    for row, scores in (
        ("a", {1e-3: (50, 60), 2e-3: (52, 64), 4e-3: (51, 10)}),
        ("b", {1e-3: (40, 50), 2e-3: (45, 50)}),
    ):
        for value, own in scores.items():
            rows += [
                {"row": row, "value": value, "task": task, "last": score, "failed": score == 10}
                for task, score in zip(("cola", "rte"), own, strict=True)
            ]
    runs = pd.DataFrame(rows)
    table = choose_rates(runs).set_index(["row", "value"])
    assert list(table.index[table.barred]) == [("a", 2e-3), ("a", 4e-3)]
    assert list(table.index[table.chosen]) == [("a", 1e-3), ("b", 2e-3)]
    cola = runs[runs.task == "cola"]["last"]
    rte = runs[runs.task == "rte"]["last"]
    expected = ((45 - cola.mean()) / cola.std() + (50 - rte.mean()) / rte.std()) / 2
    assert table.z["b", 2e-3] == pytest.approx(expected)
    barred = choose_rates(runs.assign(failed=True))  # all of them: the best scores decide
    assert barred.barred.all() and list(barred.value[barred.chosen]) == [2e-3, 2e-3]
    crashed = runs["last"].mask((runs.value == 2e-3) & (runs.task == "rte"))  # a mean of the other task is no score
    partial = choose_rates(runs.assign(last=crashed, failed=True))
    assert list(partial.value[partial.chosen]) == [1e-3, 1e-3]
    equal = choose_rates(runs.assign(last=50.0, failed=False))  # the lowest of equally good rates
    assert list(equal.value[equal.chosen]) == [1e-3, 1e-3]


def test_comparison_takes_the_best_rate_if_all_are_barred():
    """A run that has learned nothing has a score; one that crashed has none. The rates have names of their own."""

    def tried(label, rate, score, **changes):
        axes = {"method": label, "learning_rate": f"rate {rate}", "task_name": "rte"}
        arguments = {"learning_rate": rate, "holdout_fraction": 0.1}
        same = {"axes": axes, "arguments": arguments, "training_loss": [0.7], "constant_loss": 0.7}
        name = f"{label}, rate {rate}"
        return line(name, "rte", 101, [score], run=name, **same, **changes)

    crashed = {"status": "failed", "evaluations": None, "last": None}
    lines = [tried("lora", 1e-3, 0.5), tried("lora", 2e-3, 0.53), tried("lora", 4e-3, 0.0, **crashed)]
    lines += [tried("adalora", rate, 0.0, **crashed) for rate in (1e-3, 2e-3)]
    assert chosen_rates(lines) == {"lora": 2e-3}
