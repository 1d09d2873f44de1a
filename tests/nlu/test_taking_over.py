"""When a finished run counts as this sweep's own: the same model and data, a whole record, and the plan says so."""

import json
import shutil

import pytest

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
