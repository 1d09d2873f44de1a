"""The comparison: its plan, its warnings against sizes worked out by hand, its table, and its refusals."""

import itertools
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats
from transformers import AutoConfig

from nlu import compare
from nlu.experiments.records import read_lines, settings_of
from nlu.experiments.statistics import as_frame, finished, load_measured
from nlu.experiments.tables import comparison_table
from tests.nlu.measured_lines import line, write
from tests.nlu.tiny import DEBERTA_BASE, make_encoder

FAKE = Path(__file__).with_name("fake_run_glue.py")


@pytest.fixture
def call(tmp_path, encoder, tiny_glue, monkeypatch, capsys):
    """Call the program on the tiny task with a stand-in for run_glue; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(compare, "COMMAND", [sys.executable, str(FAKE)])

    def run(*flags):
        places = ["--model_name_or_path", str(encoder), "--glue_dir", str(tiny_glue), "--output_dir", str(tmp_path)]
        return (compare.main(["--task_name", "cola", *places, *flags]), *capsys.readouterr())

    return run


def test_every_method_has_its_runs_a_row_and_figures_and_the_same_command_goes_on(call, tmp_path):
    flags = ["--methods", "lora2,lora", "--seeds", "2", "--lora_alpha", "8"]
    code, out, _ = call(*flags)
    assert code == 0 and "4 run(s) finished now, 0 before" in out
    table = (tmp_path / "compare-cola/comparison.md").read_text()
    assert table in out and re.findall(r"^\| (LoRA\S*) ", table, re.MULTILINE) == ["LoRA²", "LoRA"]
    assert (tmp_path / "compare-cola/comparison_curves.png").read_bytes()[:4] == b"\x89PNG"
    lines = read_lines(tmp_path / "measured/compare-cola.jsonl")
    assert {(each["method"], each["seed"]) for each in lines} == set(itertools.product(("lora", "lora2"), (1, 2)))
    assert all(each["asked"]["lora_alpha"] == 8 and each["asked"]["eval_strategy"] == "epoch" for each in lines)
    assert "0 run(s) finished now, 4 before" in call(*flags)[1]
    assert "1 run(s) finished now, 2 before" in call(*flags[:1], "lora,lora2,adalora", "--seeds", "1", *flags[4:])[1]
    figures = pd.read_csv(tmp_path / "compare-cola/comparison.csv")
    assert list(figures.method) == ["LoRA", "LoRA²", "AdaLoRA"] and set(figures.seeds) == {1}  # what was asked for
    assert list(figures.scale) == [1, 1, 1]


def test_a_fault_in_the_data_shows_before_the_first_run(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "COMMAND", [sys.executable, str(FAKE)])
    (tmp_path / "train.csv").write_text("étiquette,text\na,one\nb,two\n", encoding="utf-8")
    flags = ["--train_file", str(tmp_path / "train.csv"), "--holdout_fraction", "0.5", "--seeds", "1",
             "--model_name_or_path", str(encoder), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert compare.main([*flags, "--methods", "lora2,lora"]) == 2
    assert "no column 'label'; the columns are 'étiquette', 'text'" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("results.json"))
    (tmp_path / "train.csv").write_text("label,text\na,one\nb,two\n", encoding="utf-8")
    assert compare.main([*flags, "--methods", "lora2,lora"]) == 0


def test_the_test_set_of_another_task_is_read_before_the_first_run_too(call, tiny_glue, tmp_path):
    glue = tmp_path / "glue"
    shutil.copytree(tiny_glue, glue)
    for split in ("matched", "mismatched"):
        shutil.copy(glue / f"mnli/validation_{split}.jsonl", glue / f"mnli/test_{split}.jsonl")
    predicting = ["--task_name", "mnli", "--glue_dir", str(glue), "--do_predict", "--predict_task", "ax"]
    code, _, err = call("--methods", "lora", *predicting)
    assert code == 2 and "no test split of ax" in err and not list(tmp_path.rglob("results.json"))


def test_what_is_finished_needs_its_data_no_more(call, tiny_glue, tmp_path):
    flags = ["--methods", "lora2,lora", "--seeds", "1", "--tune", "5e-4,1e-3", "--name", "tuned"]
    copy = shutil.copytree(tiny_glue, tmp_path / "glue")
    assert call(*flags, "--glue_dir", str(copy))[0] == 0
    shutil.rmtree(copy)
    code, out, err = call(*flags, "--glue_dir", str(copy))
    assert code == 0 and "0 run(s) finished now" in out, err


def test_the_table_names_the_methods_whose_runs_failed(call, tmp_path):
    code, out, _ = call("--methods", "lora2,lora:weight_decay=1", "--seeds", "2")
    assert code == 1 and "- LoRA, weight_decay=1: 0 of 2 runs finished." in out
    assert "runs finished." in (tmp_path / "compare-cola/comparison.md").read_text()
    assert "runs finished." not in call("--methods", "lora2", "--seeds", "2")[1]


def test_a_method_may_name_a_file_by_its_whole_path(call, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text('{"peft_type": "LORA"}')
    spec = f"peft:peft_config={tmp_path}/a/x.json"
    code, out, err = call("--methods", f"{spec},lora", "--seeds", "1", "--tune", "5e-4,1e-3")
    assert code == 0 and "…/x.json" in out, err
    code, _, err = call("--methods", f"{spec},{spec.replace('/a/', '/b/')}", "--seeds", "1", "--name", "two")
    assert code == 2 and "two would have one name in the table" in err and not (tmp_path / "two").exists()


def test_tuning_chooses_each_methods_rate_on_held_out_data(call, tmp_path, monkeypatch):
    """The stand-in's loss is lowest at 2e-3; at the end of what is tried, one more rate is."""
    drawn = []
    monkeypatch.setattr(compare, "draw", lambda name, final, every: drawn.append(every) or [])
    monkeypatch.setattr(compare, "RATES", "5e-4,1e-3")
    code, shown, err = call("--methods", "lora,full", "--seeds", "1", "--tune")
    assert (
        "heads without a rate of their own train at the one that is chosen" in err and "trains the head at" not in err
    )
    assert code == 0 and "Learning rates, chosen on held-out data: LoRA 0.003, full fine-tuning 0.00018." in shown
    lines = read_lines(tmp_path / "measured/compare-cola.jsonl")
    rates = {each["method"]: each["asked"]["learning_rate"] for each in lines if each["stage"] == "final"}
    assert rates == {"lora": 3e-3, "full": 1.8e-4}  # 3 · 1e-3 is nearer to 2e-3; full's file has 2e-5, 3 and 9 times it
    held_out = [each["asked"] for each in lines if each["stage"] == "select"]
    assert {each["seed"] for each in held_out} == {101}  # none of the comparison's own
    shown = {tried["learning_rate"] for tried in drawn[0].tried[drawn[0].stage == "select"]}
    assert shown == {each["learning_rate"] for each in held_out}  # the chosen rates too
    assert {each["holdout_fraction"] for each in held_out} == {0.1} and len(held_out) == 3 + 4


