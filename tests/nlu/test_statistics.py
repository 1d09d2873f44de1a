"""The statistics of the report, each against formulas or a library of its own."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.statistics import (
    Estimate,
    as_frame,
    estimate,
    finished,
    holm,
    load_measured,
    mean_of_medians,
    paired,
    percent,
    tuned_over,
    verdict,
)
from tests.nlu.measured_lines import line, trial, write


def test_one_task_is_the_paired_t_test(tmp_path):
    ours, theirs = np.array([0.50, 0.53, 0.49, 0.55]), np.array([0.48, 0.50, 0.50, 0.49])
    lines = [line("LoRA² k=8", "cola", seed, [0.1, score]) for seed, score in enumerate(ours)]
    lines += [line("LoRA r=8", "cola", seed, [0.9, score]) for seed, score in enumerate(theirs)]
    lines.append(line("LoRA r=8", "cola", 9, [0.9, 0.1]))  # a seed that only one of them has
    pairs = paired(load_measured(write(tmp_path, "trial", lines)), "LoRA² k=8", "LoRA r=8")
    result, test = estimate(pairs.difference, pairs.task), stats.ttest_rel(100 * ours, 100 * theirs)
    assert (result.count, result.mean) == (4, pytest.approx(test.statistic * result.error))
    assert result.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert result.p_value("higher") == pytest.approx(test.pvalue)
    differences = 100 * (ours - theirs)
    assert result.p_value("not lower") == pytest.approx(stats.ttest_1samp(differences, -0.5).pvalue)
    one_sided = {
        (bound, side): stats.ttest_1samp(differences, bound, alternative=side).pvalue
        for bound in (-0.5, 0.5)
        for side in ("greater", "less")
    }
    within = max(one_sided[-0.5, "greater"], one_sided[0.5, "less"])
    outside = min(one_sided[-0.5, "less"], one_sided[0.5, "greater"])
    assert result.p_value("level") == pytest.approx(min(1, 2 * min(within, outside)))


def test_tasks_are_strata():
    """A large difference between tasks is no uncertainty; two equal strata have Welch's degrees of freedom."""
    first, second = np.array([1.0, 2.0, 4.0]), np.array([51.0, 50.5, 50.0, 49.0])
    values = pd.Series([*first, *second])
    result = estimate(values, pd.Series(["a"] * 3 + ["b"] * 4))
    welch = stats.ttest_ind(first, -second, equal_var=False)  # the sum of the means, twice the mean of the tasks
    low, high = welch.confidence_interval(0.95)
    assert result.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert result.interval == pytest.approx((low / 2, high / 2))
    assert result.freedom == pytest.approx(welch.df)
    assert estimate(values, pd.Series(list("aaabbbc"))).interval is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.integers(1, 5))
