"""How a sweep starts its runs: as processes of this machine, or as jobs of a Slurm cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from nlu.errors import UsageError, reason


class Job(Protocol):
    """A started run."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end (SIGTERM)."""

    def kill(self) -> None:
        """End it at once."""


RUN_GLUE = Path(__file__).resolve().parents[1] / "run_glue.py"


class LocalLauncher:
    """Runs as child processes, the machine's threads shared out evenly among `jobs` of them."""

    def __init__(self, jobs: int) -> None:
        threads = str(max(1, available_cores() // jobs))
        # One name for each threading library that torch or NumPy may be built on.
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.environment = {**os.environ, **dict.fromkeys(names, threads)}

    def start(self, command: list[str], log: Path) -> Job:
        """Start a command; its output is appended to the log.

        Raises:
            UsageError: the command cannot be run at all.
        """
        with open(log, "ab") as output:
            try:
                return _LocalJob(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self.environment,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
                )
            except OSError as error:
                raise UsageError(f"cannot run {command[0]}: {error.strerror}; check --command") from None


class _LocalJob(subprocess.Popen):
    """A process with all that it starts."""

    def stop(self) -> None:
        self._signal_all(signal.SIGTERM)

    def kill(self) -> None:
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        if self.poll() is None:
            os.killpg(self.pid, number)


class SlurmLauncher:
    """Runs as jobs that submitit hands to a cluster; `parameters` go to its executor as they are.

    `parameters["cluster"]` may name submitit's other executors (`local`, `debug`), which need no Slurm.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError("--launcher slurm needs submitit; install it with pip install submitit") from None
        parameters = dict(parameters)
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=parameters.pop("cluster", "slurm"))
            self.executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UsageError(f"submitit: {reason(error) or type(error).__name__}; check --slurm") from None
        self.command_function = submitit.helpers.CommandFunction

    def start(self, command: list[str], log: Path) -> Job:
        """Submit a command that runs in this folder, its output appended to the log by a shell on the node."""
        shell = ["/bin/sh", "-c", 'log=$1; shift; exec "$@" >>"$log" 2>&1', "sh", str(log.resolve()), *command]
        return _SlurmJob(self.executor.submit(self.command_function(shell, verbose=False, cwd=os.getcwd())))


class _SlurmJob:
    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return 1 if self.job.exception() is not None else 0
        except Exception as error:  # submitit raises its own errors for a job that vanished or was cancelled
            print(f"job {self.job.job_id}: {error}", file=sys.stderr)
            return 1

    def stop(self) -> None:
        self.job.cancel()

    def kill(self) -> None:
        self.job.cancel()


def available_cores() -> int:
    """Cores this process may use (fewer than the machine's inside a container or under taskset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
