"""The sweep with real child processes (a stand-in for run_glue), and what it does on failures."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import yaml

from nlu import sweep
from nlu.errors import UsageError
from nlu.experiments import launchers
from nlu.experiments.experiment import load_experiment, place_free
from tests.nlu.sweeps import BASIC, FAKE, ONE, SELECT, lines_of, places_of, record_of
from tests.nlu.test_digests import model
from tests.nlu.tiny import PATIENCE, REPOSITORY, wait_until


def test_what_another_experiment_finished_with_the_same_arguments_is_taken_over(run_sweep, tmp_path):
    assert run_sweep(BASIC | {"name": "first", "grid": ONE})[0] == 0
    first = lines_of(tmp_path, "first")["lora-cola-seed=1"]
    ranks = {"eight": {"method": "lora"}, "two": {"method": "lora", "learning_rate": 0.5}}
    second = BASIC | {"name": "second", "grid": {"rank": ranks, "task_name": ["cola"], "seed": [1, 2]}}
    plan = run_sweep(second, "--dry_run")[1]
    assert re.search(r"taken over +eight-cola-seed=1\n +finished with .* first/lora-cola-seed=1", plan)
    code, out, err = run_sweep(second)
    assert code == 0 and "1 run(s) taken over" in out + err and "3 run(s) finished now, 1 before" in out
    taken = lines_of(tmp_path, "second")["eight-cola-seed=1"]
    place = {"run": "eight-cola-seed=1", "label": "eight", "axes": {"rank": "eight", "task_name": "cola", "seed": 1}}
    assert taken == first | place | {"taken_over_from": "first/lora-cola-seed=1"}
    # A number is the same whether it is written with a point or without.
    whole = {"eight": {"method": "lora", "lora_alpha": 8}}, {"eight": {"method": "lora", "lora_alpha": 8.0}}
    for name, rows in zip(("whole", "point"), whole, strict=True):
        said = run_sweep(BASIC | {"name": name, "grid": {"rank": rows, "task_name": ["cola"], "seed": [1]}})
    assert "1 run(s) taken over" in "".join(said[1:])
    # A row that is added later takes over from one of its own experiment too.
    ranks |= {name: {**ranks["eight"]} for name in ("eight again", "and again")}
    assert "4 run(s) taken over" in "".join(run_sweep(second)[1:])
    # Of equal rows that are new together, one runs.
    twice = {"one": {"method": "sora"}, "other": {"method": "sora"}}
    third = BASIC | {"name": "twice", "grid": {"rank": twice, "task_name": ["cola"], "seed": [1]}}
    assert "1 run(s) finished now, 1 before" in run_sweep(third)[1]
    # A copy is no source of copies, and hides no original that is listed after it.
    one = {"rank": {"eight": ranks["eight"]}, "task_name": ["cola"], "seed": [1]}
    assert "1 run(s) taken over" in "".join(run_sweep(BASIC | {"name": "a-copy", "grid": one})[1:])
    assert "1 run(s) taken over" in "".join(run_sweep(BASIC | {"name": "one-more", "grid": one})[1:])
    (tmp_path / "measured/first.jsonl").unlink()
    assert "taken over" not in "".join(run_sweep(BASIC | {"name": "third", "grid": one})[1:])


@pytest.mark.parametrize("flag", ["model_name_or_path", "lora_path"])
def test_contents_decide_what_is_the_same_run_and_names_do_not(run_sweep, tmp_path, flag):
    """Two warm starts in folders named `adapter`, or two models of one name, are different runs."""
    places = [_content(tmp_path / each, flag, each) for each in "ab"]
    small = {**BASIC, "grid": ONE}
    assert run_sweep(small | {"name": "first"}, "--set", f"{flag}={places[0]}")[0] == 0
    assert "taken over" not in "".join(run_sweep(small | {"name": "second"}, "--set", f"{flag}={places[1]}")[1:])
    code, _, err = run_sweep(small | {"name": "first"}, "--set", f"{flag}={places[1]}")
    assert code == 2 and f"{flag}: other content, " in err and "--rerun_changed" in err and err.count("\n") == 1
    moved = shutil.copytree(tmp_path / "a", tmp_path / "moved") / places[0].name
    assert "0 run(s) finished now, 1 before" in run_sweep(small | {"name": "first"}, "--set", f"{flag}={moved}")[1]
    assert "1 run(s) taken over" in "".join(run_sweep(small | {"name": "third"}, "--set", f"{flag}={moved}")[1:])
    axis = {"start": {"one": {flag: str(places[0])}, "other": {flag: str(places[1])}}}
    assert run_sweep(small | {"name": "fourth", "grid": axis | small["grid"]})[0] == 0
    taken = {line["label"]: line["taken_over_from"] for line in lines_of(tmp_path, "fourth").values()}
    assert taken == {"one, LoRA": "first/lora-cola-seed=1", "other, LoRA": "second/lora-cola-seed=1"}
    assert run_sweep(small | {"name": "first"}, "--set", f"{flag}={places[1]}", "--rerun_changed")[0] == 0


def _content(folder, flag, text):
    if flag == "model_name_or_path":
        return model(folder / "encoder", text.encode())
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_text(text)
    return folder / "adapter"


def test_every_combination_runs_once_and_leaves_a_portable_line(run_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_sweep(BASIC, "--jobs", "2", "--set", "glue_dir=/data/glue")[0] == 0
    lines = lines_of(tmp_path)
    assert list(lines) == [f"{m}-{t}-seed={s}" for m in ("lora", "lora2") for t in ("cola", "rte") for s in (1, 2)]
    line = lines["lora2-rte-seed=2"]
    assert line["axes"] == {"method": "lora2", "task_name": "rte", "seed": 2} and line["label"] == "LoRA²"
    assert line["asked"] == {"model_name_or_path": "encoder", "bf16": True, **line["axes"]}
    assert str(tmp_path) not in json.dumps(lines) and "/data" not in json.dumps(lines)
    assert record_of(tmp_path, "lora2-rte-seed=2")["threads"] == "4"


def test_a_second_sweep_runs_only_what_is_missing(run_sweep, tmp_path):
    run_sweep(BASIC)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("results.json")}
    path = tmp_path / "measured/trial.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if '"run": "lora-cola-seed=1"' not in line))
    code, out, _ = run_sweep(BASIC, "--set", "model_name_or_path=/elsewhere/encoder")  # another place, the same model
    assert code == 0 and "1 run(s) finished now, 7 before" in out
    again = [path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert again == ["lora-cola-seed=1"]
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == [
        json.loads(line)["run"] for line in whole.splitlines()
    ]


def test_a_finished_run_has_the_labels_that_its_file_has_now(run_sweep, tmp_path):
    def content(axis, label):
        return BASIC | {"grid": {axis: {label: {"method": "lora"}}, "task_name": ["cola"], "seed": [1]}}

    assert run_sweep(content("row", "LoRA2 k8"))[0] == 0
    for axis, label in (("row", "LoRA² k8"), ("variant", "LoRA² k8")):  # of one folder name
        code, out, _ = run_sweep(content(axis, label))
        assert code == 0 and "0 run(s) finished now, 1 before" in out
        (line,) = lines_of(tmp_path).values()
        assert line["label"] == label and line["axes"][axis] == label and len(line["axes"]) == 3


def test_a_row_keeps_one_label_where_a_part_of_it_is_asked_for(run_sweep, tmp_path):
    def content(label):
        return BASIC | {"grid": {"row": {label: {"method": "lora"}}, "task_name": ["cola", "rte"], "seed": [1]}}

    assert run_sweep(content("LoRA2 k8"))[0] == 0
    assert run_sweep(content("LoRA² k8"), "--only", "cola")[0] == 0
    assert {line["label"] for line in lines_of(tmp_path).values()} == {"LoRA² k8"}


def test_a_value_tried_beyond_the_end_and_listed_later_is_one_of_the_list(run_sweep, tmp_path):
    def content(*values, **more):
        select = {"values": {"learning_rate": [*values]}, "seeds": [7], "set": {"holdout_fraction": 0.2}}
        return BASIC | {"grid": {"method": ["lora"], "task_name": ["cola"], "seed": [1]}, "select": select | more}

    assert run_sweep(content(1e-4, 1e-3, beyond={"learning_rate": 3}))[0] == 0
    assert [line["tried"] for line in lines_of(tmp_path).values() if "extra" in line] == [{"learning_rate": 3e-3}]
    assert "0 run(s) finished now" in run_sweep(content(1e-4, 1e-3, 3e-3))[1]
    assert not any("extra" in line for line in lines_of(tmp_path).values())


def test_changed_arguments_are_refused_before_anything_starts_or_replaced_when_asked(run_sweep, tmp_path):
    run_sweep({**BASIC, "grid": {**BASIC["grid"], "seed": [1]}})
    code, _, err = run_sweep(BASIC, "--set", "learning_rate=0.005")
    assert code == 2 and "learning_rate None → 0.005" in err and "--rerun_changed" in err and err.count("\n") == 1
    assert len(lines_of(tmp_path)) == 4  # seed 2 was not started
    assert run_sweep(BASIC, "--set", "learning_rate=0.005", "--rerun_changed")[0] == 0
    assert {line["asked"]["learning_rate"] for line in lines_of(tmp_path).values()} == {0.005}
    assert record_of(tmp_path, "lora-cola-seed=1")["arguments"]["overwrite_output_dir"] is True
    assert record_of(tmp_path, "lora-cola-seed=2")["arguments"]["overwrite_output_dir"] is False


def test_failing_runs_do_not_stop_the_others(run_sweep, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte", "mrpc", "stsb"], "seed": [1]},
        "overrides": [
            {"when": {"task_name": task}, "set": {"weight_decay": kind}}
            for task, kind in (("cola", 1), ("rte", 2), ("mrpc", 3))
        ],
    }
    code, out, err = run_sweep(content)
    assert code == 1 and "1 run(s) finished now, 0 before, 3 failed" in out
    assert "the loss is nan at step 3" in err
    assert "exit code 2: error: target_rank 9 is larger than lora_r 8" in err
    assert re.search(r"lora-mrpc-seed=1: exit code -9", err)
    status = {name: line["status"] for name, line in lines_of(tmp_path).items()}
    assert status == {"lora-cola-seed=1": "failed", "lora-stsb-seed=1": "finished"}
    # A start that leaves no record is not told with the reason of the one before.
    other = content | {"overrides": [{"when": {"task_name": "cola"}, "set": {"weight_decay": 2}}]}
    err = run_sweep(other, "--only", "cola")[2]
    assert "target_rank 9 is larger" in err and "the loss is nan" not in err
    fixed = {key: value for key, value in content.items() if key != "overrides"}
    assert run_sweep(fixed)[0] == 0
    assert [line["status"] for line in lines_of(tmp_path).values()] == ["finished"] * 4


@pytest.mark.parametrize(
    ("kind", "says"), [(5, "exit code 1: error: the adapter cannot be uploaded"), (6, "results.json cannot be read")]
)
def test_a_run_that_fails_at_its_very_end_is_told_and_the_next_one_runs(run_sweep, tmp_path, kind, says):
    """After its record has finished, or amid the writing of it."""
    worse = {"when": {"task_name": "cola"}, "set": {"weight_decay": kind}}
    grid = {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]}
    code, out, err = run_sweep(BASIC | {"grid": grid, "overrides": [worse]})
    assert code == 1 and "1 run(s) finished now, 0 before, 1 failed" in out
    assert re.search(f"failed: lora-cola-seed=1: .*{says}", err) and "lora-rte-seed=1" in lines_of(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_the_runs_and_the_same_command_goes_on(tmp_path, capsys, number, code):
    content = {**BASIC, "base": {**BASIC["base"], "weight_decay": 4}, "grid": {**BASIC["grid"], "task_name": ["cola"]}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, str(REPOSITORY / "nlu/sweep.py"), str(path), "--jobs", "2", *places_of(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # The tests themselves may run under nohup, and what ignores SIGHUP hands that on.
    process = subprocess.Popen(command, **pipes, preexec_fn=partial(signal.signal, number, signal.SIG_DFL))
    first_two = [tmp_path / f"output/trial/lora-cola-seed={seed}/started" for seed in (1, 2)]
    try:
        wait_until(lambda: all(marker.exists() for marker in first_two))
        assert sweep.main(command[2:]) == 2 and "another sweep is running" in capsys.readouterr().err
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code and "continues from here" in err and "failed" not in err
    records = [json.loads(marker.with_name("results.json").read_text()) for marker in first_two]
    assert [record["status"] for record in records] == ["interrupted"] * 2
    assert lines_of(tmp_path) == {} and not (tmp_path / "output/trial/lora2-cola-seed=1").exists()
    assert sweep.main([*command[2:], "--only", "lora-"]) == 0, capsys.readouterr().err
    assert [record_of(tmp_path, run)["resumes"] for run in lines_of(tmp_path)] == [1, 1]


def test_a_run_of_another_command_is_not_taken_over(run_sweep, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(FAKE.read_text())
    (tmp_path / "nlu").symlink_to(REPOSITORY / "nlu")
    assert run_sweep(BASIC | {"name": "first", "grid": ONE})[0] == 0
    assert lines_of(tmp_path, "first")["lora-cola-seed=1"]["started_by"].endswith("…/fake_run_glue.py")
    environment = f"env PYTHONPATH={REPOSITORY} {sys.executable} {own}"
    out = run_sweep(BASIC | {"name": "second", "grid": ONE}, "--command", environment)[1]
    assert "1 run(s) finished now, 0 before" in out


def test_a_line_of_a_run_that_the_file_no_longer_gives_is_named(run_sweep):
    select = SELECT | {"beyond": {"learning_rate": 2}}
    assert "no longer gives" not in run_sweep(BASIC | {"select": select})[2]
    note = run_sweep(BASIC | {"grid": BASIC["grid"] | {"method": ["lora"]}, "select": select})[2]
    assert re.search(
        r"note: .*trial.jsonl has \d+ line\(s\) of runs that the file no longer gives \(lora2-cola-seed=1 f", note
    )


def test_an_absolute_path_in_any_argument_changes_nothing(run_sweep):
    content = BASIC | {"grid": ONE, "base": BASIC["base"] | {"importance": "/scratch/a"}}
    assert run_sweep(content)[0] == 0
    assert "0 run(s) finished now, 1 before" in run_sweep(content)[1]


def test_the_slurm_launcher_runs_the_same_sweep_as_jobs(run_sweep, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]},
        "overrides": [{"when": {"task_name": "rte"}, "set": {"weight_decay": 2}}],
    }
    code, out, err = run_sweep(content, "--launcher", "slurm", "--slurm", "cluster=local", "--slurm", "timeout_min=10")
    assert code == 1 and "1 run(s) finished now" in out and "target_rank 9 is larger" in err
    assert list(lines_of(tmp_path)) == ["lora-cola-seed=1"]
    for wrong in ("nonsense_parameter=1", "timeout_min=abc"):
        code, _, err = run_sweep(BASIC, "--launcher", "slurm", "--slurm", wrong, "--slurm", "cluster=local")
        assert code == 2 and err.startswith("error: submitit: ")


def test_a_job_that_slurm_refuses_is_a_failed_run_and_the_first_one_ends_the_sweep(run_sweep, tmp_path, monkeypatch):
    programs = {
        "sbatch": """[ ! -e "$0.full" ] || { echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1; }
                     touch "$0.full"; script=$(cat "$1")  # submitit moves the file at once
                     SLURM_JOB_ID=7 sh -c "$script" >"$0.out" 2>&1 & echo "Submitted batch job 7" """,
        "srun": 'shift 5; exec "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    content = BASIC | {"grid": {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]}}
    for flags, says in (
        ([], "add --slurm timeout_min"),
        (["timeout_min=9", "tasks_per_node=2"], "tasks_per_node would start each run"),
    ):
        code, _, err = run_sweep(
            content, "--launcher", "slurm", *[word for flag in flags for word in ("--slurm", flag)]
        )
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    code, out, err = run_sweep(content, "--launcher", "slurm", "--slurm", "timeout_min=9")
    assert code == 1 and "1 run(s) finished now" in out and list(lines_of(tmp_path)) == ["lora-cola-seed=1"]
    assert "failed: lora-rte-seed=1: exit code 1: submitit: sbatch: error: AssocMaxSubmitJobLimit" in err
    code, _, err = run_sweep(content, "--launcher", "slurm", "--slurm", "timeout_min=9")
    assert code == 2 and err.splitlines()[-1] == "error: submitit: sbatch: error: AssocMaxSubmitJobLimit; check --slurm"


@pytest.mark.parametrize(
    "flags",
    [
        ("--dryrun",),
        ("--jobs", "0"),
        ("--set", "seed"),
        ("--set", "max_steps="),
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
def test_faulty_flags_are_refused_in_one_line(run_sweep, flags):
    code, _, err = run_sweep(BASIC, *flags)
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ")


def test_a_damaged_line_is_named_and_nothing_starts_where_it_is_the_sweep_s_own(run_sweep, tmp_path, caplog):
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/neighbour.jsonl").write_text('{"status": "fin')
    assert run_sweep(BASIC | {"name": "first", "grid": ONE})[0] == 0
    assert ["neighbour.jsonl:1: damaged" in message for message in caplog.messages] == [True]
    (tmp_path / "measured/trial.jsonl").write_text('{"status": "fin')
    code, _, err = run_sweep(BASIC)
    assert code == 2 and f"{tmp_path}/measured/trial.jsonl:1: damaged" in err and "delete it" in err
    assert not list((tmp_path / "output/trial").rglob("results.json"))


def test_a_file_s_own_command_gets_the_run_s_arguments(tmp_path, capsys, monkeypatch):
    path = tmp_path / "experiment.yaml"
    grid = {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]}
    own = f"env METHOD={{method}} {sys.executable} {tmp_path}/run_{{task_name}}.py"
    path.write_text(yaml.safe_dump({"name": "trial", "command": own, "grid": grid, "base": {}}, sort_keys=False))
    for task in grid["task_name"]:
        lines = ["import os, sys, runpy", f"sys.argv += ['--model_name_or_path', os.environ['METHOD'] + '-{task}']"]
        (tmp_path / f"run_{task}.py").write_text(
            "\n".join([*lines, f"runpy.run_path({str(FAKE)!r}, run_name='__main__')"])
        )
    assert sweep.main([str(path), *places_of(tmp_path)[2:]]) == 0, capsys.readouterr().err
    models = [record_of(tmp_path, run)["arguments"]["model_name_or_path"] for run in lines_of(tmp_path)]
    assert models == ["lora-cola", "lora-rte"]
    own = {
        "command": "env METHOD={method} bash scripts/run_debertav3_{task_name}.sh",
        "grid": grid,
        "base": {"bf17": True},
    }
    path.write_text(yaml.safe_dump({"name": "scripts", **own}))
    monkeypatch.chdir(tmp_path)  # the file's paths are the repository's
    assert sweep.main([str(path), *places_of(tmp_path)[2:]]) == 2 and "did you mean --bf16?" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({"name": "scripts", **own}).replace("debertav3", "absent"))
    assert sweep.main([str(path), *places_of(tmp_path)[2:]]) == 2
    error = capsys.readouterr().err
    assert "scripts/run_absent_cola.sh" in error and "start it in a clone" in error and error.count("\n") == 1
    path.write_text(yaml.safe_dump({"name": "trial", "command": "run_{task}.sh", "grid": grid}))
    with pytest.raises(UsageError, match="'task' is not an argument of every run"):
        load_experiment(path)


def test_one_s_own_files_stand_in_for_a_task_and_no_folder_is_recorded(run_sweep, tmp_path):
    for name in ("train", "other", "dev"):
        (tmp_path / f"{name}.csv").write_text(f"sentence,label\n{name},1\n")
    base = {**BASIC["base"], "validation_file": str(tmp_path / "dev.csv")}
    grid = {"method": ["lora"], "train_file": [str(tmp_path / f"{name}.csv") for name in ("train", "other")]}
    content = {"name": "own", "base": base, "grid": {**grid, "seed": [1]}}
    code, _, err = run_sweep(content)
    assert code == 0, err
    lines = lines_of(tmp_path, "own")
    assert {line["label"] for line in lines.values()} == {"LoRA, train.csv", "LoRA, other.csv"}
    assert set(lines) == {"lora-train.csv-seed=1", "lora-other.csv-seed=1"} and str(tmp_path) not in json.dumps(lines)
    (tmp_path / "other.csv").write_text("sentence,label\nother,0\n")
    code, _, err = run_sweep(content)
    assert code == 2 and "train_file: other content" in err and "lora-other.csv" in err
    code, _, err = run_sweep({**content, "grid": {"method": ["lora"], "seed": [1]}})
    assert code == 2 and "no task_name is given" in err


def test_models_of_one_name_on_the_hub_are_two(tmp_path):
    names = [place_free({"model_name_or_path": name}) for name in ("a/bert", "b/bert", "/models/bert", "./x/bert")]
    assert [named["model_name_or_path"] for named in names] == ["a/bert", "b/bert", "bert", "bert"]


def test_a_folder_named_on_the_command_line_stays_text():
    texts = ["model_name_or_path=2024", "glue_dir=2024.10", "max_steps=5", "lora_path=null"]
    expected = {"model_name_or_path": "2024", "glue_dir": "2024.10", "max_steps": 5, "lora_path": None}
    assert sweep._pairs(texts, "--set") == expected
