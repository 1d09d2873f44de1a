"""The statistics of the report, each checked against a formula or SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.statistics import as_frame, estimate, load_measured, paired
from nlu.experiments.tables import score_frame
from tests.nlu.measured_lines import line, write


def frame_of(scores):
    """Runs of (label, task) → scores, one for each seed."""
    return as_frame(
        line(label, task, seed, [0.1, score])
        for (label, task), own in scores.items()
        for seed, score in enumerate(own, 1)
    )


def test_estimate_of_one_task_is_the_paired_t_test():
    ours, theirs = [0.50, 0.53, 0.49, 0.55], [0.48, 0.50, 0.50, 0.49, 0.1]  # the last seed has no partner
    runs = frame_of({("LoRA² k=8", "cola"): ours, ("LoRA r=8", "cola"): theirs})
    pairs = paired(runs, "LoRA² k=8", "LoRA r=8")
    differences = 100 * (np.array(ours) - theirs[:4])
    result, test = estimate(pairs), stats.ttest_1samp(differences, 0)
    assert result.mean == pytest.approx(differences.mean())
    assert result.interval == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_estimate_adds_the_variances_of_tasks_as_welch_does():
    first, second = np.array([1.0, 2.0, 4.0]), np.array([51.0, 50.5, 50.0, 49.0])
    pairs = pd.DataFrame({"difference": [*first, *second], "task": list("aaabbbb")})
    result = estimate(pairs)
    welch = stats.ttest_ind(first, -second, equal_var=False)  # of the sum of the means: twice the mean of the tasks
    low, high = welch.confidence_interval(0.95)
    assert result.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert result.interval == pytest.approx((low / 2, high / 2))
    assert result.freedom == pytest.approx(welch.df)
    for unknown in (pairs.assign(task=list("aaabbbc")), pairs.assign(difference=84.3)):  # a single value, and ties
        assert np.isnan(estimate(unknown).interval).all()


def test_failed_runs_are_found_by_training_loss_and_not_by_score():
    constant = {"constant_loss": 0.6}
    losses = {
        "learned": {"training_loss": [0.61] * 18 + [0.5, 0.6]},
        "failed": {"training_loss": [0.3] * 18 + [0.57, 0.58]},  # over 0.95 of 0.6
        "old": {"evaluations": {"step": [1, 2], "loss": [0.61, 0.595], "matthews_correlation": [0.1, 0.9]}},
        "unknown": {"constant_loss": None},
    }
    runs = as_frame(line(name, "cola", 1, [0.1, 0.9], **{**constant, **own}) for name, own in losses.items())
    assert set(runs[runs.failed].label) == {"failed", "old"}
    (right,) = as_frame([line("all right", "cola", 1, [0.9, 1.0], **constant, **losses["failed"])]).failed
    assert not right  # a short training may still have a high loss


def test_score_is_that_of_the_weights_that_the_run_kept_on_mnlis_matched_set():
    both = {"step": [1, 2], "loss": [0.5, 0.4], "accuracy": [0.8, 0.7], "mismatched_accuracy": [0.6, 0.5]}
    early = {"step": [1], "loss": [0.5], "accuracy": [0.8], "accuracy_mm": [0.6]}  # of 1,000 rows
    runs = as_frame(line("LoRA", "mnli", i, [0.8], evaluations=e, weights_step=1) for i, e in enumerate((both, early)))
    assert list(runs["last"]) == [80, 80] and list(runs.mismatched_accuracy.fillna(0)) == [60, 0]
    assert list(runs.loss) == [0.5, 0.5]


def test_the_test_score_is_of_the_tasks_own_test_set():
    scores = {"MNLI-m": {"accuracy": 0.7}, "MNLI-mm": {"accuracy": 0.72}, "AX": {"accuracy": 0.3}}
    own = line("LoRA r=8", "custom", 1, [0.5], test_scores={"custom_test": {"accuracy": 0.6}}, metric="accuracy")
    frame = as_frame([line("LoRA r=8", "mnli", 1, [0.5], test_scores=scores), own])
    assert sorted(frame.test) == pytest.approx([60, 70])


def test_no_difference_on_a_task_whose_data_differ_nor_over_all_tasks():
    """Two methods' configurations may differ."""

    def run(label, task, seed, score):
        digests = {"glue_dir": label if task == "rte" else "", "peft_config": label}
        return line(label, task, seed, [score + seed / 100], digests=digests)

    lines = [
        run(label, task, seed, score)
        for label, cola, rte in (("LoRA r=8", 0.4, 0.5), ("LoRA² k=8", 0.42, 0.9))
        for task, score in (("cola", cola), ("rte", rte))
        for seed in (1, 2, 3)
    ]
    table = score_frame(as_frame(lines), ["LoRA r=8"]).set_index(["row", "task"]).difference["LoRA² k=8"]
    assert table["cola"] == pytest.approx(2) and np.isnan(table[["rte", "all tasks"]]).all()


def test_row_that_lacks_a_task_has_no_average():
    runs = frame_of({("LoRA r=8", "cola"): [0.5], ("LoRA r=8", "rte"): [0.6], ("LoRA² k=8", "cola"): [0.7]})
    table = score_frame(runs).set_index("task").score["all tasks"]
    assert list(table.fillna(0)) == pytest.approx([55, 0])


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_equal_runs_are_refused(status, tmp_path):
    run = line("LoRA", "cola", 1, [0.1])
    with pytest.raises(UsageError, match=r"a.jsonl: LoRA on cola with seed 1 is there twice"):
        load_measured(write(tmp_path, "a", [run, run | {"run": "another", "status": status}]))


def test_seeds_with_other_settings_or_data_are_not_averaged():
    def labels(*changes):
        return list(as_frame(line("LoRA", "cola", i, [0.1], **each) for i, each in enumerate(changes)).label)

    rates = [{"arguments": {"learning_rate": rate}} for rate in (1, 2)]
    for status in ("finished", "failed"):
        assert labels(rates[0], rates[1] | {"status": status}) == ["LoRA, learning_rate=1", "LoRA, learning_rate=2"]
    for name in ("glue_dir", "model_name_or_path", "lora_path", "peft_config", "lora_k"):
        digests = [{"digests": {name: letter * 64}} for letter in "ab"]
        assert labels(*digests) == [f"LoRA, contents of {name}={letter * 8}" for letter in "ab"]
    assert labels({}, {"model_commit": "c0ffee"}) == ["LoRA, model_commit=None", "LoRA, model_commit=c0ffee"]
    assert len(set(labels({"effective_batch_size": 8}, {"effective_batch_size": 32}))) == 2
    assert labels({"arguments": {"lora_r": 4}}, {"arguments": {}}) == ["LoRA, lora_r=4", "LoRA, lora_r=8"]
    assert labels({"arguments": {"logging_steps": 5}}, {"arguments": {"report_to": ["wandb"]}}) == ["LoRA"] * 2
