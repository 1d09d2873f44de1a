"""The experiment files of this repository, and faulty ones; test_bad_input.py has any content whatever."""

from datetime import date

import pytest
import yaml

from nlu import sweep
from nlu.arguments import parse_arguments
from nlu.errors import UsageError
from nlu.experiments.claims import load_questions
from nlu.experiments.experiment import load_experiment
from nlu.experiments.places import Places, command_line
from nlu.experiments.records import place_of
from nlu.json_yaml import parse_yaml
from nlu.methods.registry import METHODS
from tests.nlu.sweeps import BASIC, SELECT
from tests.nlu.tiny import REPOSITORY

FILES = [path for path in sorted((REPOSITORY / "configs/experiments").glob("*.yaml")) if path.stem != "claims"]


def test_a_number_with_a_signed_exponent_is_a_number_and_a_commit_stays_text():
    content = parse_yaml("{a: 1e-3, b: -2.5E+4, c: 12e4567, d: 1e3, e: '1e-3', f: no, g: True, h: false, i: off}")
    assert content == {
        "a": 1e-3, "b": -2.5e4, "c": "12e4567", "d": "1e3", "e": "1e-3", "f": "no", "g": True, "h": False, "i": False
    }  # fmt: skip


def test_whole_numbers_are_decimal_and_a_time_stays_text():
    content = parse_yaml("{a: 4:00:00, b: 010, c: 10, d: -3, e: +0, f: 1_000}")
    assert content == {"a": "4:00:00", "b": "010", "c": 10, "d": -3, "e": 0, "f": "1_000"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_repository_s_experiments_load_and_run_glue_accepts_every_command(path, tmp_path):
    places = Places(tmp_path, tmp_path, [])
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    assert experiment.name == path.stem and experiment.description
    runs = experiment.runs + (experiment.selection.runs if experiment.selection else [])
    different = {str({name: run.arguments[name] for name in run.arguments if name != "seed"}): run for run in runs}
    for run in different.values():
        if run.command:
            assert (REPOSITORY / run.command[-1]).is_file()
            assert f"METHOD={run.arguments['method']}" in run.command
            continue
        record = parse_arguments(command_line(run, places)).record
        for key, value in run.arguments.items():
            if value is not None and key not in ("method", "bf16", "eval_strategy", "save_strategy"):
                assert record[key] == value, key


def label_of(run):
    name = run.arguments["method"]
    base = max((base for base in METHODS if name.startswith(base)), key=len, default=name)
    return place_of(run, base)["label"]


def test_every_claim_names_rows_that_its_experiments_have():
    """Labels of an axis of labels; those of methods follow from the registry, and the sweep's tests compare them."""
    questions, published = load_questions(REPOSITORY / "configs/experiments/claims.yaml")
    assert {name for question in questions for name in question.experiments} >= {path.stem for path in FILES}
    for question in questions:
        known = set()
        for name in question.experiments:
            path = REPOSITORY / f"configs/experiments/{name}.yaml"
            for run in load_experiment(path, {"model_name_or_path": "m"}).runs if path.exists() else ():
                known |= {label_of(run)}
        for claim in question.claims if known else ():
            assert {claim.label, claim.against} <= known, claim
    for paper in published:
        assert (REPOSITORY / f"results/published/{paper['file']}.json").is_file()


def test_run_glue_accepts_the_command_for_one_s_own_files(tmp_path, capsys):
    base = {"model_name_or_path": "m", "train_file": "a.csv", "validation_file": "b.csv"}
    base |= {"do_train": True, "do_eval": True}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "base": base, "grid": {"method": ["lora"], "seed": [1]}}))
    places = ["--measured_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o")]
    assert sweep.main([str(path), *places, "--dry_run"]) == 0
    assert "--train_file=a.csv" in capsys.readouterr().out
    assert sweep.main([str(path), *places, "--dry_run", "--set", "task_name=cola"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert sweep.main([str(path), *places, "--dry_run", "--set", "do_eval=false"]) == 2
    assert "without --do_eval a run has no score" in capsys.readouterr().err


def test_what_lies_beyond_an_end_is_checked_before_the_first_run(tmp_path, capsys):
    base = {"model_name_or_path": "m", "task_name": "cola", "do_train": True, "do_eval": True}
    select = {"values": {"lora_dropout": [0.1, 0.5]}, "beyond": {"lora_dropout": 3}, "seeds": [1]}
    content = {"name": "trial", "base": base, "grid": {"method": ["lora"], "seed": [1]},
               "select": select | {"set": {"holdout_fraction": 0.1}}}  # fmt: skip
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    places = ["--measured_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o")]
    assert sweep.main([str(path), *places, "--dry_run"]) == 2
    assert "select/lora-lora_dropout=1.5-seed=1: " in capsys.readouterr().err
    content["select"] |= {"values": {"lora_dropout": [0.5]}, "seeds": [1, 2]}  # one value has no end
    path.write_text(yaml.safe_dump(content))
    assert sweep.main([str(path), *places, "--dry_run"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ngrid:\n  seed: [1]\nname: b\n", "line 4 gives the key name of line 1 again"),
        ("grid:\n  kind: {1: {}, true: {}}\n", "line 2 gives the key true of line 2 again"),
    ],
)
def test_a_key_twice_is_refused_with_its_lines(tmp_path, text, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def _with(**changes):
    return {**BASIC, **changes}


def _select(**changes):
    return {**BASIC, "select": {**SELECT, **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "[] is not of type 'object'"),
        (_with(grids={}), "'grids' was unexpected"),
        (_with(name="../up"), "name: "),
        (_with(grid={"variant": {"..": {"method": "lora"}}, "task_name": ["cola"], "seed": [1]}), "begin with no dot"),
        (_with(grid={"variant": {"": {"method": "lora", "task_name": "cola", "seed": 1}}}), "not empty"),
        (
            _with(grid={**BASIC["grid"], "row": {"a": {"seed": 3}}}),
            "grid.row a sets seed, which is an axis of the grid",
        ),
        (_with(grid={}), "grid: {} should be non-empty"),
        (_with(grid={"method": ["lora"], "task_name": ["cola"]}), "no seed is given"),
        (_with(base={}), "no model_name_or_path is given"),
        (_with(base={"root_output_dir": "x"}), "is a flag that the sweep sets itself"),
        (_with(base={"--bf16": True}), "no flag's name"),
        (_with(grid={**BASIC["grid"], "orth_terms": ["uv", "UV"]}), "share the folder"),
        (_with(overrides=[{"when": {"method": "sora"}, "set": {}}]), "names method sora"),
        (_with(overrides=[{"when": {"methods": "lora"}, "set": {}}]), "not an axis of the grid"),
        (_with(overrides=[{"when": {"method": "lora"}, "set": {"seed": 3}}]), "is an axis"),
        (_with(exclude=[{"method": ["lora", "lora2"]}]), "leaves no run"),
        (_select(set={}), "holdout_fraction"),
        (_select(values={"seed": [1]}), "select.values names seed, which the grid or --set fixes"),
        (_select(set={"holdout_fraction": 0.1, "learning_rate": 1}), "both selected and set"),
        (_select(set={"holdout_fraction": 0.1, "task_name": "rte"}), "select.set sets task_name, which is an axis"),
        (_select(values={"learning_rate": [True, 2]}), "must be a list of all numbers"),
        (_select(beyond={"learning_rate": 1}), "must be a factor above 1"),
        (_select(beyond={"weight_decay": 2}), "select.beyond names weight_decay"),
        (_select(overrides=[{"when": {"method": "lora"}, "values": {"learning_rate": [None]}}]), "without null"),
        (_with(base={"model_name_or_path": "m", "learning_rate": "1e+999"}), "rate: Infinity must be one value"),
        (_with(grid={**BASIC["grid"], "day": {date(2024, 1, 1): {}}}), "must be one value"),
        (_with(grid={**BASIC["grid"], "seed": [1, True]}), "lists a value twice"),
        (_with(grid={**BASIC["grid"], "run_name": ["a" * 300]}), "give its axes shorter labels"),
        (_with(command="bash 'run.sh"), "cannot be split into words: No closing quotation"),
        (_with(name="t\n"), "name: t"),
        (_with(base={"model_name_or_path": "m", "run_name": "a\0b"}), "or NUL"),
        (_with(grid={**BASIC["grid"], "seed": ["1", 1]}), "grid.seed names one seed twice"),
        (
            _with(grid={**BASIC["grid"], "a": {"x": {"lora_r": 4}}, "b": {"y": {"lora_r": 2}}}),
            "which another axis sets",
        ),
        (
            _with(
                grid={
                    "method": ["lora"],
                    "seed": [1],
                    "task_name": {
                        name: {"task_name": "cola", "max_steps": steps} for name, steps in (("short", 3), ("long", 5))
                    },
                }
            ),
            "tables could not tell lora-seed=1-short from lora-seed=1-long",
        ),
        (
            _with(
                grid={
                    "method": ["lora"],
                    "task_name": {
                        name: {"train_file": f"{name}.csv", "validation_file": "dev.csv", "seed": 1} for name in "ab"
                    },
                }
            ),
            "give the axis another name than task_name or seed, such as data",
        ),
        (_with(grid={"method": ["lora"], "task_name": ["stsb", "sts-b"], "seed": [1]}), "which have one task and seed"),
        (_select(seeds=[7, "07"]), "select.seeds names one seed twice"),
        (_with(exclude=[{"seed": []}]), "exclude.0.seed: [] should be non-empty"),
        (
            _with(grid={"v": {name: {"method": "lora", "task_name": "cola", "seed": 1} for name in ("Logs", "b")}}),
            "'Logs', where the sweep puts others",
        ),
        (_select(set={"holdout_fraction": None}), "null would leave tuning without rows of its own"),
        (
            _select(overrides=[{"when": {"method": "lora"}, "set": {"holdout_fraction": None}}]),
            "select.overrides.0.set.holdout_fraction: null would leave",
        ),
        (
            {**_select(), "overrides": [{"when": {"seed": 1}, "set": {"lora_r": 2}}]},
            "seed: tuning is for all seeds",
        ),
        (_select(overrides=[{"when": {"seed": 1}, "set": {"lora_r": 2}}]), "seed: tuning is for all seeds"),
        ({**_select(), "base": {"model_name_or_path": "m", "learning_rate": 1}}, "both selected and set"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_before_anything_starts(tmp_path, capsys, content, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert sweep.main([str(path), "--measured_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
