"""The sweep with a stand-in for run_glue: its lines, failed runs, its loop, and how it starts runs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import yaml

from loralib.files import write_text
from nlu import ROOT
from nlu.errors import UsageError
from nlu.experiments.experiment import make_experiment
from nlu.experiments.figures import Drawing
from nlu.experiments.launcher import Launcher
from nlu.experiments.page import write_report
from nlu.experiments.sweep_loop import Sweep
from nlu.runs.machine import git_commit
from nlu.runs.signals import handled_by
from tests.nlu import sweeps
from tests.nlu.sweeps import BASIC, ONE, lines_of, places_of, record_of
from tests.nlu.tiny import PATIENCE, wait_until


def glue(folder):
    """A folder with the names of GLUE's files for CoLA and RTE."""
    for task in ("CoLA", "RTE"):
        (folder / "glue" / task).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / "glue" / task / f"{split}.tsv").touch()
    return folder / "glue"


def test_every_combination_runs_once_and_leaves_a_portable_line(run_sweep, tmp_path):
    flags = (
        f"--jobs 2 --set glue_dir={glue(tmp_path)} --set model_name_or_path=2024 --set lora_path=null --set max_steps=5"
    )
    assert run_sweep(BASIC, *flags.split())[0] == 0
    lines = lines_of(tmp_path)
    assert list(lines) == [f"{m}-{t}-seed={s}" for m in ("lora", "lora2") for t in ("cola", "rte") for s in (1, 2)]
    line = lines["lora2-rte-seed=2"]
    assert line["axes"] == {"method": "lora2", "task_name": "rte", "seed": 2} and line["label"] == "LoRA²"
    # A path that looks like a number stays text.
    given = BASIC["base"] | {"model_name_or_path": "2024", "max_steps": 5, **line["axes"]}
    assert line["arguments"] == given | {"method_config": "lora2", "target_rank": 4}
    assert str(tmp_path) not in json.dumps(lines)


def test_a_second_sweep_runs_only_what_is_missing(run_sweep, tmp_path):
    run_sweep(BASIC)
    path = tmp_path / "measured/trial.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if '"run": "lora-cola-seed=1"' not in line))
    more = BASIC | {"grid": BASIC["grid"] | {"seed": [1, 2, 3]}}
    shown = run_sweep(more, "--dry_run", "--only", "lora-cola")[1]
    assert re.findall(r"^(finished|to do) +(\S+)$", shown, re.M) == [
        ("finished", "lora-cola-seed=1"), ("finished", "lora-cola-seed=2"), ("to do", "lora-cola-seed=3")
    ]  # fmt: skip
    code, out, _ = run_sweep(BASIC, "--set", "model_name_or_path=/elsewhere/encoder")  # another place, the same model
    assert code == 0 and "1 run(s) finished now" in out
    assert path.read_text() == whole


def test_changed_arguments_are_refused_before_anything_starts_or_replaced_when_asked(run_sweep, tmp_path):
    run_sweep({**BASIC, "grid": {**BASIC["grid"], "seed": [1]}})
    code, _, err = run_sweep(BASIC, "--set", "learning_rate=0.005")
    assert code == 2 and "contents (learning_rate 0.001 → 0.005); pass --rerun_changed" in err and err.count("\n") == 1
    assert len(lines_of(tmp_path)) == 4  # seed 2 was not started
    assert run_sweep(BASIC, "--set", "learning_rate=0.005", "--rerun_changed")[0] == 0
    rows = BASIC | {"grid": ONE, "base": BASIC["base"] | {"learning_rate": 0.005}}
    for earlier, new, changed in [
        ("per_device_train_batch_size=8", "per_device_train_batch_size=16", "per_device_train_batch_size 8 → 16"),
        ("total_batch_size=48", "total_batch_size=64", "total_batch_size 48 → 64"),
        ("total_batch_size=48", "total_batch_size=48", ""),
    ]:
        assert run_sweep(rows, "--set", earlier, "--rerun_changed")[0] == 0
        code, _, err = run_sweep(rows, "--set", new)
        assert (code, f"contents ({changed})" in err) == ((2, True) if changed else (0, False))
    assert {line["arguments"]["learning_rate"] for line in lines_of(tmp_path).values()} == {0.005}
    assert record_of(tmp_path, "lora-cola-seed=1")["arguments"]["overwrite_output_dir"] is True


def test_changed_contents_are_refused_and_a_moved_folder_is_not(run_sweep, tmp_path):
    places = [tmp_path / each / "encoder" for each in "ab"]
    for place in places:
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text(str(place))
    small = BASIC | {"grid": ONE}
    assert run_sweep(small, "--set", f"model_name_or_path={places[0]}")[0] == 0
    code, _, err = run_sweep(small, "--set", f"model_name_or_path={places[1]}")
    assert code == 2 and "(contents of model_name_or_path)" in err and err.count("\n") == 1
    moved = places[0].rename(tmp_path / "encoder")
    _, out, err = run_sweep(small, "--set", f"model_name_or_path={moved}")
    assert "0 run(s) finished now" in out and re.search(r"1/1 .*\?run/s", err)  # the time left is unknown


