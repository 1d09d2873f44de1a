"""The loop that keeps N runs going, says how they ended, and takes an experiment through its stages."""

import contextlib
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nlu.errors import UsageError
from nlu.experiments.choosing import choose, chosen_runs, made_otherwise, second_round
from nlu.experiments.experiment import Experiment, Run
from nlu.experiments.launchers import Job, LocalLauncher, SlurmLauncher
from nlu.experiments.places import Places, command_line
from nlu.json_yaml import read_json
from nlu.runs.lock import locked

_POLL_SECONDS = 0.1


@dataclass
class SweepLoop:
    """Keeps `jobs` runs going, shows one progress bar, collects what failed; a context manager for signals and bar."""

    launcher: LocalLauncher | SlurmLauncher
    jobs: int
    places: Places
    total: int
    rerun_changed: bool = False
    finished: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0
    _stop_count: int = 0

    def __enter__(self) -> "SweepLoop":
        caught = [signal.SIGINT, signal.SIGTERM]
        # A cluster's jobs, and with nohup the sweep, outlive the terminal.
        if isinstance(self.launcher, LocalLauncher) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in caught}
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=self.total, desc=self.places.measured.stem, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stopped_by = self.stopped_by or number
        self._stop_count += 1

    def run(self, runs: list[Run], *, planned: bool = True) -> None:
        """Run what is not finished; returns when all have ended, or after a signal when those running have ended.

        `planned` says whether `total` counts these runs already.
        """
        if not planned:
            self.total += len(runs)
            self.bar.total += len(runs)
        if adopted := self.places.adopt(runs):
            self.bar.write(f"{adopted} run(s) taken over: the same arguments and contents have been run")
        pending = [run for run in runs if self.places.state(run) != "finished"]
        self.bar.total -= len(runs) - len(pending)
        running: dict[str, tuple[Run, int | None, Job]] = {}  # with the time of the record that it found
        told, shown = 0, -math.inf
        every = 2.0 if sys.stderr.isatty() else 60.0  # seconds; a log keeps every bar
        try:
            while (pending and not self.stopped_by) or running:
                while pending and not self.stopped_by and len(running) < self.jobs:
                    run = pending.pop(0)
                    if self.places.adopt([run], neighbours=False):  # an equal run has finished since
                        self.bar.total -= 1
                        continue
                    running[run.folder] = (run, self.places.record_time(run), self._start(run))
                for folder, (run, found, job) in list(running.items()):
                    code = job.poll()
                    if code is not None:
                        del running[folder]
                        self._ended(run, code, found)
                if self._stop_count > told:
                    told = self._stop_count
                    for *_, job in running.values():
                        job.stop() if told == 1 else job.kill()
                if time.monotonic() - shown > every:
                    shown = time.monotonic()
                    self._show([run for run, *_ in running.values()])
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for *_, job in running.values():
                job.stop()
            raise
        self._show([])

    def block(self, runs: list[Run], reason: str) -> None:
        """Count runs that cannot start as failed."""
        for run in runs:
            self.failures[run.folder] = reason

    def summary(self) -> int:
        """Print how the sweep ended; returns its exit code."""
        for folder, reason in self.failures.items():
            print(f"failed: {folder}: {reason}", file=sys.stderr)
        already = self.total - self.bar.total
        counts = f"{self.finished} run(s) finished now, {already} before, {len(self.failures)} failed"
        print(counts + (f"; their lines are in {self.places.measured}" if self.places.measured.exists() else ""))
        if self.stopped_by:
            print("stopped; the same command continues from here", file=sys.stderr)
            return 128 + self.stopped_by
        return 1 if self.failures else 0

    def _start(self, run: Run) -> Job:
        command, state = command_line(run, self.places), self.places.state(run)
        if state == "failed" or (self.rerun_changed and state != "new"):
            command.append("--overwrite_output_dir")  # which replaces another run, and goes on with an unchanged one
            self.places.forget(run)
        self.places.log(run).parent.mkdir(parents=True, exist_ok=True)
        return self.launcher.start(command, self.places.log(run))

    def _ended(self, run: Run, code: int, found: int | None) -> None:
        try:  # a start that failed before it wrote a record has left that of an earlier start
            line = self.places.publish(run) if code == 0 or self.places.record_time(run) != found else None
        except UsageError as error:  # this run's record is damaged; the others go on
            self.failures[run.folder] = str(error)
            return
        if code == 0 and line is not None and line["status"] == "finished":
            self.finished += 1
        elif not self.stopped_by:
            error = (line or {}).get("error") or _last_line(self.places.log(run)) or "it left no message"
            self.failures[run.folder] = f"exit code {code}: {error} (log: {self.places.log(run)})"

    def _show(self, running: list[Run]) -> None:
        parts = sum(self._fraction(run) for run in running)
        self.bar.n = min(self.finished + len(self.failures) + parts, self.bar.total)
        names = ", ".join(run.folder for run in running[:2]) + (", …" if len(running) > 2 else "")
        failed = f", {len(self.failures)} failed" if self.failures else ""
        self.bar.set_postfix_str(f"{self.finished}/{self.bar.total} runs{failed} {names}")

    def _fraction(self, run: Run) -> float:
        """How much of a running run is done, where its record says so."""
        with contextlib.suppress(UsageError, KeyError, IndexError, TypeError, ZeroDivisionError):
            record = read_json(self.places.working(run) / "results.json")
            return min(1.0, record["steps"] / record["planned_steps"])
        return 0.0


