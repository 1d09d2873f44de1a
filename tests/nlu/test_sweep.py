"""The sweep with real child processes (a stand-in for run_glue), and what it does on failures."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from nlu import sweep
from nlu.errors import UsageError
from nlu.experiments import choosing, launchers
from nlu.experiments.experiment import Run, Selection, load_experiment, place_free
from nlu.experiments.records import read_lines
from tests.nlu.test_digests import model
from tests.nlu.tiny import PATIENCE, REPOSITORY, wait_until

FAKE = Path(__file__).with_name("fake_run_glue.py")
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "/models/encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}
ONE = {"method": ["lora"], "task_name": ["cola"], "seed": [1]}


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


def _lines(folder, experiment="trial"):
    return {line["run"]: line for line in read_lines(folder / f"measured/{experiment}.jsonl")}


def _record(folder, run, experiment="trial"):
    return json.loads((folder / f"output/{experiment}/{run}/results.json").read_text())


def test_what_another_experiment_finished_with_the_same_arguments_is_taken_over(run, tmp_path):
    assert run(BASIC | {"name": "first", "grid": ONE})[0] == 0
    first = _lines(tmp_path, "first")["lora-cola-seed=1"]
    ranks = {"eight": {"method": "lora"}, "two": {"method": "lora", "learning_rate": 0.5}}
    second = BASIC | {"name": "second", "grid": {"rank": ranks, "task_name": ["cola"], "seed": [1, 2]}}
    plan = run(second, "--dry_run")[1]
    assert re.search(r"taken over +eight-cola-seed=1\n +finished with .* first/lora-cola-seed=1", plan)
    code, out, err = run(second)
    assert code == 0 and "1 run(s) taken over" in out + err and "3 run(s) finished now, 1 before" in out
    taken = _lines(tmp_path, "second")["eight-cola-seed=1"]
    place = {"run": "eight-cola-seed=1", "label": "eight", "axes": {"rank": "eight", "task_name": "cola", "seed": 1}}
    assert taken == first | place | {"taken_over_from": "first/lora-cola-seed=1"}
    # A row that is added later takes over from one of its own experiment too.
    ranks |= {name: {**ranks["eight"]} for name in ("eight again", "and again")}
    assert "4 run(s) taken over" in "".join(run(second)[1:])
    # Of equal rows that are new together, one runs.
    twice = {"one": {"method": "sora"}, "other": {"method": "sora"}}
    third = BASIC | {"name": "twice", "grid": {"rank": twice, "task_name": ["cola"], "seed": [1]}}
    assert "1 run(s) finished now, 1 before" in run(third)[1]
    # A copy is no source of copies, and hides no original that is listed after it.
    one = {"rank": {"eight": ranks["eight"]}, "task_name": ["cola"], "seed": [1]}
    assert "1 run(s) taken over" in "".join(run(BASIC | {"name": "a-copy", "grid": one})[1:])
    assert "1 run(s) taken over" in "".join(run(BASIC | {"name": "one-more", "grid": one})[1:])
    (tmp_path / "measured/first.jsonl").unlink()
    assert "taken over" not in "".join(run(BASIC | {"name": "third", "grid": one})[1:])


@pytest.mark.parametrize("flag", ["model_name_or_path", "lora_path"])
def test_contents_decide_what_is_the_same_run_and_names_do_not(run, tmp_path, flag):
    """Two warm starts in folders named `adapter`, or two models of one name, are different runs."""
    places = [_content(tmp_path / each, flag, each) for each in "ab"]
    small = {**BASIC, "grid": ONE}
    assert run(small | {"name": "first"}, "--set", f"{flag}={places[0]}")[0] == 0
    assert "taken over" not in "".join(run(small | {"name": "second"}, "--set", f"{flag}={places[1]}")[1:])
    code, _, err = run(small | {"name": "first"}, "--set", f"{flag}={places[1]}")
    assert code == 2 and f"{flag}: other content, " in err and "--rerun_changed" in err and err.count("\n") == 1
    moved = shutil.copytree(tmp_path / "a", tmp_path / "moved") / places[0].name
    assert "0 run(s) finished now, 1 before" in run(small | {"name": "first"}, "--set", f"{flag}={moved}")[1]
    assert "1 run(s) taken over" in "".join(run(small | {"name": "third"}, "--set", f"{flag}={moved}")[1:])
    axis = {"start": {"one": {flag: str(places[0])}, "other": {flag: str(places[1])}}}
    assert run(small | {"name": "fourth", "grid": axis | small["grid"]})[0] == 0
    taken = {line["label"]: line["taken_over_from"] for line in _lines(tmp_path, "fourth").values()}
    assert taken == {"one, LoRA": "first/lora-cola-seed=1", "other, LoRA": "second/lora-cola-seed=1"}
    assert run(small | {"name": "first"}, "--set", f"{flag}={places[1]}", "--rerun_changed")[0] == 0


def _content(folder, flag, text):
    if flag == "model_name_or_path":
        return model(folder / "encoder", text.encode())
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_text(text)
    return folder / "adapter"


def test_every_combination_runs_once_and_leaves_a_portable_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "available_cores", lambda: 8)
    assert run(BASIC, "--jobs", "2", "--set", "glue_dir=/data/glue")[0] == 0
    lines = _lines(tmp_path)
    assert list(lines) == [f"{m}-{t}-seed={s}" for m in ("lora", "lora2") for t in ("cola", "rte") for s in (1, 2)]
    line = lines["lora2-rte-seed=2"]
    assert line["axes"] == {"method": "lora2", "task_name": "rte", "seed": 2} and line["label"] == "LoRA²"
    assert line["asked"] == {"model_name_or_path": "encoder", "bf16": True, **line["axes"]}
    assert str(tmp_path) not in json.dumps(lines) and "/data" not in json.dumps(lines)
    assert _record(tmp_path, "lora2-rte-seed=2")["threads"] == "4"


def test_a_second_sweep_runs_only_what_is_missing(run, tmp_path):
    run(BASIC)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("results.json")}
    path = tmp_path / "measured/trial.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if '"run": "lora-cola-seed=1"' not in line))
    code, out, _ = run(BASIC, "--set", "model_name_or_path=/elsewhere/encoder")  # another place, the same model
    assert code == 0 and "1 run(s) finished now, 7 before" in out
    again = [path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert again == ["lora-cola-seed=1"]
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == [
        json.loads(line)["run"] for line in whole.splitlines()
    ]


def test_changed_arguments_are_refused_before_anything_starts_or_replaced_when_asked(run, tmp_path):
    run({**BASIC, "grid": {**BASIC["grid"], "seed": [1]}})
    code, _, err = run(BASIC, "--set", "learning_rate=0.005")
    assert code == 2 and "learning_rate None → 0.005" in err and "--rerun_changed" in err and err.count("\n") == 1
    assert len(_lines(tmp_path)) == 4  # seed 2 was not started
    assert run(BASIC, "--set", "learning_rate=0.005", "--rerun_changed")[0] == 0
    assert {line["asked"]["learning_rate"] for line in _lines(tmp_path).values()} == {0.005}
    assert _record(tmp_path, "lora-cola-seed=1")["arguments"]["overwrite_output_dir"] is True
    assert _record(tmp_path, "lora-cola-seed=2")["arguments"]["overwrite_output_dir"] is False


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
    status = {name: line["status"] for name, line in _lines(tmp_path).items()}
    assert status == {"lora-cola-seed=1": "failed", "lora-stsb-seed=1": "finished"}
    # A start that leaves no record is not told with the reason of the one before.
    other = content | {"overrides": [{"when": {"task_name": "cola"}, "set": {"weight_decay": 2}}]}
    err = run(other, "--only", "cola")[2]
    assert "target_rank 9 is larger" in err and "the loss is nan" not in err
    fixed = {key: value for key, value in content.items() if key != "overrides"}
    assert run(fixed)[0] == 0
    assert [line["status"] for line in _lines(tmp_path).values()] == ["finished"] * 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_the_runs_and_the_same_command_goes_on(tmp_path, capsys, number, code):
    content = {**BASIC, "base": {**BASIC["base"], "weight_decay": 4}, "grid": {**BASIC["grid"], "task_name": ["cola"]}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, str(REPOSITORY / "nlu/sweep.py"), str(path), "--jobs", "2", *_places(tmp_path)]
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
    assert process.returncode == code and "continues from here" in err
    records = [json.loads(marker.with_name("results.json").read_text()) for marker in first_two]
    assert [record["status"] for record in records] == ["interrupted"] * 2
    assert _lines(tmp_path) == {} and not (tmp_path / "output/trial/lora2-cola-seed=1").exists()
    assert sweep.main([*command[2:], "--only", "lora-"]) == 0, capsys.readouterr().err
    assert [_record(tmp_path, run)["resumes"] for run in _lines(tmp_path)] == [1, 1]


def test_a_run_of_another_command_is_not_taken_over(run, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(FAKE.read_text())
    (tmp_path / "nlu").symlink_to(REPOSITORY / "nlu")
    assert run(BASIC | {"name": "first", "grid": ONE})[0] == 0
    assert _lines(tmp_path, "first")["lora-cola-seed=1"]["started_by"].endswith("…/fake_run_glue.py")
    environment = f"env PYTHONPATH={REPOSITORY} {sys.executable} {own}"
    out = run(BASIC | {"name": "second", "grid": ONE}, "--command", environment)[1]
    assert "1 run(s) finished now, 0 before" in out


def test_a_line_of_a_run_that_the_file_no_longer_gives_is_named(run):
    select = SELECT | {"beyond": {"learning_rate": 2}}
    assert "no longer gives" not in run(BASIC | {"select": select})[2]
    note = run(BASIC | {"grid": BASIC["grid"] | {"method": ["lora"]}, "select": select})[2]
    assert re.search(
        r"note: .*trial.jsonl has \d+ line\(s\) of runs that the file no longer gives \(lora2-cola-seed=1 f", note
    )


def test_an_absolute_path_in_any_argument_changes_nothing(run):
    content = BASIC | {"grid": ONE, "base": BASIC["base"] | {"importance": "/scratch/a"}}
    assert run(content)[0] == 0
    assert "0 run(s) finished now, 1 before" in run(content)[1]


SELECT = {"values": {"learning_rate": [1e-3, 2e-3]}, "seeds": [7], "set": {"holdout_fraction": 0.2}}


def test_the_selection_takes_the_lowest_held_out_loss_and_looks_once_beyond_an_end(run, tmp_path):
    lora = {"when": {"method": "lora"}, "values": {"learning_rate": ["1e-4", 4e-4]}, "set": {"importance": "full"}}
    select = {"beyond": {"learning_rate": 2}, "seeds": [101, 102], "overrides": [lora]}
    content = BASIC | {"select": SELECT | select | {"values": {"learning_rate": [1e-3, 2e-3, 4e-3]}}}
    dry = run(content, "--dry_run")
    assert dry[0] == 0 and dry[1].count("--learning_rate CHOSEN-BY-THE-SELECTION") == 8
    assert not (tmp_path / "output").exists()
    code, out, _ = run(content, "--jobs", "4")
    # (3 + 2) values × 2 tasks × 2 seeds, one more rate for each task and seed of lora, and 8.
    assert code == 0 and "32 run(s) finished now" in out
    lines = _lines(tmp_path)
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
    code, out, _ = run(content)
    assert code == 0 and "0 run(s) finished now, 32 before" in out


def test_two_arguments_are_chosen_together(run, tmp_path):
    select = SELECT | {"values": {"learning_rate": [1e-3, 2e-3], "lora_alpha": [2, 16]}}
    assert run({**BASIC, "grid": ONE, "select": select})[0] == 0
    lines = _lines(tmp_path)
    assert sum(line["stage"] == "select" for line in lines.values()) == 4
    assert lines["lora-cola-seed=1"]["tried"] == {"learning_rate": 2e-3, "lora_alpha": 2}  # equal losses: the first


def test_what_set_names_holds_for_the_selection_too(run, tmp_path):
    content = {**BASIC, "grid": ONE, "select": SELECT | {"set": {"holdout_fraction": 0.2, "max_steps": 50}}}
    assert run(content, "--set", "max_steps=1")[0] == 0
    assert {line["asked"]["max_steps"] for line in _lines(tmp_path).values()} == {1}
    for value in ("null", "0.1"):
        said = run(content, "--set", f"holdout_fraction={value}")[2]
        assert "--set holdout_fraction is the tuning stage's own" in said
    content["base"] = BASIC["base"] | {"holdout_fraction": 0.1}
    code, _, said = run(content)
    assert code == 2 and "choose by the rows that the final runs are scored on" in said


def test_models_of_one_name_on_the_hub_are_two(tmp_path):
    names = [place_free({"model_name_or_path": name}) for name in ("a/bert", "b/bert", "/models/bert", "./x/bert")]
    assert [named["model_name_or_path"] for named in names] == ["a/bert", "b/bert", "bert", "bert"]


@pytest.mark.parametrize("ends", [2, 3])  # refused, which may pass; killed
def test_a_tuning_run_without_a_record_is_waited_for(run, tmp_path, ends):
    content = {**BASIC, "grid": ONE, "select": SELECT | {"values": {"weight_decay": [0.5, ends]}}}
    code, _, err = run(content)
    assert code == 1 and "its selection is not complete" in err and len(_lines(tmp_path)) == 1


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


def test_a_value_whose_run_failed_is_never_chosen_and_no_value_at_all_blocks(run, tmp_path):
    content = {
        **BASIC,
        "grid": ONE | {"method": ["lora", "lora2"]},
        "select": SELECT | {
            "values": {"weight_decay": [1, 0.5]},  # 1 makes the stand-in fail with a record
            "overrides": [{"when": {"method": "lora2"}, "values": {"weight_decay": [1]}}],
        },
    }  # fmt: skip
    code, _, err = run(content)
    assert code == 1 and "failed: lora2-cola-seed=1: its selection is not complete" in err
    final = [line for line in _lines(tmp_path).values() if line["stage"] == "final"]
    assert [(line["label"], line["tried"]) for line in final] == [("LoRA", {"weight_decay": 0.5})]


def test_only_keeps_matching_runs_and_the_selection_that_they_need(run, tmp_path):
    assert run({**BASIC, "select": SELECT}, "--only", "^lora2-.*seed=1$")[0] == 0
    assert list(_lines(tmp_path)) == [
        "lora2-cola-seed=1",
        "lora2-rte-seed=1",
        *(f"select/lora2-{task}-learning_rate={rate}-seed=7" for task in ("cola", "rte") for rate in (0.001, 0.002)),
    ]
    assert run(BASIC, "--only", "nothing")[0] == 2


def test_the_slurm_launcher_runs_the_same_sweep_as_jobs(run, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte"], "seed": [1]},
        "overrides": [{"when": {"task_name": "rte"}, "set": {"weight_decay": 2}}],
    }
    code, out, err = run(content, "--launcher", "slurm", "--slurm", "cluster=local", "--slurm", "timeout_min=10")
    assert code == 1 and "1 run(s) finished now" in out and "target_rank 9 is larger" in err
    assert list(_lines(tmp_path)) == ["lora-cola-seed=1"]
    for wrong in ("nonsense_parameter=1", "timeout_min=abc"):
        code, _, err = run(BASIC, "--launcher", "slurm", "--slurm", wrong, "--slurm", "cluster=local")
        assert code == 2 and err.startswith("error: submitit: ")


def test_a_job_that_slurm_refuses_is_a_failed_run_and_the_first_one_ends_the_sweep(run, tmp_path, monkeypatch):
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
    for flags, says in (([], "add --slurm timeout_min"), (["timeout_min=9", "slurm_nodes=0"], "nodes=0")):
        code, _, err = run(content, "--launcher", "slurm", *[word for flag in flags for word in ("--slurm", flag)])
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    code, out, err = run(content, "--launcher", "slurm", "--slurm", "timeout_min=9")
    assert code == 1 and "1 run(s) finished now" in out and list(_lines(tmp_path)) == ["lora-cola-seed=1"]
    assert "failed: lora-rte-seed=1: exit code 1: submitit: sbatch: error: AssocMaxSubmitJobLimit" in err
    code, _, err = run(content, "--launcher", "slurm", "--slurm", "timeout_min=9")
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
def test_faulty_flags_are_refused_in_one_line(run, flags):
    code, _, err = run(BASIC, *flags)
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: ")


def test_a_damaged_line_is_named_and_nothing_starts_where_it_is_the_sweep_s_own(run, tmp_path, caplog):
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured/neighbour.jsonl").write_text('{"status": "fin')
    assert run(BASIC | {"name": "first", "grid": ONE})[0] == 0
    assert ["neighbour.jsonl:1: damaged" in message for message in caplog.messages] == [True]
    (tmp_path / "measured/trial.jsonl").write_text('{"status": "fin')
    code, _, err = run(BASIC)
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
    assert sweep.main([str(path), *_places(tmp_path)[2:]]) == 0, capsys.readouterr().err
    models = [_record(tmp_path, run)["arguments"]["model_name_or_path"] for run in _lines(tmp_path)]
    assert models == ["lora-cola", "lora-rte"]
    own = {
        "command": "env METHOD={method} bash scripts/run_debertav3_{task_name}.sh",
        "grid": grid,
        "base": {"bf17": True},
    }
    path.write_text(yaml.safe_dump({"name": "scripts", **own}))
    monkeypatch.chdir(tmp_path)  # the file's paths are the repository's
    assert sweep.main([str(path), *_places(tmp_path)[2:]]) == 2 and "did you mean --bf16?" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({"name": "trial", "command": "run_{task}.sh", "grid": grid}))
    with pytest.raises(UsageError, match="'task' is not an argument of every run"):
        load_experiment(path)


def test_one_s_own_files_stand_in_for_a_task_and_no_folder_is_recorded(run, tmp_path):
    for name in ("train", "other", "dev"):
        (tmp_path / f"{name}.csv").write_text(f"sentence,label\n{name},1\n")
    base = {**BASIC["base"], "validation_file": str(tmp_path / "dev.csv")}
    grid = {"method": ["lora"], "train_file": [str(tmp_path / f"{name}.csv") for name in ("train", "other")]}
    content = {"name": "own", "base": base, "grid": {**grid, "seed": [1]}}
    code, _, err = run(content)
    assert code == 0, err
    lines = _lines(tmp_path, "own")
    assert {line["label"] for line in lines.values()} == {"LoRA, train.csv", "LoRA, other.csv"}
    assert set(lines) == {"lora-train.csv-seed=1", "lora-other.csv-seed=1"} and str(tmp_path) not in json.dumps(lines)
    (tmp_path / "other.csv").write_text("sentence,label\nother,0\n")
    code, _, err = run(content)
    assert code == 2 and "train_file: other content" in err and "lora-other.csv" in err
    code, _, err = run({**content, "grid": {"method": ["lora"], "seed": [1]}})
    assert code == 2 and "no task_name is given" in err


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
