"""The statistics of the report, each checked against a formula or SciPy."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from nlu.errors import UsageError
from nlu.experiments.statistics import (
    FREEDOM,
    Estimate,
    as_frame,
    estimate,
    fitted_difference,
    holm,
    load_measured,
    paired,
    seeds_for,
    student_t,
    with_reruns,
)
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
    assert result.p_value("higher") == pytest.approx(test.pvalue)
    assert result.p_value("not lower") == pytest.approx(stats.ttest_1samp(differences, -0.5).pvalue)
    one_sided = {
        (bound, side): stats.ttest_1samp(differences, bound, alternative=side).pvalue
        for bound in (-0.5, 0.5)
        for side in ("greater", "less")
    }
    within = max(one_sided[-0.5, "greater"], one_sided[0.5, "less"])
    outside = min(one_sided[-0.5, "less"], one_sided[0.5, "greater"])
    assert result.p_value("level") == pytest.approx(min(1, 2 * min(within, outside)))


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


def test_student_t_maximises_the_likelihood_and_a_failed_run_has_little_weight():
    scores = {"LoRA r=8": [0.50, 0.52, 0.49, 0.51, 0.10], "LoRA² k=8": [0.53, 0.55, 0.51, 0.54, 0.52]}
    runs = frame_of({(name, "cola"): own for name, own in scores.items()})
    fit = student_t(runs)
    values = 100 * np.array(list(scores.values()))

    def loss(centres):  # at the scale of the fit
        scale = (5 * fit.variance.iloc[0] * (FREEDOM + 1) / (FREEDOM + 3)) ** 0.5
        return -stats.t.logpdf(values, FREEDOM, np.array(centres)[:, None], scale).sum()

    best = optimize.minimize(loss, np.median(values, axis=1)).x
    assert list(fit.centre) == pytest.approx(list(best), abs=1e-3) and list(fit.freedom) == [10 - 2] * 2
    result = fitted_difference(fit, "LoRA² k=8", "LoRA r=8", ["cola"])
    normal = (2 * np.var(values, axis=1, ddof=1).mean() / 5) ** 0.5
    assert result.mean == pytest.approx(2.5, abs=0.3) and result.error < normal / 3
    assert student_t(runs[runs.seed == 1]) is None


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    unknown = holm([0.02, np.nan, np.nan])  # claims without runs count too
    assert unknown == pytest.approx([0.06, np.nan, np.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_seeds_for_gives_a_power_of_eighty_percent():
    pairs = pd.DataFrame({"task": list("aaabbb"), "difference": [7.0, 8.0, 9.0, 0.0, 0.0, 150.0**0.5]})
    n = seeds_for(6.0, pairs)
    freedom = (1 + 50) ** 2 / (1**2 + 50**2) * (n - 1)  # Welch and Satterthwaite; the tasks' variances are 1 and 50
    power = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, 6 / ((1 + 50) / 4 / n) ** 0.5)
    assert 0.78 < power < 0.84
    assert seeds_for(1.0, pairs[:4]) is None and seeds_for(1.0, pairs[:0]) is None  # a single pair of b, and none


@pytest.mark.parametrize(
    ("mean", "error", "expect", "answer"),
    [
        (2.0, 0.5, "higher", "holds"),
        (-2.0, 0.5, "higher", "contradicted"),
        (0.1, 0.1, "higher", "no gain of 0.5"),
        (0.3, 1.0, "higher", "not shown"),
        (0.1, 0.1, "level", "holds"),
        (-2.0, 0.5, "level", "contradicted"),
        (0.5, 0.3, "not lower", "holds"),
        (-0.4, 0.3, "not lower", "not shown"),
        (2.0, np.nan, "higher", "not shown"),
    ],
)
def test_verdict_of_a_claim(mean, error, expect, answer):
    result = Estimate(mean, error, 12.0)
    assert result.verdict(expect, result.p_value(expect)) == answer


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


def test_rerun_gives_its_score_to_the_seed_of_the_failed_run():
    def run(label, seed, score, loss):
        return line(label, "cola", seed, [score], training_loss=[loss], constant_loss=0.6)

    scores = [(1, 0.5, 0.3), (2, 0.0, 0.6), (102, 0.52, 0.3)]
    planned = as_frame([run("LoRA r=8", *each) for each in scores] + [run("LoRA² k=8", s, 0.5, 0.3) for s in (1, 2)])
    assert set(planned.seed) == {1, 2, 102} and not planned.rerun.any()  # where reruns are not part of the protocol
    runs = with_reruns(planned)
    assert list(runs[runs.failed].seed) == [2]  # it counts as failed, and keeps its rerun's score
    pairs = paired(runs, "LoRA r=8", "LoRA² k=8")
    assert dict(zip(pairs.seed, pairs.difference, strict=True)) == {1: 0.0, 2: 2.0}


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


def test_both_estimates_leave_out_a_task_whose_data_differ():
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
    row = score_frame(as_frame(lines), ["LoRA r=8"]).iloc[1]
    assert [row.difference, row.t_difference] == pytest.approx([2, 2])


def test_row_that_lacks_a_task_has_no_average():
    runs = frame_of({("LoRA r=8", "cola"): [0.5], ("LoRA r=8", "rte"): [0.6], ("LoRA² k=8", "cola"): [0.7]})
    assert list(score_frame(runs).average.fillna(0)) == pytest.approx([55, 0])


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_equal_runs_are_refused(status, tmp_path):
    run = line("LoRA", "cola", 1, [0.1])
    with pytest.raises(UsageError, match=r"a.jsonl: LoRA on cola with seed 1 is there twice"):
        load_measured(write(tmp_path, "a", [run, run | {"run": "another", "status": status}]))


def test_seeds_with_other_settings_or_data_are_not_averaged():
    def labels(*changes):
        return list(as_frame(line("LoRA", "cola", i, [0.1], **each) for i, each in enumerate(changes)).label)

    rates = [{"arguments": {"learning_rate": rate, "seed": rate}} for rate in (1, 2)]
    for status in ("finished", "failed"):
        assert labels(rates[0], rates[1] | {"status": status}) == ["LoRA, learning_rate=1", "LoRA, learning_rate=2"]
    for name in ("glue_dir", "model_name_or_path", "lora_path", "peft_config"):
        assert len(set(labels({"digests": {name: "a"}}, {"digests": {name: "b"}}))) == 2
    assert labels({}, {"model_commit": "c0ffee"}) == ["LoRA, model_commit=None", "LoRA, model_commit=c0ffee"]
    assert len(set(labels({"effective_batch_size": 8}, {"effective_batch_size": 32}))) == 2
    assert labels({"arguments": {"lora_r": 4}}, {"arguments": {}}) == ["LoRA, lora_r=4", "LoRA, lora_r=8"]
    assert labels({"arguments": {"logging_steps": 5}}, {"arguments": {"report_to": ["wandb"]}}) == ["LoRA"] * 2