def test_failing_runs_do_not_stop_the_others(run_sweep, tmp_path):
    content = {
        **BASIC,
        "grid": {"method": ["lora"], "task_name": ["cola", "rte", "mrpc", "qnli", "wnli", "stsb"], "seed": [1]},
        "overrides": [
            {"when": {"task_name": task}, "set": {"weight_decay": kind}}
            for task, kind in (("cola", 1), ("rte", 2), ("mrpc", 3), ("qnli", 5), ("wnli", 6))
        ],
    }
    code, out, err = run_sweep(content)
    assert code == 1 and "1 run(s) finished now, 5 failed" in out
    assert "the loss is nan at step 3" in err
    assert "exit code 2: error: target_rank 9 is larger than lora_r 8" in err
    assert re.search(r"lora-mrpc-seed=1: exit code -9", err) and "the adapter cannot be uploaded" in err
    status = {name: line["status"] for name, line in lines_of(tmp_path).items()}
    expected = {"cola": "failed", "qnli": "finished", "stsb": "finished"}
    assert status == {f"lora-{task}-seed=1": state for task, state in expected.items()}
    # A failure without a record is not reported with the reason of the failure before it.
    other = content | {"overrides": [{"when": {"task_name": "cola"}, "set": {"weight_decay": 2}}]}
    err = run_sweep(other, "--only", "cola")[2]
    assert "target_rank 9 is larger" in err and "the loss is nan" not in err


def test_rerun_of_a_failed_run_removes_its_old_line_once_it_has_started(run_sweep, tmp_path):
    """The line may be all that is left of the run, and a command that cannot start replaces nothing."""
    content = BASIC | {"grid": ONE | {"seed": [1, 2, 3]}, "base": BASIC["base"] | {"weight_decay": 1}}
    assert run_sweep(content)[0] == 1 and len(lines_of(tmp_path)) == 3
    seen = []

    def cannot_start(command, log, group):
        seen.append("--overwrite_output_dir" in command)
        raise UsageError("enough")

    with pytest.raises(UsageError, match="enough"):
        sweep_here(tmp_path, cannot_start, content)
    assert all(seen) and len(lines_of(tmp_path)) == 3
    seen.clear()
    started = SimpleNamespace(wait=lambda: seen.append(list(lines_of(tmp_path))) or 2)
    sweep_here(tmp_path, lambda *_: started, content)
    assert seen[:2] == [["lora-cola-seed=2", "lora-cola-seed=3"], ["lora-cola-seed=3"]]


