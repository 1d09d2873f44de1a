"""How the sweep starts a run here: forked from a server that has imported run_glue, with the same result."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nlu.experiments import launchers
from nlu.experiments.launchers import RUN_GLUE, LocalLauncher
from nlu.run_glue import main
from nlu.runs.machine import git_commit


def wait(job, seconds=120):
    end = time.monotonic() + seconds
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return job.poll()


@pytest.fixture(scope="module")
def launcher():
    return LocalLauncher(1)


def test_a_forked_run_gives_what_a_process_of_its_own_gives(launcher, base_flags, tmp_path):
    folder = base_flags.index("--root_output_dir") + 1
    flags = [*base_flags, "--method", "lora2"]
    assert main(flags) == 0
    flags[folder] = str(tmp_path / "forked")
    command = [sys.executable, str(RUN_GLUE), *flags]
    log = tmp_path / "run.log"
    assert wait(launcher.start(command, log)) == 0, log.read_text()
    own, forked = (json.loads((Path(f) / "results.json").read_text()) for f in (base_flags[folder], flags[folder]))
    for name in ("evaluations", "status", "live_budget", "spectra", "adapter_params"):
        assert own[name] == forked[name]
    for mine, theirs in zip(own["history"], forked["history"], strict=True):
        assert (mine["step"], mine["loss"]) == (theirs["step"], theirs["loss"])
    assert str(RUN_GLUE) in forked["command"] and "adapter" in log.read_text()


def test_a_refused_run_ends_with_2_and_one_line_in_the_log(launcher, tmp_path):
    log = tmp_path / "run.log"
    log.write_text("before\n")
    assert wait(launcher.start([sys.executable, str(RUN_GLUE), "--method", "lora"], log)) == 2
    assert log.read_text().startswith("before\n") and "--model_name_or_path" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_forked_run_can_be_ended(launcher, base_flags, tmp_path, end):
    flags = list(base_flags)
    flags[flags.index("--max_steps") + 1] = "100000"
    job = launcher.start([sys.executable, str(RUN_GLUE), *flags, "--method", "lora"], tmp_path / "run.log")
    record = Path(flags[flags.index("--root_output_dir") + 1]) / "results.json"
    deadline = time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    getattr(job, end)()
    assert wait(job) == (143 if end == "stop" else -9)


@pytest.mark.parametrize(("jobs", "threads"), [(1, 8), (2, 4), (3, 2), (10**6, 1)])
def test_a_run_has_its_share_of_the_threads(tmp_path, monkeypatch, jobs, threads):
    monkeypatch.setattr(launchers, "available_cores", lambda: 8)
    log = tmp_path / "log"
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert wait(LocalLauncher(jobs).start([sys.executable, "-c", code], log)) == 0
    assert log.read_text() == f"{threads}\n"


def test_another_command_has_its_own_process(tmp_path):
    log = tmp_path / "log"
    job = LocalLauncher(1).start([sys.executable, "-c", "import sys; sys.exit(7)"], log)
    assert wait(job) == 7


@pytest.mark.parametrize(("jobs", "threads"), [(2, "4"), (8, "1")])
def test_forked_children_have_the_share_too(tmp_path, jobs, threads):
    """In a process of its own: the server takes its environment when it first starts."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom nlu.experiments import launchers\n"
        "def show(argv, log, folder):\n"
        "    import os, torch\n"
        "    Path(log).write_text(f\"{os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}\")\n"
        "launchers._run_glue = show\n"
        "launchers.available_cores = lambda: 8\n"
        "if __name__ == '__main__':\n"
        "    job = launchers.LocalLauncher(%d).start([sys.executable, str(launchers.RUN_GLUE)], Path(sys.argv[1]))\n"
        "    while job.poll() is None: pass\n"
    )
    script = tmp_path / "show.py"
    script.write_text(code % jobs)
    log = tmp_path / "shown"
    environment = {"PYTHONPATH": str(RUN_GLUE.parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "5"}
    subprocess.run([sys.executable, str(script), str(log)], check=True, timeout=120, env=environment)
    environment_s, torch_s = log.read_text().split()
    assert environment_s == threads and int(torch_s) <= int(threads)  # torch takes no more than there are cores


@pytest.fixture
def checkout(tmp_path):
    """This repository's code as a checkout of its own with one commit, and a function that calls git there."""
    root = tmp_path / "checkout"
    for name in ("nlu", "loralib", "configs"):
        shutil.copytree(RUN_GLUE.parents[1] / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "results/measured").mkdir(parents=True)
    (root / "results/measured/selection.json").write_text("{}")

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return root, git


def test_runs_of_one_server_name_the_commit_whose_code_they_loaded(checkout, base_flags, tmp_path):
    root, git = checkout
    loaded = git("rev-parse", "HEAD")
    script = tmp_path / "two_runs.py"
    script.write_text(
        "import subprocess, sys\nfrom pathlib import Path\nfrom nlu.experiments import launchers\n"
        "if __name__ == '__main__':\n"
        "    launcher, flags = launchers.LocalLauncher(1), sys.argv[2:]\n"
        "    for number in '12':\n"
        "        flags[flags.index('--root_output_dir') + 1] = sys.argv[1] + number\n"
        "        job = launcher.start([sys.executable, str(launchers.RUN_GLUE), *flags], Path(sys.argv[1] + '.log'))\n"
        "        while job.poll() is None: pass\n"
        "        (launchers.RUN_GLUE.parent / 'tasks.py').open('a').write('# another line\\n')\n"
    )
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    flags = [*base_flags, "--method", "lora", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), *flags], check=True, timeout=120, env=environment
    )
    records = [json.loads((tmp_path / f"run{number}/results.json").read_text()) for number in "12"]
    assert [record["git_commit"] for record in records] == [loaded, loaded]


def test_a_commit_is_dirty_by_its_code_and_not_by_the_records_that_runs_leave(checkout, tmp_path):
    root, git = checkout
    commit = git("rev-parse", "HEAD")
    assert git_commit(root) == commit
    (root / "results/measured/selection.json").write_text('{"chosen": 1}')
    assert git_commit(root) == commit
    (root / "nlu/tasks.py").write_text("")
    assert git_commit(root) == f"{commit}-dirty"
    assert git_commit(tmp_path) is None