def test_rates_that_are_given_are_tried_by_every_method(call, tmp_path):
    assert call("--methods", "lora,full", "--seeds", "1", "--tune", "1e-3,2e-3,4e-3")[0] == 0
    lines = [each for each in read_lines(tmp_path / "measured/compare-cola.jsonl") if each["stage"] == "select"]
    tried = sorted((each["method"], each["asked"]["learning_rate"]) for each in lines)
    assert tried == [(method, rate) for method in ("full", "lora") for rate in (1e-3, 2e-3, 4e-3)]


def test_a_table_says_which_runs_tuning_would_make_otherwise_now(call, tmp_path):
    flags = ["--methods", "lora", "--seeds", "1", "--tune", "5e-4,1e-3,2e-3,4e-3"]
    assert call(*flags)[0] == 0
    path = tmp_path / "measured/compare-cola.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for each in lines:  # as after a first start in which the best rate failed
        if each["stage"] == "final":
            each["tried"] = {"learning_rate": 1e-3}
            each["asked"] |= each["tried"]
        elif each["tried"] == {"learning_rate": 2e-3}:
            each["status"] = "failed"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    code, out, _ = call(*flags)
    shown = "- LoRA: what is shown was made with other arguments or contents (learning_rate 0.001 → 0.002)"
    assert code == 1 and shown in out
    code, _, err = call("--methods", "lora", "--seeds", "2")  # the same name, without tuning
    assert code == 2 and "learning_rate 0.001 → None" in err and "--name" in err


