"""nlu compare: its plan, its warnings, its table and its errors."""

import itertools
import re
import sys

import pandas as pd
import pytest

from nlu import compare
from nlu.experiments.figures import Drawing
from nlu.experiments.lines import read_lines
from tests.nlu import sweeps


@pytest.fixture
def call(tmp_path, encoder, tiny_glue, monkeypatch, capsys):
    """Call the program on the tiny task with a stand-in for run_glue; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(compare, "RUN_GLUE", [sys.executable, sweeps.__file__])
    monkeypatch.setattr(Drawing, "png", lambda _: b"")
    sweeps.without_processes(monkeypatch)

    def run(*flags):
        places = ["--model_name_or_path", str(encoder), "--glue_dir", str(tiny_glue), "--output_dir", str(tmp_path)]
        return (compare.main(["--task_name", "cola", *places, *flags]), *capsys.readouterr())

    return run


def test_every_method_has_runs_and_a_row_and_the_same_command_repeats_nothing(call, tmp_path):
    flags = ["--methods", "lora2,lora", "--seeds", "2", "--lora_alpha", "32", "--learning_rate", "1e-3"]
    code, out, _ = call(*flags)
    assert code == 0 and "4 run(s) finished now" in out
    table = (tmp_path / "compare-cola/report.md").read_text()
    assert out[out.index("## compare-cola") :] in table and re.findall(r"^\| (LoRA\S*) ", table, re.MULTILINE) == [
        "LoRA",
        "LoRA²",
    ]
    assert re.search(r"\| +CoLA \|", table) and "## compare-cola\n\nAll runs score 69.3: " in table
    lines = read_lines(tmp_path / "measured/compare-cola.jsonl").values()
    assert {(each["method"], each["seed"]) for each in lines} == set(itertools.product(("lora", "lora2"), (1, 2)))
    assert {(each["arguments"]["lora_alpha"], each["arguments"]["eval_strategy"]) for each in lines} == {(32, "epoch")}
    assert "0 run(s) finished now" in call(*flags)[1] and "minus LoRA " in table
    assert "minus LoRA² " in call(*flags, "--reference", "lora2")[1]
    assert "1 run(s) finished now" in call(*flags[:1], "lora,lora2,adalora", "--seeds", "1", *flags[4:])[1]
    figures = pd.read_csv(tmp_path / "compare-cola/tables/scores.csv")
    assert set(figures.row) == {"LoRA", "LoRA²", "AdaLoRA"} and set(figures.runs) == {1}  # of the last command
    assert list(figures.scale) == [4] * 6  # for the task and for all tasks


def test_lines_of_other_runs_and_experiments_neither_rename_a_row_nor_stop_the_report(call, tmp_path):
    """Those of seeds that are no longer asked for have another clipping; somebody else's file is damaged."""
    other = "lora:lora_r=4:lora_alpha=8"
    flags = ["--methods", f"lora,{other}", "--learning_rate", "1e-3"]
    assert call(*flags, "--seeds", "2")[0] == 0
    (tmp_path / "measured/minilm.jsonl").write_text("{")
    code, out, _ = call(*flags, "--seeds", "1", "--max_grad_norm", "2", "--rerun_changed", "--reference", other)
    assert code == 0 and "minus LoRA, lora_r=4, lora_alpha=8 (95 %" in out and "max_grad_norm" not in out


def test_method_whose_runs_failed_has_no_score_and_the_exit_code_is_1(call, tmp_path):
    methods = "lora2:lora_alpha=64,lora:weight_decay=1"
    code, out, err = call("--methods", methods, "--seeds", "2", "--learning_rate", "1e-3")
    assert code == 1 and "failed: lora_weight_decay=1-seed=1: " in err
    assert re.search(r"^\| LoRA, weight_decay=1 +\| +– \| +– \| +0 of 2 \| +– \|", out, re.MULTILINE)
    assert "- 2 of 4 runs ended early and have no score: LoRA, weight_decay=1 on CoLA." in out
    assert "warning: α/r differs between rows, so equal learning rates are not equal steps (CoLA: LoRA², " in err


