"""The sweep with real child processes (a stand-in for run_glue), and what it does on failures."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import yaml

from nlu import sweep
from nlu.errors import UsageError
from nlu.experiments import launchers
from nlu.experiments.files import load_experiment
from nlu.experiments.places import comparable, portable

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_run_glue.py")
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "/models/encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}


@pytest.fixture
def run(tmp_path, capsys):
    """Call the sweep on an experiment given as a mapping; returns (exit code, stdout, stderr)."""

    def call(content, *flags):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        code = sweep.main([str(path), *_places(tmp_path), *flags])
        return (code, *capsys.readouterr())

    return call


def _places(folder):
    command = f"{sys.executable} {FAKE}"
    return ["--command", command, "--measured_dir", str(folder / "measured"), "--output_dir", str(folder / "output")]


def _records(folder, pattern="**/results.json"):
    paths = sorted((folder / "measured").glob(pattern))
    return {str(path.parent.relative_to(folder / "measured")): json.loads(path.read_text()) for path in paths}


def test_what_another_experiment_finished_with_the_same_arguments_is_taken_over(run, tmp_path):
    grid = {"method": ["lora"], "task_name": ["cola"], "seed": [1]}
    assert run(BASIC | {"name": "first", "grid": grid})[0] == 0
    first = _records(tmp_path)["first/lora-cola-seed=1"]
    grid = {
        "rank": {"eight": {"method": "lora"}, "two": {"method": "lora", "learning_rate": 0.5}},
        "task_name": ["cola"],
    }
    code, out, err = run(BASIC | {"name": "second", "grid": grid | {"seed": [1, 2]}})
    assert code == 0 and "1 run(s) taken over" in out + err and "3 run(s) finished now, 1 before" in out
    records = _records(tmp_path)
    taken = records["second/eight-cola-seed=1"]
    assert taken["sweep"].pop("copied_from") == "first/lora-cola-seed=1"
    assert taken["sweep"] == first["sweep"] | {
        "experiment": "second", "axes": {"rank": "eight", "task_name": "cola", "seed": 1},
    }  # fmt: skip
    assert {k: v for k, v in taken.items() if k != "sweep"} == {k: v for k, v in first.items() if k != "sweep"}
    assert not any("copied_from" in r["sweep"] for name, r in records.items() if name != "second/eight-cola-seed=1")
    # A copy is no source of copies, hides no original that is listed after it, and another argument is another run.
    for name in ("a-copy", "one-more"):
        assert "1 run(s) taken over" in "".join(
            run(BASIC | {"name": name, "grid": {**grid, "rank": {"eight": grid["rank"]["eight"]}, "seed": [1]}})[1:]
        )
    (tmp_path / "measured/first/lora-cola-seed=1/results.json").unlink()
    grid["rank"].pop("two")
    assert "taken over" not in "".join(run(BASIC | {"name": "third", "grid": grid | {"seed": [1]}})[1:])


def test_every_combination_runs_once_and_leaves_a_portable_record(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "available_cores", lambda: 8)
    assert run(BASIC, "--jobs", "2", "--set", "glue_dir=/data/glue")[0] == 0
    records = _records(tmp_path)
    expected = {f"trial/{m}-{t}-seed={s}" for m in ("lora", "lora2") for t in ("cola", "rte") for s in (1, 2)}
    assert set(records) == expected
    record = records["trial/lora2-rte-seed=2"]
    assert record["arguments"]["bf16"] is True and record["arguments"]["glue_dir"] == "…/glue"
    assert str(tmp_path) not in json.dumps(records)
    assert record["sweep"]["axes"] == {"method": "lora2", "task_name": "rte", "seed": 2}
    assert record["sweep"]["reference"] is False and records["trial/lora-rte-seed=2"]["sweep"]["reference"] is True
    assert record["threads"] == "4"
    assert (tmp_path / "measured/trial/lora2-rte-seed=2/rank_pattern.json").exists()
    assert (tmp_path / "output/trial/lora2-rte-seed=2/results.json").exists()


def test_a_second_sweep_runs_only_what_is_missing(run, tmp_path):
    run(BASIC)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("results.json")}
    (tmp_path / "measured/trial/lora-cola-seed=1/results.json").unlink()
    code, out, _ = run(BASIC, "--set", "model_name_or_path=/elsewhere/encoder")  # another place, the same model
    assert code == 0 and "1 run(s) finished now, 7 before" in out
    again = [path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert again == ["lora-cola-seed=1"]


def test_changed_arguments_are_refused_before_anything_starts_or_replaced_when_asked(run, tmp_path):
    run({**BASIC, "grid": {**BASIC["grid"], "seed": [1]}})
    code, _, err = run(BASIC, "--set", "learning_rate=0.005")
    assert code == 2 and "learning_rate None → 0.005" in err and "--rerun_changed" in err and err.count("\n") == 1
    assert len(_records(tmp_path)) == 4  # seed 2 was not started
    assert run(BASIC, "--set", "learning_rate=0.005", "--rerun_changed")[0] == 0
    records = _records(tmp_path)
    assert {record["arguments"]["learning_rate"] for record in records.values()} == {0.005}
    assert records["trial/lora-cola-seed=1"]["arguments"]["overwrite_output_dir"] is True
    assert records["trial/lora-cola-seed=2"]["arguments"]["overwrite_output_dir"] is False


def test_failing_runs_do_not_stop_the_others(run, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte", "mrpc", "stsb"], "seed": [1]},
        "overrides": [
            {"when": {"task_name": task}, "set": {"weight_decay": kind}}
            for task, kind in (("cola", 1), ("rte", 2), ("mrpc", 3))
        ],
    }
    code, out, err = run(content)
    assert code == 1 and "1 run(s) finished now, 0 before, 3 failed" in out
    assert "the loss is nan at step 3" in err
    assert "exit code 2: error: target_rank 9 is larger than lora_r 8" in err
    assert re.search(r"lora-mrpc-seed=1: exit code -9", err)
    status = {name: record["status"] for name, record in _records(tmp_path).items()}
    assert status == {"trial/lora-cola-seed=1": "failed", "trial/lora-stsb-seed=1": "finished"}
    fixed = {key: value for key, value in content.items() if key != "overrides"}
    code, _, err = run(fixed)  # what failed may change its arguments; what was interrupted would lose its progress
    assert code == 2 and "1 run(s), lora-mrpc-seed=1 first" in err and "weight_decay 3 → None" in err
    assert run(fixed, "--rerun_changed")[0] == 0
    assert [record["status"] for record in _records(tmp_path).values()] == ["finished"] * 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_runs_and_the_same_command_goes_on(tmp_path, number, code):
    content = {**BASIC, "base": {**BASIC["base"], "weight_decay": 4}, "grid": {**BASIC["grid"], "task_name": ["cola"]}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, str(REPOSITORY / "nlu/sweep.py"), str(path), "--jobs", "2", *_places(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_two = [tmp_path / f"output/trial/lora-cola-seed={seed}/started" for seed in (1, 2)]
    try:
        _wait_for(lambda: all(marker.exists() for marker in first_two))
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "another sweep is running" in second.stderr
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code and "goes on from here" in err
    records = [json.loads(marker.with_name("results.json").read_text()) for marker in first_two]
    assert [record["status"] for record in records] == ["interrupted"] * 2
    assert _records(tmp_path) == {} and not (tmp_path / "output/trial/lora2-cola-seed=1").exists()
    only = subprocess.run([*command, "--only", "lora-"], capture_output=True, text=True, timeout=60)
    assert only.returncode == 0, only.stderr
    assert [record["resumes"] for record in _records(tmp_path).values()] == [1, 1]


def test_the_selection_takes_the_best_held_out_value_and_records_it(run, tmp_path):
    content = {
        **BASIC,
        "overrides": [{"when": {"method": "lora", "task_name": "rte"}, "set": {"importance": "full"}}],
        "select": {
            "argument": "learning_rate",
            "values": [1e-3, 2e-3, 4e-3],
            "seeds": [101, 102],
            "set": {"holdout_fraction": 0.2},
            "overrides": [{"when": {"method": "lora"}, "values": ["1e-4", 4e-3]}],
        },
    }
    dry = run(content, "--dry_run")
    assert dry[0] == 0 and dry[1].count("CHOSEN-BY-THE-SELECTION") == 8 and not (tmp_path / "output").exists()
    code, out, _ = run(content, "--jobs", "4")
    assert code == 0 and "28 run(s) finished now" in out  # (3 + 2) values × 2 tasks × 2 seeds, and 8
    chosen = json.loads((tmp_path / "measured/trial/selection.json").read_text())["choices"]
    got = {(c["method"], c["task_name"]): (c["chosen"], c["edge"]) for c in chosen}
    # |1e-4 − 2e-3| < |4e-3 − 2e-3|; two values are both at an edge.
    assert got[("lora", "cola")] == (1e-4, True) and got[("lora2", "rte")] == (2e-3, False)
    score = {c["value"]: c["score"] for c in chosen[-1]["held_out_scores"]}
    assert score[4e-3] == pytest.approx(0.8 - 2e-3 * 10 + (0.101 + 0.102) / 2)
    final = _records(tmp_path, "trial/*/results.json")
    assert len(final) == 8
    assert {r["arguments"]["holdout_fraction"] for r in final.values()} == {0.0}
    assert {r["arguments"]["learning_rate"] for n, r in final.items() if "lora2" in n} == {2e-3}
    held_out = _records(tmp_path, "trial/select/*/results.json")
    assert {r["arguments"]["holdout_fraction"] for r in held_out.values()} == {0.2}
    assert {r["arguments"]["seed"] for r in held_out.values()} == {101, 102}
    code, out, _ = run(content)
    assert code == 0 and "0 run(s) finished now, 28 before" in out


def test_a_value_whose_run_failed_is_never_chosen_and_no_value_at_all_blocks(run, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora", "lora2"], "task_name": ["cola"], "seed": [1]},
        "select": {
            "argument": "weight_decay",  # 1 makes the stand-in fail and leave a failed record
            "values": [1, 0.5],
            "seeds": [7],
            "set": {"holdout_fraction": 0.2},
            "overrides": [{"when": {"method": "lora2"}, "values": [1]}],
        },
    }
    code, _, err = run(content)
    assert code == 1 and "failed: lora2-cola-seed=1: its selection runs" in err
    chosen = json.loads((tmp_path / "measured/trial/selection.json").read_text())["choices"]
    assert [(c["method"], c["chosen"]) for c in chosen] == [("lora", 0.5)]
    assert list(_records(tmp_path, "trial/*/results.json")) == ["trial/lora-cola-seed=1"]


def test_only_keeps_matching_runs_and_the_selection_that_they_need(run, tmp_path):
    selection = {
        "argument": "learning_rate",
        "values": [1e-3, 2e-3],
        "seeds": [7],
        "set": {"holdout_fraction": 0.2},
    }
    assert run({**BASIC, "select": selection}, "--only", "^lora2-.*seed=1$")[0] == 0
    names = [name.removeprefix("trial/") for name in _records(tmp_path)]
    assert names == [
        "lora2-cola-seed=1",
        "lora2-rte-seed=1",
        *(f"select/lora2-{task}-learning_rate={rate}-seed=7" for task in ("cola", "rte") for rate in (0.001, 0.002)),
    ]
    assert run(BASIC, "--only", "nothing")[0] == 2


def test_the_slurm_launcher_runs_the_same_sweep_as_jobs(run, tmp_path):
    pytest.importorskip("submitit", reason="the slurm extra is not installed")
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]},
        "overrides": [{"when": {"task_name": "rte"}, "set": {"weight_decay": 2}}],
    }
    code, out, err = run(content, "--launcher", "slurm", "--slurm", "cluster=local", "--slurm", "timeout_min=1")
    assert code == 1 and "1 run(s) finished now" in out and "target_rank 9 is larger" in err
    assert list(_records(tmp_path)) == ["trial/lora-cola-seed=1"]
    for wrong in ("nonsense_parameter=1", "timeout_min=abc"):
        code, _, err = run(BASIC, "--launcher", "slurm", "--slurm", wrong, "--slurm", "cluster=local")
        assert code == 2 and err.startswith("error: submitit: ")


def _with(**changes):
    return {**BASIC, **changes}


SELECT = {"argument": "learning_rate", "values": [1], "seeds": [1], "set": {"holdout_fraction": 0.1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be a mapping"),
        (_with(grids={}), "unknown key grids"),
        (_with(name="../up"), "name must be"),
        (_with(grid={}), "grid is empty"),
        (_with(grid={"method": [], "task_name": ["cola"], "seed": [1]}), "grid.method is empty"),
        (_with(grid={"method": ["lora"], "task_name": ["cola"]}), "no seed is given"),
        (_with(base={}), "no model_name_or_path is given"),
        (_with(base={"root_output_dir": "x"}), "sets itself"),
        (_with(base={"--bf16": True}), "no flag's name"),
        (_with(base={"model_name_or_path": "m", "lora_module": ["query"]}), "must be one value"),
        (_with(grid={**BASIC["grid"], "seed": [1, 1]}), "lists a value twice"),
        (_with(grid={**BASIC["grid"], "orth_terms": ["uv", "UV"]}), "share the folder"),
        (_with(overrides=[{"when": {"method": "sora"}, "set": {}}]), "names method sora"),
        (_with(overrides=[{"when": {"methods": "lora"}, "set": {}}]), "no axis of the grid"),
        (_with(overrides=[{"when": {"method": "lora"}, "set": {"seed": 3}}]), "is an axis"),
        (_with(exclude=[{"method": ["lora", "lora2"]}]), "leaves no run"),
        (_with(reference={"method": "full"}), "names method full"),
        (_with(select={**SELECT, "set": {}}), "holdout_fraction"),
        (_with(select={**SELECT, "argument": "seed"}), "select.argument"),
        (_with(select={**SELECT, "values": []}), "select.values"),
        (_with(select={**SELECT, "values": [None, 0.001]}), "select.values must be all numbers"),
        (_with(select={**SELECT, "values": ["fast", 0.001]}), "select.values must be all numbers"),
        (_with(select={**SELECT, "values": [True, 2]}), "select.values must be all numbers"),
        (_with(select={**SELECT, "values": [1, 1.0]}), "select.values must be a list of different values"),
        (_with(select={**SELECT, "values": [float("nan"), 1]}), "select.values is nan"),
        (_with(select={**SELECT, "overrides": [{"when": {"method": "lora"}, "values": [None]}]}), "without null"),
        (_with(base={"model_name_or_path": "m", "learning_rate": float("nan")}), "base.learning_rate is nan"),
        (_with(base={"model_name_or_path": "m", "learning_rate": "1e999"}), "base.learning_rate is inf"),
        (_with(base={"model_name_or_path": "m", "run_name": date(2024, 1, 1)}), "must be one value, not date"),
        (_with(grid={**BASIC["grid"], "day": {date(2024, 1, 1): {}}}), "grid.day must be one value, not date"),
        (_with(grid={**BASIC["grid"], "seed": [1, True]}), "lists a value twice"),
        (_with(grid={**BASIC["grid"], "seed": [2, 2.0]}), "lists a value twice"),
        (_with(grid={**BASIC["grid"], "run_name": ["ä", "ö"]}), "A-Z, 0-9"),
        (_with(grid={**BASIC["grid"], "run_name": ["a" * 300]}), "give its axes shorter labels"),
        (_with(name="a" * 300), "name must be"),
        (_with(command="bash 'run.sh"), "cannot be split into words: No closing quotation"),
        (_with(select=SELECT, base={"model_name_or_path": "m", "learning_rate": 1}), "both selected and set"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_before_anything_starts(run, tmp_path, content, message):
    code, out, err = run(content)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "output").exists() and not (tmp_path / "measured").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--jobs", "0"),
        ("--set", "seed"),
        ("--set", "seed=3"),
        ("--only", "("),
        ("--slurm", "a=b"),
        ("--command", "/no/such"),
        ("--command", "foo 'bar"),
        ("--command", " "),
        ("--set", "learning_rate=.nan"),
        ("--output_dir", __file__),
        ("--measured_dir", f"{__file__}/below"),
    ],
)
def test_faulty_flags_are_refused_in_one_line(run, flags):
    code, _, err = run(BASIC, *flags)
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "stopped"), (OSError(errno.ENOSPC, "No space left"), 1, "make room")],
)
def test_what_stops_the_sweep_before_its_runs_is_one_line(run, monkeypatch, error, code, message):
    def stop(*_):
        raise error

    monkeypatch.setattr(sweep, "_wanted", stop)
    got, _, err = run(BASIC)
    assert got == code and message in err and err.count("\n") == 1


def test_a_damaged_record_is_named_and_nothing_starts(run, tmp_path):
    damaged = tmp_path / "measured/trial/lora2-rte-seed=2/results.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"status": "fin')
    code, _, err = run(BASIC)
    assert code == 2 and str(damaged) in err and "delete it" in err
    assert not list((tmp_path / "output").rglob("results.json"))


def test_a_file_s_own_command_gets_the_run_s_arguments(tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    grid = {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]}
    own = f"env METHOD={{method}} {sys.executable} {tmp_path}/run_{{task_name}}.py"
    path.write_text(yaml.safe_dump({"name": "trial", "command": own, "grid": grid, "base": {}}, sort_keys=False))
    for task in grid["task_name"]:
        lines = ["import os, sys, runpy", f"sys.argv += ['--model_name_or_path', os.environ['METHOD'] + '-{task}']"]
        (tmp_path / f"run_{task}.py").write_text(
            "\n".join([*lines, f"runpy.run_path({str(FAKE)!r}, run_name='__main__')"])
        )
    assert sweep.main([str(path), *_places(tmp_path)[2:]]) == 0, capsys.readouterr().err
    models = [record["arguments"]["model_name_or_path"] for record in _records(tmp_path).values()]
    assert models == ["lora-cola", "lora-rte"]
    path.write_text(yaml.safe_dump({"name": "trial", "command": "run_{task}.sh", "grid": grid}))
    with pytest.raises(UsageError, match="'task' is no argument of every run"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/data/glue", "…/glue"),
        ("python nlu/run_glue.py --glue_dir=/a/b/c/ --bf16", "python nlu/run_glue.py --glue_dir=…/c --bf16"),
        ("../shared/data", "../shared/data"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("tokens/s 3 / 4", "tokens/s 3 / 4"),
        ("File '/opt/x/y.py', line 3", "File '…/y.py', line 3"),
    ],
)
def test_portable_takes_folders_out_and_nothing_else(text, expected):
    assert portable({"a": [text, 1, None]}) == {"a": [expected, 1, None]}
    assert portable(expected) == expected


def test_comparable_ignores_places_and_unset_flags():
    one = {"glue_dir": "/a", "model_name_or_path": "/x/encoder", "seed": 1, "bf16": False, "lora_k": None}
    assert comparable(one) == {"model_name_or_path": "encoder", "seed": 1, "bf16": False}


def _wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