def test_published_settings_are_warned_of_and_the_matching_methods_named(tmp_path, monkeypatch, capsys):
    """RTE's settings: α = 32 with r = 4, 8 and 2; AdaLoRA has a quarter of the parameters, LoRA² (k = 8) LoRA's."""
    monkeypatch.setattr(compare, "run_experiment", lambda *_: 0)
    monkeypatch.setattr(compare, "check_data", list)  # RTE is not here
    deberta = make_encoder(tmp_path / "deberta", "deberta-v2")
    AutoConfig.for_model("deberta-v2", **DEBERTA_BASE).save_pretrained(deberta)  # sizes need no weights
    capsys.readouterr()  # how far the saving was
    monkeypatch.setenv("LC_ALL", "C")  # the scripts' words are read whatever the locale
    flags = ["--task_name", "rte", "--published", "debertav3", "--model_name_or_path", str(deberta), "--seeds", "1",
             "--output_dir", str(tmp_path), "--glue_dir", str(tmp_path / "donné\n s")]  # fmt: skip
    assert compare.main([*flags, "--methods", "lora2,lora,adalora"]) == 0
    warnings = capsys.readouterr().err.splitlines()
    ends = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    lora = 12 * sum(8 * (i + o) for i, o in ends)
    adalora = 12 * sum(2 * (i + o + 1) for i, o in ends)
    lora2 = 12 * sum(8 * (i + o) + 2 * 8 * 4 + 4 for i, o in ends)
    kept = 12 * sum(8 * (i + o) + 2 * 8 * 3 + 3 for i, o in ends)
    assert (lora, adalora) == (1_327_104, 331_920)
    first = f"lora2 has {lora2:,} parameters ({kept:,} after pruning), α/r 8"
    assert warnings == [
        f"warning: lora has {lora:,} parameters, α/r 4, {first}: lora:lora_alpha=64 matches",
        f"warning: adalora has {adalora:,} parameters ({adalora // 2:,} after pruning), α/r 16, {first}: "
        "adalora_r8:lora_alpha=96 matches",
    ]
    assert compare.main([*flags, "--methods", "lora2,lora:lora_alpha=64,adalora_r8:lora_alpha=96"]) == 0
    assert capsys.readouterr().err == ""
    assert compare.main([*flags, "--methods", "lora,lora2_plus:lora_r=8:lora_alpha=32"]) == 0
    assert capsys.readouterr().err == (
        "warning: lora2_plus:lora_r=8:lora_alpha=32 trains the head at 0.001, lora at 0.0012: "
        "--head_learning_rate 0.001 for all makes them equal\n"
    )
    for alike in (["--head_learning_rate", "2e-3"], ["--learning_rate", "1e-3"]):
        assert compare.main([*flags, "--methods", "lora,lora2_plus:lora_r=8:lora_alpha=32", *alike]) == 0
        assert capsys.readouterr().err == ""
    assert compare.main([*flags, "--methods", "lora:learning_rate=2e-3,lora:learning_rate=1e-3"]) == 0
    assert "1e-3 trains the head at 0.001, lora:learning_rate=2e-3 at 0.002: --head_learning_rate 0.002" in (
        capsys.readouterr().err
    )


