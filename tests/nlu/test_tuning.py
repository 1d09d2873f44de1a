"""Tuning: how rates are chosen from lines, and experiments with a section `tune` on a stand-in for run_glue."""

import re

import pandas as pd
import pytest

from nlu.experiments.lines import read_plan, write_line
from nlu.experiments.statistics import as_frame
from nlu.experiments.tuning import beyond, choose_rates, tuning_frame
from tests.nlu.measured_lines import line
from tests.nlu.sweeps import lines_of


def test_choose_rates_takes_the_highest_mean_z_score_of_the_rates_at_which_no_run_failed():
    rows = []
    for row, scores in (
        ("a", {1e-3: (50, 60), 2e-3: (52, 64), 4e-3: (90, 70)}),
        ("b", {1e-3: (40, 50), 2e-3: (45, 50)}),
    ):
        for value, own in scores.items():
            rows += [
                {"row": row, "value": value, "task": task, "last": score, "failed": score == 70}
                for task, score in zip(("cola", "rte"), own, strict=True)
            ]
    runs = pd.DataFrame(rows)
    table = choose_rates(runs).set_index(["row", "value"])
    assert list(table.index[table.discarded]) == [("a", 4e-3)]
    assert list(table.index[table.chosen]) == [("a", 2e-3), ("b", 2e-3)]
    cola = runs[runs.task == "cola"]["last"]
    rte = runs[runs.task == "rte"]["last"]
    expected = ((45 - cola.mean()) / cola.std() + (50 - rte.mean()) / rte.std()) / 2
    assert table.z["b", 2e-3] == pytest.approx(expected)
    strict = choose_rates(runs, lambda table: table.failed | (table.value == 2e-3))  # a rule of one's own
    assert list(strict.value[strict.chosen]) == [1e-3, 1e-3]
    every = choose_rates(runs.assign(failed=runs.task == "rte"))  # each rate: the best scores decide
    assert every.discarded.all() and list(every.value[every.chosen]) == [4e-3, 2e-3]
    assert not choose_rates(runs.assign(failed=True)).chosen.any()
    crashed = runs["last"].mask((runs.value >= 2e-3) & (runs.task == "rte"))  # a mean of the other task is no score
    partial = choose_rates(runs.assign(last=crashed, failed=runs.task == "rte"))
    assert list(partial.value[partial.chosen]) == [1e-3, 1e-3]
    equal = choose_rates(runs.assign(last=50.0, failed=False))  # the lowest of equally good rates
    assert list(equal.value[equal.chosen]) == [1e-3, 1e-3]


def tried(label, rate, score, **changes):
    """A tuning run that has learned nothing."""
    same = {"axes": {"learning_rate": rate}, "arguments": {"learning_rate": rate, "holdout_fraction": 0.1}}
    name = f"{label}, learning_rate={rate}"
    return line(name, "rte", 101, [score], run=name, **same | {"training_loss": [0.7], "constant_loss": 0.7} | changes)


def test_a_row_whose_every_run_failed_has_no_rate_and_its_grid_grows_at_both_ends():
    """Nobody knows whether its rates were too low or too high. A run that crashed has no score, and says neither."""

    def found(lines):
        table = tuning_frame(as_frame(lines), {})
        return dict(table[table.chosen].set_index("row").value), beyond(table)

    crashed = {"status": "failed", "evaluations": None, "last": None}
    lines = [tried("adalora", rate, 0.0, **crashed) for rate in (1e-3, 2e-3)]
    lines += [tried("lora", 1e-3, 0.5), tried("lora", 2e-3, 0.53)]
    assert found(lines) == ({}, {"lora": (1e-3, 2e-3, 5e-4, 4e-3)})
    lines.append(tried("lora", 4e-3, 0.0, **crashed))
    assert found(lines) == ({}, {"lora": (1e-3, 2e-3, 4e-3, 5e-4, 8e-3)})
    lines.append(tried("lora", 5e-4, 0.4, training_loss=[0.1]))
    assert found(lines) == ({"lora": 5e-4}, {"lora": (5e-4, 1e-3, 2e-3, 4e-3, 2.5e-4)})
    lines.append(tried("lora", 2.5e-4, 0.3, training_loss=[0.1]))
    assert found(lines) == ({"lora": 5e-4}, {})
    close = [tried("lora", rate, rate, training_loss=[0.1]) for rate in (1e-3, 1.0004e-3)]  # the next rounds to 1e-3
    assert found(close) == ({"lora": 1.0004e-3}, {})


