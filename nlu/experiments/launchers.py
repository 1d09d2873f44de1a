"""How a sweep starts its runs: as processes of this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nlu import ROOT
from nlu.errors import UsageError, reason

RUN_GLUE = [sys.executable, str(ROOT / "nlu/run_glue.py")]  # the command of one run; its flags are appended


class LocalLauncher:
    """Starts runs as child processes, `jobs` at once, with OMP_NUM_THREADS threads each (default: cores / jobs)."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // jobs))
        self.environment = os.environ | {"OMP_NUM_THREADS": threads}  # MKL and OpenBLAS read it too

    def start(self, command: list[str], log: Path) -> LocalJob:
        """Start a command; its output is appended to the log.

        Raises:
            OSError: the command cannot be run at all.
        """
        with open(log, "ab") as output:
            return LocalJob(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,  # Ctrl-C reaches only the sweep, which passes it on once
            )


class LocalJob(subprocess.Popen):
    """A process and its children; `poll` returns its exit code, or None while it runs."""

    def stop(self, at_once: bool = False) -> None:
        """Ask the process to save and end, or kill it at once."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL if at_once else signal.SIGTERM)


class SlurmLauncher:
    """Submits runs to a cluster through submitit, `jobs` at once; `parameters` go unchanged to its executor.

    `parameters["cluster"]` may name submitit's executor `local`, which needs no Slurm.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], jobs: int) -> None:
        import submitit

        self.jobs = jobs
        options = {"timeout_min": 24 * 60, **parameters}  # submitit's default limit is 5 minutes
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
            self.executor.update_parameters(**options)
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UsageError(f"submitit: {reason(error) or type(error).__name__}; check --slurm") from None
        self.refusals = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)

    def start(self, command: list[str], log: Path) -> SlurmJob:
        """Submit a command that runs in the current folder; its output is appended to the log.

        Raises:
            UsageError: the cluster refuses the job.
        """
        log, folder = log.resolve(), os.getcwd()

        def run() -> int:  # a nested function is pickled with its code, so the node imports nothing
            with open(log, "ab") as output:
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
            # Slurm (and submitit: SIGUSR2 before the time is up) signals only this process, which makes the run save.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                signal.signal(number, lambda *_: process.terminate())
            return process.wait()

        try:
            return SlurmJob(self.executor.submit(run))
        except self.refusals as error:
            raise UsageError(f"submitit: {reason(error) or type(error).__name__}; check --slurm") from None


class SlurmJob:
    """A job of the cluster, with the methods of :class:`LocalJob`."""

    def __init__(self, job: Any) -> None:
        self.job, self.ended = job, False

    def poll(self) -> int | None:
        if self.ended:
            return 1
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except Exception as error:  # submitit raises its own errors for a job that vanished or was cancelled
            print(f"job {self.job.job_id}: {reason(error)}", file=sys.stderr)
            return 1

    def stop(self, at_once: bool = False) -> None:
        self.job.cancel(check=False)  # scancel fails if the job has ended meanwhile
        self.ended = at_once  # without accounting (sacct) the cluster never reports the end


def available_cores() -> int:
    """Cores this process may use (fewer than the machine's inside a container or under taskset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