def test_the_table_says_what_was_measured():
    """Means, deviations and the paired interval, by their formulas; three runs of 10 steps are no comparison."""
    scores = {"LoRA²": [0.8, 0.82, 0.9], "LoRA": [0.7, 0.75, 0.76]}
    lines = [line(label, "cola", seed, [0.1, score]) for label in scores for seed, score in enumerate(scores[label])]
    frame = as_frame(("one", each) for each in lines).sort_values(["label", "seed"], ascending=[False, True])
    table = comparison_table("one", frame, {"LoRA²": 2.0, "LoRA": None})
    first, second = table.data.to_dict("records")
    differences = [100 * (b - a) for a, b in zip(*scores.values(), strict=True)]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(differences) / 3**0.5
    assert first["last_std"] == pytest.approx(100 * statistics.stdev(scores["LoRA²"]))
    assert second["difference"] == pytest.approx(statistics.mean(differences))
    assert (second["low"], second["high"]) == pytest.approx((second["difference"] - half, second["difference"] + half))
    assert list(table.text["α/r"]) == ["2", "–"] and table.title == "Demonstration, short training: not a comparison"
    one = comparison_table("one", frame[frame.seed == 0], {})
    assert one.title == "Demonstration, one seed, short training: not a comparison"
    long = frame.assign(steps=2000.0)
    assert comparison_table("one", long, {}).title == "Comparison"
    long.iloc[0, long.columns.get_loc("steps")] = 10
    assert comparison_table("one", long, {}).title == "Comparison"  # early stopping may end one run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "lora,nothing"], "unknown method 'nothing'"),
        (["--methods", "lora,lora"], "names a method twice"),
        (["--methods", "lora:alpha"], "the form :flag=value"),
        (["--methods", "lora,"], "--methods holds an empty name"),
        (["--methods", "lora2,lora:task_name=mrpc"], "give --task_name for all methods"),
        (["--methods", "lora:max_eval_samples=5"], "give --max_eval_samples for all methods"),
        (["--methods", "lora:do_eval=False"], "give --do_eval for all methods"),
        (["--methods", "lora:lora_r=4:lora_r=8"], "gives a flag twice"),
        (["--methods", "lora", "--tune", ""], "--learning_rate"),
        (["--methods", "lora", "--do_eval", "False", "--eval_strategy", "no"], "leaves nothing to compare"),
        (["--methods", "lora:seed=3"], "--seed is set for each run"),
        (["--methods", "lora", "--tune", "abc"], "invalid float value: 'abc'"),
        (["--methods", "lora:lora_k=3"], "--lora_k has no meaning with --method lora"),
        (["--methods", "lora", "--seeds", "0"], "must be at least 1"),
        (["--methods", "lora", "--seed", "1"], "--seed is set for each run"),
        (["--methods", "lora", "--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--methods", "lora", "--max_steps", "3", "4"], "unrecognized arguments: 4"),
        (["--methods", "lora", "--tune", "--learning_rate", "1"], "leave --learning_rate out"),
        (["--methods", "lora", "--published", "robertalarge", "--task_name", "wnli"], "has no settings for wnli"),
        ([], "--methods"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line_before_any_run(call, tmp_path, flags, message):
    code, out, err = call(*flags)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "compare-cola").exists()


def test_what_to_compare_on_must_be_given(tmp_path, capsys):
    for flags, message in (
        (["--model_name_or_path", "m"], "give --task_name, or --train_file and --validation_file"),
        (["--task_name", "cola"], "--model_name_or_path is missing"),
    ):
        assert compare.main(["--methods", "lora", "--output_dir", str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_value_of_one_method_may_hold_a_colon():
    spec = "lora2:lora_k=match:lora:lora_r=4"
    assert compare._spec(spec) == {"method": "lora2", "lora_k": "match:lora", "lora_r": 4}
    assert settings_of(spec) == ["lora2", "lora_k=match:lora", "lora_r=4"]
    assert compare._spec("lora2:lora-k=4:lora-r=2") == {"method": "lora2", "lora_k": 4, "lora_r": 2}


def test_the_published_settings_need_a_clone(call, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path / "site-packages/scripts")  # where an installed package looks
    code, _, err = call("--methods", "lora", "--published", "debertav3")
    assert code == 2 and "use a clone" in err and err.count("\n") == 1


@pytest.mark.parametrize(("steps", "strategy"), [([], "epoch"), (["--eval_steps", "5"], "steps")])
def test_evaluations_are_by_epoch_unless_their_steps_are_given(steps, strategy):
    words = ["--methods", "lora", "--task_name", "cola", "--model_name_or_path", "base", *steps]
    args, rest = compare.own_parser().parse_known_args(words)
    (run, *_) = compare.plan(args, compare.flag_values(rest)).runs
    assert run.arguments["eval_strategy"] == strategy and run.arguments["do_train"] and run.arguments["do_eval"]


def test_text_stays_text_and_numbers_become_numbers():
    words = ["--label_column", "01", "--model_revision=12e45", "--max_steps", "7", "--learning_rate=1e-3", "--bf16"]
    values = {"label_column": "01", "model_revision": "12e45", "max_steps": 7, "learning_rate": 1e-3, "bf16": True}
    assert compare.flag_values(words) == values


def test_one_row_of_one_seed_is_doubt_enough_and_live_parameters_are_a_mean(tmp_path):
    lines = [line("LoRA² k=8", "cola", s, [0.5], live_adapter_params=100 * s, steps=5000) for s in (1, 2, 3)]
    lines.append(line("LoRA r=8", "cola", 1, [0.5], steps=5000))
    table = comparison_table("c", finished(load_measured(write(tmp_path, "trial", lines))), {})
    assert table.title.startswith("Demonstration, one seed:")
    assert table.text.set_index("method").loc["LoRA² k=8", "remaining"] == "200"
