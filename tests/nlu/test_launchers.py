"""How the sweep starts a run here and on a cluster, and the commit that a record names."""

import os
import signal
import subprocess
import sys

import pytest

from nlu.experiments import launchers
from nlu.experiments.launchers import LocalLauncher, SlurmLauncher
from nlu.runs.machine import git_commit
from tests.nlu.tiny import wait_until


def wait(job):
    wait_until(lambda: job.poll() is not None)
    return job.poll()


@pytest.mark.parametrize(("jobs", "asked", "threads"), [(3, "", 2), (3, "5", 5)])
def test_a_run_has_its_share_of_the_threads_and_its_exit_code_is_known(tmp_path, monkeypatch, jobs, asked, threads):
    """The share, or the number that OMP_NUM_THREADS asks for."""
    monkeypatch.setattr(launchers, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(7)"
    assert wait(LocalLauncher(jobs).start([sys.executable, "-c", code], log)) == 7
    assert log.read_text() == f"{threads}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_run_hears_of_what_slurm_tells_its_job_and_may_save(tmp_path, number):
    log = tmp_path / "log"
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "print(os.getppid(), flush=True); time.sleep(60)"
    )
    launcher = SlurmLauncher(tmp_path / "jobs", {"cluster": "local", "timeout_min": 10}, 1)
    job = launcher.start([sys.executable, "-c", code], log)
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    os.kill(int(log.read_text()), number)
    assert wait(job) == 143


def test_a_job_that_the_cluster_forgets_ends_when_it_is_killed():
    """Without accounting no state is known, and scancel fails for a job that has ended."""

    class Forgotten:
        def done(self):
            return False

        def cancel(self, check=True):
            if check:
                raise subprocess.CalledProcessError(1, "scancel")

    job = launchers.SlurmJob(Forgotten())
    job.stop()
    assert job.poll() is None
    job.stop(at_once=True)
    assert job.poll() == 1


def test_a_commit_is_dirty_by_its_code_and_not_by_the_records_that_runs_leave(tmp_path):
    root = tmp_path / "checkout"
    code, record = root / "nlu/tasks.py", root / "results/measured/selection.json"
    for path in (code, record):
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(root) == commit
    record.write_text('{"chosen": 1}')
    assert git_commit(root) == commit
    code.write_text("")
    assert git_commit(root) == f"{commit}-dirty"
    assert git_commit(tmp_path) is None
    assert git_commit(root / "nlu") is None  # a package that is installed inside of somebody's own repository