# ---- experiments with a section `tune`; the stand-in's score is highest at 2e-3 --------------------------------------

BASE = {"model_name_or_path": "/models/encoder", "max_steps": 100, "warmup_steps": 10}
GRID = {"method": ["lora", "lora2", "full"], "task_name": ["cola", "rte"], "seed": [1, 2]}
TUNE = {"learning_rate": {"lora": [5e-4, 1e-3], "lora2": [5e-4, 1e-3]}, "extend": 3}
TRIAL = {"name": "trial", "base": BASE, "grid": GRID, "tune": TUNE}


def rates_of(lines):
    return {(line["method"], line["task"]): line["arguments"]["learning_rate"] for line in lines.values()}


def test_a_sweep_tunes_on_held_out_rows_extends_the_grid_and_runs_the_finals_with_the_chosen_rates(run_sweep, tmp_path):
    base = BASE | {"do_predict": True}
    code, out, _ = run_sweep(TRIAL | {"base": base})
    assert code == 0 and "tuning: LoRA: learning rate 0.0005, 0.001, 0.002 (chosen), 0.004\n" in out
    tried = lines_of(tmp_path, "trial_tuning")
    assert len(tried) == 2 * 2 * 4  # methods, tasks, rates: 2e-3 and 4e-3 were added
    own = {"max_steps": 50, "schedule_steps": 100, "holdout_fraction": 0.1, "seed": 101}  # half of the warm-up too
    assert all(own.items() <= line["arguments"].items() for line in tried.values())
    assert not any("do_predict" in line["arguments"] for line in tried.values())
    finals = lines_of(tmp_path)
    assert len(finals) == 12 and {line["arguments"]["max_steps"] for line in finals.values()} == {100}
    assert rates_of(finals) == {
        (m, t): rate for m, rate in (("lora", 2e-3), ("lora2", 2e-3), ("full", 2e-5)) for t in ("cola", "rte")
    }
    again = run_sweep(TRIAL | {"base": base})[1]
    assert again.count("0 run(s) finished now, 0 failed") == 4  # three rounds of the tuning and the finals


