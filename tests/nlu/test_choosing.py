"""How a sweep chooses the tuned settings, with real child processes (a stand-in for run_glue)."""

from types import SimpleNamespace

import pytest

from nlu.experiments import choosing
from nlu.experiments.experiment import Run, Selection
from tests.nlu.sweeps import BASIC, ONE, SELECT, lines_of


def test_the_selection_takes_the_lowest_held_out_loss_and_looks_once_beyond_an_end(run_sweep, tmp_path):
    lora = {"when": {"method": "lora"}, "values": {"learning_rate": ["1e-4", 4e-4]}, "set": {"importance": "full"}}
    select = {"beyond": {"learning_rate": 2}, "seeds": [101, 102], "overrides": [lora]}
    content = BASIC | {"select": SELECT | select | {"values": {"learning_rate": [1e-3, 2e-3, 4e-3]}}}
    dry = run_sweep(content, "--dry_run")
    assert dry[0] == 0 and dry[1].count("--learning_rate CHOSEN-BY-THE-SELECTION") == 8
    assert not (tmp_path / "output").exists()
    code, out, _ = run_sweep(content, "--jobs", "4")
    # (3 + 2) values × 2 tasks × 2 seeds, one more rate for each task and seed of lora, and 8.
    assert code == 0 and "32 run(s) finished now" in out
    lines = lines_of(tmp_path)
    final = {name: line for name, line in lines.items() if line["stage"] == "final"}
    held_out = [line for line in lines.values() if line["stage"] == "select"]
    assert list(lines)[:8] == list(final)
    assert not any("holdout_fraction" in line["asked"] for line in final.values())
    # lora's best of the first round, 4e-4, is at the upper end, and 8e-4 is closer to 2e-3; lora2's best is inside.
    chosen = {(line["axes"]["method"], line["tried"]["learning_rate"]) for line in final.values()}
    assert chosen == {("lora", 8e-4), ("lora2", 2e-3)}
    assert all(line["asked"]["learning_rate"] == line["tried"]["learning_rate"] for line in lines.values())
    assert {line["tried"]["learning_rate"] for line in held_out if "extra" in line} == {8e-4}
    assert {line["asked"]["holdout_fraction"] for line in held_out} == {0.2}
    assert {line["asked"].get("importance") for line in held_out if line["axes"]["method"] == "lora"} == {"full"}
    assert {line["seed"] for line in held_out} == {101, 102}
    assert {line["label"] for line in held_out} == {"LoRA", "LoRA²"}
    code, out, _ = run_sweep(content)
    assert code == 0 and "0 run(s) finished now, 32 before" in out


def test_two_arguments_are_chosen_together(run_sweep, tmp_path):
    select = SELECT | {"values": {"learning_rate": [1e-3, 2e-3], "lora_alpha": [2, 16]}}
    assert run_sweep({**BASIC, "grid": ONE, "select": select})[0] == 0
    lines = lines_of(tmp_path)
    assert sum(line["stage"] == "select" for line in lines.values()) == 4
    assert lines["lora-cola-seed=1"]["tried"] == {"learning_rate": 2e-3, "lora_alpha": 2}  # equal losses: the first


def test_what_set_names_holds_for_the_selection_too(run_sweep, tmp_path):
    content = {**BASIC, "grid": ONE, "select": SELECT | {"set": {"holdout_fraction": 0.2, "max_steps": 50}}}
    assert run_sweep(content, "--set", "max_steps=1")[0] == 0
    assert {line["asked"]["max_steps"] for line in lines_of(tmp_path).values()} == {1}
    for value in ("null", "0.1"):
        said = run_sweep(content, "--set", f"holdout_fraction={value}")[2]
        assert "--set holdout_fraction is the tuning stage's own" in said
    content["base"] = BASIC["base"] | {"holdout_fraction": 0.1}
    code, _, said = run_sweep(content)
    assert code == 2 and "choose by the rows that the final runs are scored on" in said


@pytest.mark.parametrize("ends", [2, 3])  # refused, which may pass; killed
def test_a_tuning_run_without_a_record_is_waited_for(run_sweep, tmp_path, ends):
    content = {**BASIC, "grid": ONE, "select": SELECT | {"values": {"weight_decay": [0.5, ends]}}}
    code, _, err = run_sweep(content)
    assert code == 1 and "its selection is not complete" in err and len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("best", "values", "factor", "further"),
    [
        (8, [4, 8], 2, 16), (4, [4, 8], 3, 1), (2, [2, 4], 3, 1), (1, [1, 2], 3, None), (8, [4, 8], 1.3, 11),
        (2e-3, [1e-3, 2e-3], 2, 4e-3), (0, [0, 0.01], 2, None),
        ("b", ["a", "b"], 2, None), (2, [1, 2, 3], 2, None),
    ],
)  # fmt: skip
def test_one_value_beyond_an_end(best, values, factor, further):
    found = choosing._further(best, values, factor)
    assert found == further and type(found) is type(further)