def run_experiment(
    experiment: Experiment,
    selecting: list[Run],
    final: list[Run],
    places: Places,
    launcher: LocalLauncher | SlurmLauncher,
    jobs: int,
    rerun_changed: bool = False,
) -> int:
    """Run the selection stage (if any) and the final stage; returns the exit code, see :meth:`SweepLoop.summary`.

    Args:
        selecting, final: the runs that are wanted of both stages. jobs: runs at once.
        rerun_changed: run again, from the start, what was made with other arguments or contents.

    Raises:
        UsageError: for runs that were made otherwise, and where another process works in the folder.
    """
    selection = experiment.selection
    places.output.mkdir(parents=True, exist_ok=True)
    with locked(places.output / ".lock", f"another sweep is running in {places.output}; wait for it or stop it"):
        # A final run's chosen arguments are known only after the selection; what is known now is checked now.
        choice = choose(selection, places)
        known, waiting = chosen_runs(final, selection, choice)
        if not rerun_changed:
            places.check_unchanged([*selecting, *known, *made_otherwise(waiting, selection, places)])
        _place_anew(experiment, choice, places)
        with SweepLoop(launcher, jobs, places, len(selecting) + len(final), rerun_changed) as loop:
            loop.run(selecting)
            if selection and not loop.stopped_by:
                keys = {selection.key(run) for run in selecting}
                loop.run(second_round(selection, places, keys), planned=False)
            if not loop.stopped_by:
                choice = choose(selection, places)
                runnable, waiting = chosen_runs(final, selection, choice)
                changed = [] if rerun_changed else [run for run in runnable if places.state(run) == "changed"]
                for run in changed:  # the selection, now complete, chose other values than before
                    loop.block([run], f"it was {places.what_changed(run)}")
                loop.block(
                    waiting,
                    "its selection is not complete: a run has not ended (take a refused value out of the file), "
                    "or all of them failed",
                )
                _place_anew(experiment, choice, places)
                loop.run([run for run in runnable if run not in changed])
        return loop.summary()


def _place_anew(experiment: Experiment, choice: dict[tuple, dict[str, Any]], places: Places) -> None:
    """Give the finished runs, those that are not asked for now too, the labels and axes of the experiment."""
    selection = experiment.selection
    known, _ = chosen_runs(experiment.runs, selection, choice)
    tuning = [*selection.runs, *second_round(selection, places)] if selection else []
    places.place_anew([*known, *tuning])


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""  # a job that never began has none
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