def test_an_interval_holds_its_mean_whatever_the_last_bits(values, tasks):
    series = pd.Series(values * tasks)
    result = estimate(series, pd.Series([i // len(values) for i in range(len(series))]))
    if result.interval is None:  # equal values
        assert np.ptp(values) < 1e-6
        return
    low, high = result.interval
    assert low <= result.mean <= high and result.half_width >= 0
    assert all(0 <= result.p_value(expect) <= 1 for expect in ("higher", "not lower", "level"))


def test_one_lost_run_of_a_task_does_not_move_the_mean_of_its_medians():
    tasks = pd.Series(list("aaabb"))
    assert mean_of_medians(pd.Series([60.0, 62.0, 61.0, 80.0, 82.0]), tasks) == 71.0
    assert mean_of_medians(pd.Series([60.0, 62.0, 61.0, 80.0, 82.0]).replace(60.0, 0.0), tasks) == 71.0


def test_a_ratio_has_an_interval_of_ratios_and_what_is_unknown_does_not_count():
    logarithms = pd.Series(np.log([0.1, 0.5, 0.2, np.nan]))
    result = estimate(logarithms, pd.Series(["a"] * 4))
    low, high = stats.ttest_1samp(logarithms[:3], 0).confidence_interval(0.95)
    change = percent(result)
    assert (result.count, result.freedom) == (3, 2)
    assert change.mean == pytest.approx(100 * (stats.gmean([0.1, 0.5, 0.2]) - 1))
    assert change.interval == pytest.approx((100 * (np.exp(low) - 1), 100 * (np.exp(high) - 1)))
    assert change.interval[0] > -100 and estimate(logarithms[3:], pd.Series(["a"], index=[3])).interval is None


def test_values_that_all_tie_show_no_error():
    """Two seeds that agree by chance are no proof: without an error there is no interval, and no claim holds."""
    result = estimate(pd.Series([84.3] * 6), pd.Series(list("aaabbb")))
    assert (result.mean, result.count) == (pytest.approx(84.3), 6)
    assert result.interval is None and result.p_value("higher") is None
    assert verdict(result, "higher", result.p_value("higher")) == "not shown"
    one_task_ties = estimate(pd.Series([84.3, 84.3, 80.0, 82.0]), pd.Series(list("aabb")))
    assert one_task_ties.interval == pytest.approx(
        tuple(82.65 + side * stats.t.ppf(0.975, 1) * 0.5 for side in (-1, 1))
    )


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, None]) == [pytest.approx(0.06), None, None]  # claims without runs yet count
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([None]) == [None]


@pytest.mark.parametrize(
    ("mean", "error", "expect", "answer"),
    [
        (2.0, 0.5, "higher", "holds"),
        (-2.0, 0.5, "higher", "contradicted"),
        (0.3, 0.05, "higher", "level"),
        (0.3, 1.0, "higher", "not shown"),
        (0.1, 0.1, "level", "holds"),
        (2.0, 0.5, "level", "contradicted"),
        (0.1, 1.0, "level", "not shown"),
        (0.5, 0.3, "not lower", "holds"),
        (-2.0, 0.3, "not lower", "contradicted"),
        (-0.4, 0.3, "not lower", "not shown"),
        (2.0, None, "higher", "not shown"),
    ],
)
def test_verdicts(mean, error, expect, answer):
    result = Estimate(mean, error, None if error is None else 12.0, 15)
    assert verdict(result, expect, result.p_value(expect)) == answer


def test_a_claim_that_many_others_stand_beside_needs_a_smaller_p():
    result = Estimate(1.2, 0.5, 12.0, 15)
    p = result.p_value("higher")
    assert p < 0.05 and verdict(result, "higher", p) == "holds"
    assert verdict(result, "higher", holm([p] * 4)[0]) == "not shown"


def test_runs_are_read_in_the_order_of_methods_and_tasks(tmp_path):
    lines = trial(2)
    runs = load_measured(write(tmp_path, "trial", lines[::-1]))
    final = runs[runs.stage == "final"]
    assert list(dict.fromkeys(final.label)) == ["LoRA r=8", "LoRA r=1", "AdaLoRA", "LoRA² k=8", "LoRA² k=1"]
    assert list(final.task[:4]) == ["cola", "cola", "stsb", "stsb"] and list(final.seed[:2]) == [1, 2]
    first = final.iloc[0]
    assert first["last"] == pytest.approx(40.2) and first["best"] == pytest.approx(41.2)
    assert first["loss"] == pytest.approx(0.1 + 1 / 400) == first["lowest_loss"]


def test_the_score_of_a_task_with_two_columns_is_their_mean(tmp_path):
    both = {"step": [1], "loss": [0.5], "accuracy": [0.8], "accuracy_mm": [0.6]}
    matched = {"step": [1], "loss": [0.5], "accuracy": [0.8]}
    made = [line("LoRA r=8", "mnli", seed, [0.8], evaluations=e) for seed, e in enumerate((both, matched))]
    assert list(load_measured(write(tmp_path, "trial", made))["last"]) == pytest.approx([70, 80])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_measured(tmp_path / "absent")
    twice = [line("LoRA r=8", "cola", 1, [0.1], run=name) for name in "ab"]
    with pytest.raises(UsageError, match=r"trial.jsonl has LoRA r=8 on cola with seed 1 twice"):
        load_measured(write(tmp_path, "trial", twice))


@pytest.mark.parametrize("expect", ["higher", "not lower", "level"])
def test_a_contradiction_is_corrected_for_the_number_of_claims_too(expect):
    result = Estimate(-1.6, 0.45, 12.0, 15)
    p = result.p_value(expect)
    assert p < 0.05 and verdict(result, expect, p) == "contradicted"
    assert verdict(result, expect, holm([p] * 20)[0]) == "not shown"


def test_a_value_of_an_axis_is_chosen_by_the_last_loss_not_the_lowest(tmp_path):
    lines = []
    for rate, losses in (("low", [0.5, 0.5]), ("high", [0.1, 0.9])):
        for seed in (1, 2):
            axes = {"row": "a", "rate": rate, "task_name": "cola", "seed": seed}
            made = line(f"a, {rate}", "cola", seed, [0.3, 0.4], axes=axes, run=f"{rate}-{seed}", tried={})
            made["evaluations"]["loss"] = losses
            lines.append(made)
    chosen = finished(tuned_over(load_measured(write(tmp_path, "trial", lines)), "rate"))
    assert {axes["rate"] for axes in chosen["axes"]} == {"low"}


def tuned(tmp_path, lines):
    """What a question about the axis ``variant`` gets: the settings of each tuning run, and the chosen variants."""
    runs = tuned_over(load_measured(write(tmp_path, "trial", lines)), "variant")
    select = runs[runs.stage == "select"]
    return list(select.tried), {axes["variant"] for axes in finished(runs)["axes"]}


def variant(name, seed, loss, **asked):
    axes = {"method": "lora", "variant": name, "task_name": "cola", "seed": seed}
    made = line(f"LoRA, variant={name}", "cola", seed, [0.4, 0.5], tried={}, axes=axes, run=f"{name}-{seed}")
    made["asked"] = {"method": "lora", "task_name": "cola", "seed": seed, **asked}
    made["evaluations"]["loss"] = [1.0, loss]
    return made


def test_labels_of_an_axis_may_set_different_flags_or_none(tmp_path):
    flags = {"usual": {}, "wide": {"lora_alpha": 32}, "deep": {"lora_r": 16}}
    losses = {"usual": 0.3, "wide": 0.1, "deep": 0.6}
    tried, chosen = tuned(tmp_path, [variant(v, s, losses[v], **flags[v]) for v in flags for s in (1, 2)])
    assert chosen == {"wide"} and sorted(map(str, tried)) == sorted(2 * list(map(str, flags.values())))


def test_null_is_a_value_of_an_axis(tmp_path):
    lines = [variant(v, s, loss, value_lr_ratio=v) for v, loss in ((None, 0.1), (4, 0.4), (8, 0.3)) for s in (1, 2)]
    assert tuned(tmp_path, lines)[1] == {None}


def test_what_goes_with_a_seed_is_not_tried(tmp_path):
    lines = [variant(v, s, 0.1 * v, value_lr_ratio=v, data_seed=10 + s) for v in (4, 8) for s in (1, 2)]
    tried, chosen = tuned(tmp_path, lines)
    assert chosen == {4} and {tuple(each) for each in tried} == {("value_lr_ratio",)}


def test_the_test_score_is_of_the_task_s_own_test_sets():
    scores = {"MNLI-m": {"accuracy": 0.7}, "MNLI-mm": {"accuracy": 0.72}, "AX": {"accuracy": 0.3}}
    own = line("LoRA r=8", "custom", 1, [0.5], test_scores={"custom_test": {"accuracy": 0.6}}, metric="accuracy")
    frame = as_frame([("a", line("LoRA r=8", "mnli", 1, [0.5], test_scores=scores)), ("a", own)])
    assert sorted(frame.test) == pytest.approx([60, 71])