def test_a_value_whose_run_failed_is_never_chosen_and_no_value_at_all_blocks(run_sweep, tmp_path):
    content = {
        **BASIC,
        "grid": ONE | {"method": ["lora", "lora2"]},
        "select": SELECT | {
            "values": {"weight_decay": [1, 0.5]},  # 1 makes the stand-in fail with a record
            "overrides": [{"when": {"method": "lora2"}, "values": {"weight_decay": [1]}}],
        },
    }  # fmt: skip
    code, _, err = run_sweep(content)
    assert code == 1 and "failed: lora2-cola-seed=1: its selection is not complete" in err
    final = [line for line in lines_of(tmp_path).values() if line["stage"] == "final"]
    assert [(line["label"], line["tried"]) for line in final] == [("LoRA", {"weight_decay": 0.5})]


def test_a_value_counts_by_its_last_loss_and_only_where_all_its_seeds_have_one():
    ends = {1e-3: [[0.1, 0.5], [0.1, 0.5]], 2e-3: [[0.4, 0.4], [0.4, 0.4]], 4e-3: [[0.2, 0.01], None]}
    lines, runs = {}, []
    for rate, losses in ends.items():
        for seed, loss in enumerate(losses):
            run = Run("e", "select", f"{rate}-{seed}", {"seed": seed}, {}, tried={"learning_rate": rate})
            runs.append(run)
            lines[run.folder] = {"status": "finished" if loss else "failed", "evaluations": {"loss": loss}}
    places = SimpleNamespace(line=lambda run: lines[run.folder])
    assert choosing.choose(Selection((), {}, runs), places) == {(): {"learning_rate": 2e-3}}


def test_what_no_choice_can_have_made_is_refused_before_the_tuning(run_sweep, tmp_path):
    plain = BASIC | {"grid": ONE}
    assert run_sweep(plain)[0] == 0
    tuned = plain | {"select": SELECT | {"beyond": {"learning_rate": 2}}}
    code, _, err = run_sweep(tuned)
    assert code == 2 and "learning_rate None → 0.001" in err and "--rerun_changed" in err
    assert len(lines_of(tmp_path)) == 1
    assert run_sweep(plain, "--set", "learning_rate=4e-3", "--rerun_changed")[0] == 0
    assert run_sweep(tuned)[0] == 1  # a second round could give it; the choice, 2e-3, is another
    assert len(lines_of(tmp_path)) == 1 + 2 + 1


def test_where_the_choice_changes_what_was_made_before_is_kept_and_the_other_runs_go_on(run_sweep, tmp_path):
    small = BASIC | {"grid": {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]}}
    first = small | {"select": SELECT | {"values": {"learning_rate": [5e-4, 1e-3]}}}
    assert run_sweep(first, "--only", "cola")[0] == 0
    second = small | {"select": SELECT | {"values": {"learning_rate": [5e-4, 1e-3, 2e-3]}}}
    code, out, err = run_sweep(second)
    assert code == 1 and "1 failed" in out and "lora-cola-seed=1: it was made with other arguments" in err
    assert "learning_rate 0.001 → 0.002" in err and "--rerun_changed" in err
    rates = [lines_of(tmp_path)[f"lora-{task}-seed=1"]["asked"]["learning_rate"] for task in ("cola", "rte")]
    assert rates == [1e-3, 2e-3]
    assert run_sweep(second, "--rerun_changed")[0] == 0


def test_only_keeps_matching_runs_and_the_selection_that_they_need(run_sweep, tmp_path):
    assert run_sweep({**BASIC, "select": SELECT}, "--only", "^lora2-.*seed=1$")[0] == 0
    assert list(lines_of(tmp_path)) == [
        "lora2-cola-seed=1",
        "lora2-rte-seed=1",
        *(f"select/lora2-{task}-learning_rate={rate}-seed=7" for task in ("cola", "rte") for rate in (0.001, 0.002)),
    ]
    assert run_sweep(BASIC, "--only", "nothing")[0] == 2