@pytest.mark.slow
def test_tuning_chooses_each_methods_rate_by_its_held_out_score(call, tmp_path):
    """The stand-in's score is highest at 2e-3. A method whose rates all fail has no final runs."""
    code, shown, _ = call("--methods", "lora,lora2:weight_decay=1", "--seeds", "2", "--tune")
    assert code == 1 and "- No learning rate for LoRA², weight_decay=1: " in shown
    assert "tuning: LoRA: learning rate 0.0003, 0.001, 0.003 (chosen, an end of the grid)\n" in shown
    final = [each["arguments"] for each in read_lines(tmp_path / "measured/compare-cola.jsonl").values()]
    assert [(each["learning_rate"], each.get("holdout_fraction")) for each in final] == [(3e-3, None)] * 2
    held_out = [each["arguments"] for each in read_lines(tmp_path / "measured/compare-cola_tuning.jsonl").values()]
    assert {(each["seed"], each["holdout_fraction"]) for each in held_out} == {(101, 0.1)} and len(held_out) == 6
    assert (tmp_path / "compare-cola/figures/compare-cola_rates.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lora2,lora:task_name=mrpc"], "give --task_name for all methods"),
        (
            ["--methods", "full,lora"],
            "no learning rate is known for lora: give --learning_rate, or tune it (compare.py --tune)",
        ),
        (["--methods", "lora", "--tune", "--learning_rate", "1"], "--tune sets --learning_rate itself"),
        (["--methods", "lora2,lora", "--reference", "full"], "--reference full is none of --methods: lora2, lora"),
        (["--methods", "lora,query,value", "--learning_rate", "1"], "unknown method 'query'"),
        (["--methods", "lora", "--task_name", "mrpc,stsb"], "invalid choice: 'mrpc,stsb'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line_before_any_run(call, tmp_path, flags, message):
    code, out, err = call(*flags)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "compare-cola").exists()


def test_a_page_that_is_not_a_report_is_refused_before_any_run(call, tmp_path):
    page = tmp_path / "compare-cola/report.md"
    page.parent.mkdir()
    page.write_text("# Mine\n")
    code, _, err = call("--methods", "lora", "--learning_rate", "1")
    assert code == 2 and "is not of this program and would be replaced" in err and page.read_text() == "# Mine\n"
    assert not (tmp_path / "measured").exists()


def planned(words):
    args, rest = compare.own_parser().parse_known_args(words.split())
    experiment = compare.plan(args, compare.flag_values(rest))
    return experiment, {run.axes["method"]: run for run in experiment.runs}


def test_plan_splits_methods_and_their_flags_and_evaluates_every_eval_steps_if_they_are_given():
    methods = "lora2:lora_k=match:lora:lora_r=4,lora:lora_module=query,value,full"
    _, rows = planned(f"--methods {methods} --task_name cola --model_name_or_path base --eval_steps 5")
    own_rate, _ = planned("--methods lora:learning_rate=1e-3 --task_name cola --seeds 1")
    assert [*own_rate.plan.values()] == ["LoRA, learning_rate=1e-3"]  # its row in the tables
    assert list(rows) == ["lora2:lora_k=match:lora:lora_r=4", "lora:lora_module=query,value", "full"]
    expected = {"method": "lora2", "lora_k": "match:lora", "lora_r": 4, "eval_strategy": "steps"}
    own, other = (run.arguments for run in [*rows.values()][:2])
    assert expected.items() <= own.items() and other["lora_module"] == "query,value"


def test_plan_tunes_on_the_held_out_fraction_given_and_around_the_rate_of_a_methods_file():
    experiment, rows = planned("--methods lora,full --task_name cola --tune --holdout_fraction 0.3")
    assert experiment.tune.holdout_fraction == 0.3 and "holdout_fraction" not in rows["full"].arguments
    assert rows["lora"].rates == (3e-4, 1e-3, 3e-3) and rows["full"].rates == (6.67e-6, 2e-5, 6e-5)
    assert {run.rates for run in planned("--methods lora,full --task_name cola --tune 1e-3")[0].runs} == {(1e-3,)}
