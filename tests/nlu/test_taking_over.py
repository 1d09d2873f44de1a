"""When a finished run counts as this sweep's own: the same model and data, a whole record, and the plan says so."""

import json
import shutil

import pytest
import yaml

from nlu import sweep
from nlu.errors import UsageError
from nlu.experiments.files import load_experiment
from tests.nlu.test_digests import model, nothing_known  # noqa: F401 - a fixture
from tests.nlu.test_sweep import BASIC, _records, run  # noqa: F401 - a fixture

SMALL = {**BASIC, "grid": {"method": ["lora"], "task_name": ["cola"], "seed": [1]}}


@pytest.fixture
def models(tmp_path):
    """Two models of one name."""
    return [f"model_name_or_path={model(tmp_path / name / 'encoder', name.encode())}" for name in "ab"]


def _drop(path, *keys):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in keys}))


def test_another_model_of_the_same_name_is_refused_or_replaced(run, tmp_path, models):  # noqa: F811
    assert run(SMALL, "--set", models[0])[0] == 0
    path = tmp_path / "measured/trial/lora-cola-seed=1/results.json"
    old = json.loads(path.read_text())["model_digest"]
    code, _, err = run(SMALL, "--set", models[1])
    assert code == 2 and f"model_name_or_path encoder: other content, {old} → " in err and err.count("\n") == 1
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert "0 run(s) finished now" in run(SMALL, "--set", f"model_name_or_path={tmp_path}/moved/encoder")[1]
    assert run(SMALL, "--set", models[1], "--rerun_changed")[0] == 0
    assert json.loads(path.read_text())["model_digest"] != old
    _drop(path, "model_digest")  # a record of before digests
    assert "0 run(s) finished now" in run(SMALL, "--set", models[0])[1]


def test_an_interrupted_run_does_not_go_on_with_another_model(run, tmp_path, models):  # noqa: F811
    killed = {**SMALL, "base": {**SMALL["base"], "weight_decay": 3}}
    assert run(killed, "--set", models[0])[0] == 1
    code, _, err = run(killed, "--set", models[1])
    assert code == 2 and "model_name_or_path encoder" in err


def test_other_data_of_the_same_task_are_refused(run, tmp_path):  # noqa: F811
    for name in "ab":
        (tmp_path / name / "cola").mkdir(parents=True)
        (tmp_path / name / "cola/train.jsonl").write_text("row\n" * ord(name))
    assert run(SMALL, "--set", f"glue_dir={tmp_path}/a")[0] == 0
    code, _, err = run(SMALL, "--set", f"glue_dir={tmp_path}/b")
    assert code == 2 and "the data's files: other content" in err


def test_a_run_of_another_model_is_never_taken_over(run, tmp_path, models):  # noqa: F811
    assert run(SMALL | {"name": "first"}, "--set", models[0])[0] == 0
    assert "taken over" not in "".join(run(SMALL | {"name": "second"}, "--set", models[1])[1:])
    assert "1 run(s) taken over" in "".join(run(SMALL | {"name": "third"}, "--set", models[1])[1:])
    records = _records(tmp_path)
    assert records["third/lora-cola-seed=1"]["sweep"]["copied_from"] == "second/lora-cola-seed=1"


@pytest.mark.parametrize(
    "damaged", ['{"status": "fin', '{"status": "finished", "sweep": null}', '{"status": "finished", "sweep": [1]}']
)
def test_a_neighbour_s_damaged_record_is_named_and_stops_nothing(run, tmp_path, caplog, damaged):  # noqa: F811
    path = tmp_path / "measured/neighbour/one/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(damaged)
    assert run(SMALL)[0] == 0
    assert [str(path) in message for message in caplog.messages] == [True]


def test_a_record_of_one_s_own_without_arguments_is_refused_in_one_line(run, tmp_path):  # noqa: F811
    path = tmp_path / "measured/trial/lora-cola-seed=1/results.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"status": "finished", "sweep": null}')
    code, _, err = run(SMALL)
    assert code == 2 and "--rerun_changed" in err and err.count("\n") == 1


def test_the_plan_says_what_would_be_taken_over(run, tmp_path):  # noqa: F811
    assert run(SMALL | {"name": "first"})[0] == 0
    two = SMALL | {"name": "second", "grid": SMALL["grid"] | {"seed": [1, 2]}}
    lines = run(two, "--dry_run")[1].splitlines()[1:]
    assert lines[0].split() == ["taken", "over", "lora-cola-seed=1"]
    assert lines[1].strip() == "finished with the same arguments as first/lora-cola-seed=1"
    assert lines[2].split() == ["new", "lora-cola-seed=2"] and "--seed=2" in lines[3]
    assert not (tmp_path / "measured/second").exists()


def test_a_selection_whose_run_has_no_score_chooses_another_value(run, tmp_path):  # noqa: F811
    select = {"argument": "learning_rate", "values": [1e-3, 2e-3], "seeds": [7], "set": {"holdout_fraction": 0.2}}
    assert run(SMALL | {"select": select})[0] == 0
    path = tmp_path / "measured/trial/select/lora-cola-learning_rate=0.002-seed=7/results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"last": None}))
    (tmp_path / "measured/trial/lora-cola-seed=1/results.json").unlink()
    code, _, err = run(SMALL | {"select": select}, "--rerun_changed")
    assert code == 0, err
    chosen = json.loads((tmp_path / "measured/trial/selection.json").read_text())["choices"][0]
    assert chosen["chosen"] == 1e-3 and chosen["held_out_scores"][1] == {"value": 2e-3, "score": None}


def test_one_s_own_files_stand_in_for_a_task_and_no_folder_is_recorded(run, tmp_path):  # noqa: F811
    for name in ("train", "other", "dev"):
        (tmp_path / f"{name}.csv").write_text("sentence,label\n" + f"{name},1\n")
    base = {**BASIC["base"], "validation_file": str(tmp_path / "dev.csv")}
    grid = {"method": ["lora"], "train_file": [str(tmp_path / f"{name}.csv") for name in ("train", "other")]}
    content = {"name": "own", "base": base, "grid": {**grid, "seed": [1]}}
    code, _, err = run(content)
    assert code == 0, err
    records = _records(tmp_path)
    assert set(records) == {"own/lora-train.csv-seed=1", "own/lora-other.csv-seed=1"}
    assert str(tmp_path) not in json.dumps([record["sweep"] for record in records.values()])
    assert {record["sweep"]["axes"]["train_file"] for record in records.values()} == {"train.csv", "other.csv"}
    (tmp_path / "other.csv").write_text("sentence,label\nlonger than before,1\n")
    code, _, err = run(content)
    assert code == 2 and "the data's files" in err and "lora-other.csv" in err
    code, _, err = run({**content, "grid": {"method": ["lora"], "seed": [1]}})
    assert code == 2 and "no task_name is given" in err


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ngrid:\n  seed: [1]\nname: b\n", "line 4 gives the key name of line 1 again"),
        ("grid:\n  kind: {1: {}, true: {}}\n", "line 2 gives the key true of line 2 again"),
        ("a: 1\n'a': 2\n", "line 2 gives the key a of line 1 again"),
    ],
)
def test_a_key_twice_is_refused_with_its_lines(tmp_path, text, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)
