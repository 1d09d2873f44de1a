"""A task may number its classes in another order, such as a checkpoint's: rows, scores and files must follow."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from nlu.data.glue import load_task_data, reorder_labels
from nlu.data.submission import write_predictions
from nlu.metrics import compute_glue_metrics
from nlu.tasks import TASKS
from tests.nlu.glue_samples import sample_rows
from tests.nlu.tiny import write_rows


def words(task, rows) -> list[str | None]:
    assert rows.features["label"].names == list(task.labels)
    return [None if number < 0 else task.labels[number] for number in rows["label"][:]]


@pytest.mark.parametrize("order", list(permutations(TASKS["mnli"].labels))[3:])
def test_rows_and_submissions_keep_their_words(tmp_path, order):
    task = TASKS["mnli"]
    for split in ("train", "test_matched"):
        write_rows(tmp_path / "mnli" / f"{split}.jsonl", sample_rows(task, split, 9))
    splits = load_task_data(task, tmp_path, need=["train", "test_matched"])
    reordered, renumbered = reorder_labels(task, splits, order)
    assert reordered.labels == order
    for name, rows in splits.items():
        assert words(reordered, renumbered[name]) == words(task, rows)
        assert renumbered[name].column_names == rows.column_names
        assert renumbered[name]["premise"][:] == rows["premise"][:]
    path = write_predictions(reordered, "test_matched", range(3), [order.index(w) for w in task.labels], tmp_path)
    assert [line.split("\t")[1] for line in path.read_text().splitlines()[1:]] == list(task.labels)


@pytest.mark.parametrize("name", ["mrpc", "cola"])
def test_scores_and_the_server_s_numbers_do_not_depend_on_the_order(tmp_path, name):
    task = TASKS[name]
    reordered, _ = reorder_labels(task, {}, task.labels[::-1])
    predictions, references = np.random.default_rng(0).integers(0, 2, (2, 60))
    swapped = compute_glue_metrics(reordered, 1 - predictions, 1 - references)
    assert swapped == pytest.approx(compute_glue_metrics(task, predictions, references))
    paths = [
        write_predictions(t, "test", range(60), p, tmp_path / str(i))
        for i, (t, p) in enumerate([(task, predictions), (reordered, 1 - predictions)])
    ]
    assert paths[0].read_text() == paths[1].read_text()
    assert reorder_labels(reordered, {}, task.labels)[0] == task


def test_other_words_are_refused():
    for task, order in ((TASKS["rte"], ["no", "yes"]), (TASKS["rte"], ["entailment"]), (TASKS["stsb"], [])):
        with pytest.raises(ValueError, match="the labels of"):
            reorder_labels(task, {}, order)
    assert reorder_labels(replace(TASKS["rte"]), {}, TASKS["rte"].labels) == (TASKS["rte"], {})