def test_a_dry_run_shows_states_and_what_the_experiment_costs(run_sweep, tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\n" + "text,1\n" * 100)
    base = BASE | {"total_batch_size": 32, "train_file": str(tmp_path / "train.csv"), "max_steps": -1}
    base |= {"num_train_epochs": 5, "validation_file": base["train_file"]}
    content = {"name": "trial", "base": base, "grid": GRID | {"task_name": [None]}, "tune": TUNE}
    out = run_sweep(content, "--dry_run")[1]
    assert re.findall(r"^(\w[\w ]+?)  +\S+seed", out, re.M) == ["to do"] * 4 + ["to do"] * 2 + ["waits"] * 4
    # 100 rows in steps of 32; 90 of them for half as long in the tuning
    table = [line.split("  ") for line in re.sub("  +", "  ", out).splitlines()[-5:]]
    assert table == [
        ["row", "runs", "steps", "rows", "learning rate"],
        ["LoRA", "4", f"{2 * 8 + 2 * 20}", "1,792", "tuned: one of 0.0005, 0.001"],
        ["LoRA²", "4", "56", "1,792", "tuned: one of 0.0005, 0.001"],
        ["full fine-tuning", "2", "40", "1,280", "2e-05 (configs/methods/full.yaml)"],
        ["in total", "10", "152", "4,864"],
    ]
    assert not (tmp_path / "output").exists() and not (tmp_path / "measured").exists()


def test_runs_chosen_by_only_have_the_rate_of_all_tasks_that_share_it_and_the_plan_stays_whole(run_sweep, tmp_path):
    content = TRIAL | {"tune": TUNE | {"extend": 0}}
    assert run_sweep(content, "--only", "lora-cola")[0] == 0
    assert {*rates_of(lines_of(tmp_path, "trial_tuning"))} == {("lora", "cola"), ("lora", "rte")}
    assert rates_of(lines_of(tmp_path)) == {("lora", "cola"): 1e-3}
    assert len(read_plan(tmp_path / "measured/trial.jsonl")) == 12
    assert run_sweep(content)[0] == 0
    name, tuned = "lora-cola-learning_rate=0.0005-seed=101", lines_of(tmp_path, "trial_tuning")
    best = tuned[name.replace("0.0005", "0.001")]["last"] + 1e-4  # of CoLA alone, by less than on RTE
    changed = tuned[name] | {"last": best, "evaluations": {"step": [10], "loss": [0.5], "accuracy": [best]}}
    write_line(tmp_path / "measured/trial_tuning.jsonl", name, changed)
    for flags in ([], ["--only", "lora-cola"]):
        assert run_sweep(content, *flags)[1].count("0 run(s) finished now, 0 failed") == 2


def test_a_changed_grid_or_rule_is_refused_only_where_it_changes_a_rate(run_sweep, tmp_path):
    wider = {method: [2.5e-4, *rates] for method, rates in TUNE["learning_rate"].items()}
    assert run_sweep(TRIAL | {"tune": TUNE | {"extend": 0}})[0] == 0
    assert run_sweep(TRIAL | {"tune": TUNE | {"extend": 0, "learning_rate": wider}})[0] == 0
    code, _, err = run_sweep(TRIAL)
    assert code == 2 and "(learning_rate 0.001 → 0.002); pass --rerun_changed" in err
    code, _, err = run_sweep(TRIAL | {"tune": TUNE | {"share_of_steps": 0.25}})
    assert code == 2 and "(max_steps 50 → 25)" in err


def test_a_row_whose_tuning_failed_has_no_finals_and_a_task_can_have_a_rate_of_its_own(run_sweep, tmp_path):
    """LoRA is killed on RTE at 2e-3, so that no run of it has an end there."""
    rates = {"lora": [1e-3, 2e-3], "lora2": [1e-3, 2e-3]}
    killed = {"when": {"method": "lora", "task_name": "rte"}, "set": {"weight_decay": 3}}
    content = TRIAL | {"tune": {"learning_rate": rates}, "overrides": [killed]}
    code, out, _ = run_sweep(content)
    assert code == 1 and "tuning: No learning rate for LoRA: runs of the tuning have not ended, or all failed" in out
    assert {method for method, _ in rates_of(lines_of(tmp_path))} == {"lora2", "full"}
    content["tune"]["one_rate_for"] = "row_and_task"
    out = run_sweep(content)[1]
    assert "tuning: No learning rate for LoRA on RTE: " in out
    assert "tuning: LoRA on CoLA: learning rate 0.001, 0.002 (chosen, an end of the grid)" in out
    assert rates_of(lines_of(tmp_path))[("lora", "cola")] == 2e-3


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"learning_rate": [1e-3], "one_rate_for": "task"}, "one_rate_for must be row or row_and_task"),
        ({"learning_rate": {"lora": [1e-3]}}, "no learning rate is known for lora2"),  # it is not tuned then
        ({"learning_rate": {"lora": [1e-3], "cola": [2e-3]}}, "must name one label of lora, cola, 1"),
        ({"learning_rate": {"sora": [1e-3]}}, "names sora, which the grid does not have"),
        ({"learning_rate": [1e-3, "high"]}, "could not convert string to float: 'high'; the format is explained"),
        ({"learning_rate": [1e-3], "steps": 5}, "the format is explained at the top of"),
    ],
)
def test_a_faulty_section_is_refused_before_anything_starts(run_sweep, tmp_path, tune, message):
    code, out, err = run_sweep(TRIAL | {"tune": tune})
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    code, _, err = run_sweep(TRIAL, "--set", "learning_rate=1e-3")
    assert code == 2 and "tune sets learning_rate and holdout_fraction itself" in err
    assert not (tmp_path / "output").exists()