def test_a_run_whose_command_drops_an_argument_has_no_line(tmp_path, capsys):
    def start(command, log, group):
        code = sweeps.main([word for word in command[1:] if not word.startswith("--seed")])
        return SimpleNamespace(wait=lambda: code)

    assert sweep_here(tmp_path, start, BASIC | {"grid": ONE}) == 1 and lines_of(tmp_path) == {}
    assert "it ran with other arguments than asked for (seed 42 → 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_sweep_lets_its_runs_save_and_continues(tmp_path):
    path = tmp_path / "experiment.yaml"
    base = BASIC["base"] | {"weight_decay": 4}
    content = BASIC | {"grid": ONE | {"seed": [1, 2]}, "base": base}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "nlu/sweep.py", str(path), *places_of(tmp_path)]
    start = partial(subprocess.Popen, command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start(text=True)
    wait_until(lambda: list(tmp_path.rglob("started")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM and "the same command continues" in err and "failed" not in err
    assert record_of(tmp_path, "lora-cola-seed=1")["status"] == "interrupted" and "1/2" not in err
    assert not (tmp_path / "output/trial/lora-cola-seed=2").exists()
    process = start(text=True)
    wait_until(lambda: (tmp_path / "output/trial/lora-cola-seed=2/started").exists())
    process.kill()  # finished runs are not lost
    process.communicate()
    assert list(lines_of(tmp_path)) == ["lora-cola-seed=1"] and record_of(tmp_path, "lora-cola-seed=1")["resumes"] == 1


# ---- the loop, with stand-ins for started runs -----------------------------------------------------------------------


def sweep_here(tmp_path, start, content):
    """Sweep an experiment, starting one run at a time with `start`; returns the exit code."""
    launcher = Launcher(1, use_cpu=True)
    launcher.start = start
    return Sweep(make_experiment(**content), tmp_path / "measured", tmp_path / "output", ["run"]).run(launcher)[0]


def test_a_second_signal_ends_the_runs_at_once_and_the_first_one_gives_the_exit_code(tmp_path):
    code = "import signal, sys, time; signal.signal(15, lambda *_: print(1, flush=True)); print(0, flush=True)\n"
    code += "while True: time.sleep(1)"
    started, launcher = [], Launcher(1, use_cpu=True)

    def start(command, log, group):
        started.append(Launcher.start(launcher, [sys.executable, "-c", code], log, group))
        threading.Thread(target=interrupt, args=[log]).start()
        return started[0]

    def interrupt(log):
        for number, heard in ((signal.SIGINT, "0\n"), (signal.SIGTERM, "0\n1\n")):
            wait_until(lambda heard=heard: log.read_text() == heard)
            os.kill(os.getpid(), number)

    with handled_by(signal.default_int_handler, [signal.SIGINT]):  # a shell's background job ignores it
        assert sweep_here(tmp_path, start, BASIC | {"grid": ONE | {"seed": [1, 2]}}) == 128 + signal.SIGINT
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_two_sweeps_of_one_name_do_not_write_one_file_of_lines(tmp_path, capsys):
    def start(command, log, group):
        with pytest.raises(UsageError, match=r"another sweep is running and writes .*trial.jsonl"):
            Sweep(make_experiment(**content), tmp_path / "measured", tmp_path / "elsewhere", ["run"]).run(None)
        raise UsageError("enough")

    content = BASIC | {"grid": ONE}
    with pytest.raises(UsageError, match="enough"):
        sweep_here(tmp_path, start, content)


def test_the_report_names_runs_that_have_not_ended_and_shows_a_tunings_last_grid(run_sweep, tmp_path, monkeypatch):
    """LoRA² is refused on RTE, so that its tuning does not end and its finals wait."""
    monkeypatch.setattr(Drawing, "png", lambda _: b"")
    tune = {"learning_rate": [1e-3, 4e-3], "share_of_steps": 1}
    assert run_sweep(BASIC | {"tune": tune | {"learning_rate": [1e-3, 2e-3]}}, "--only", "lora-rte")[0] == 0
    refused = {"when": {"method": "lora2", "task_name": "rte"}, "set": {"weight_decay": 2}}
    assert run_sweep(BASIC | {"tune": tune, "overrides": [refused]}, "--rerun_changed")[0] == 1
    write_report(tmp_path / "measured", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "- No learning rate for LoRA²: runs of the tuning have not ended, or all failed.\n" in page
    assert "- 4 of 8 planned run(s) have not ended: LoRA² (4).\n" in page
    assert "- 2 of 8 planned tuning run(s) have not ended: LoRA² (2).\n" in page
    marks = re.findall(r"^\| (LoRA²?) +\| +(0.\d+) .*\| *([^|]*?) \|$", page, re.M)
    assert marks[0] == ("LoRA", "0.001", "chosen, an end of the grid")
    assert marks[1:] == [("LoRA", "0.004", ""), ("LoRA²", "0.001", ""), ("LoRA²", "0.004", "")]
    for name in ("trial.jsonl", "trial.plan.json"):  # as while the tuning runs
        (tmp_path / "measured" / name).unlink()
    write_report(tmp_path / "measured", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "## trial\n\nNo run has finished.\n\n- No learning rate for LoRA²" in page


def test_data_that_are_not_there_are_refused_in_one_line_before_any_run(run_sweep, tmp_path):
    places = f"glue_dir={glue(tmp_path)}"
    content = BASIC | {"grid": BASIC["grid"] | {"task_name": ["cola", "mrpc"]}}
    code, _, err = run_sweep(content, "--set", places)
    assert code == 2 and err.count("\n") == 1 and "lora-mrpc-seed=2: no train split of mrpc: looked for " in err
    own = {"train_file": str(tmp_path / "absent.csv"), "validation_file": str(tmp_path / "absent.csv")}
    code, _, err = run_sweep({**BASIC, "base": BASIC["base"] | own, "grid": {"method": ["lora"], "seed": [1]}})
    assert code == 2 and "lora-seed=1: [Errno 2] No such file or directory" in err
    assert not (tmp_path / "output").exists()


def test_commit_is_dirty_if_code_is_changed_but_not_if_records_are(tmp_path):
    root = tmp_path / "checkout"
    code, record = root / "nlu/tasks.py", root / "results/measured/selection.json"
    write_text(code, "{}")
    write_text(record, "{}")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for words in ("init -q", "add .", "commit -qm first"):
        subprocess.run([*git, *words.split()], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(root) == commit
    record.write_text('{"chosen": 1}')
    assert git_commit(root) == commit
    code.write_text("")
    assert git_commit(root) == f"{commit}-dirty"
    assert git_commit(tmp_path) is None
    assert git_commit(root / "nlu") is None  # a package that is installed inside somebody's own repository
