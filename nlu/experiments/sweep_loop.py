"""Runs an experiment: finds out what is finished, keeps N runs going, and reports the runs that failed."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loralib.files import locked
from nlu.command_line import DEFAULTS
from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run
from nlu.experiments.launcher import ON, EarlierJob, Job, Launcher, is_held
from nlu.experiments.lines import measured_line, read_lines, write_line, write_plan
from nlu.experiments.names import portable
from nlu.json_yaml import read_json
from nlu.runs.identity import FREE, changes, content_digests
from nlu.runs.signals import handled_by

_POLL_SECONDS = 0.1
Ran = tuple[int, dict[str, dict[str, Any]]]  # an exit code, and lines by the run's name
LOCK, RECORD = ".lock", "results.json"  # as in nlu/runs/folder.py, which imports torch
REFUSED = 2  # run_glue's exit code for wrong arguments or data, and for a folder in use


class Sweep:
    """The runs of an experiment, the file of their lines (`measured`), their folder, and the command of one run."""

    def __init__(self, experiment: Experiment, measured_dir: Path, output_dir: Path, command: list[str]) -> None:
        self.experiment, self.runs, self.command = experiment, experiment.runs, command
        self.measured, self.folder = measured_dir / f"{experiment.name}.jsonl", output_dir / experiment.name
        self.finished = 0
        self.failures: dict[str, str] = {}  # name of a run → why it failed
        self.signals: list[int] = []  # those received

    # ---- the state of a run ------------------------------------------------------------------------------------------

    def command_line(self, run: Run) -> list[str]:
        return [*self.command, *run.flags, "--root_output_dir", str(self.folder / run.name)]

    def log(self, run: Run) -> Path:
        return self.folder / "logs" / f"{run.name}.log"

    def states(self) -> dict[str, str]:
        """Name → `finished`; `changed`: finished, but with other arguments or contents; `failed`; or :meth:`state`.

        Raises:
            UsageError: a line is damaged; the message names it.
        """
        lines, states = read_lines(self.measured), {}
        for run in self.runs:
            line = lines.get(run.name)
            changed = line and line["status"] == "finished" and self.changes(run, line)
            states[run.name] = "changed" if changed else line["status"] if line else self.state(run)
        return states

    def state(self, run: Run) -> str:
        """What the folder of a run without a line says: `running`, for an earlier sweep that was killed; `ended`: it
        has finished meanwhile; or `to do`: it starts, or resumes from what the folder holds.
        """
        if is_held(self.folder / run.name / LOCK):
            return "running"
        with contextlib.suppress(UsageError):  # a damaged record is run_glue's to report
            line = self.line_of(run)
            if line and line["status"] == "finished" and not self.changes(run, line):
                return "ended"
        return "to do"

    def line_of(self, run: Run) -> dict[str, Any] | None:
        """The line that follows from the record in a run's folder; None if the run has not ended.

        Raises:
            UsageError: the record is damaged.
        """
        folder = self.folder / run.name
        record = read_json(folder / RECORD, f"delete {folder} to run it again") or {}
        return measured_line(run, record) if record.get("status") in ("finished", "failed") else None

    def changes(self, run: Run, line: dict[str, Any]) -> str:
        """How a line differs from the run that is asked for: arguments, old → new, and the contents of inputs."""
        arguments = run.parse()
        digests = content_digests(arguments.values)
        arguments.values = portable(arguments.values)  # as the line's
        # Without a total, the rows of a step follow from these and the number of processes, which --command decides.
        parts, total = {"per_device_train_batch_size", "gradient_accumulation_steps"}, arguments.total_batch_size
        changed = changes(arguments, digests, line, FREE if total else FREE - parts)
        if total not in (None, line.get("effective_batch_size")):
            changed.add("total_batch_size")
        then = DEFAULTS | line["arguments"]
        values = [(name, then.get(name), arguments.values.get(name)) for name in sorted(changed)]
        return ", ".join(f"{name} {old} → {new}" if old != new else name for name, old, new in values)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, launcher: Launcher, rerun_changed: bool = False) -> Ran:
        """Run what is not finished; returns the exit code (0, 1 if runs failed, 128 + the signal's number if stopped)
        and the lines of all runs by name.

        After a signal no further run starts, and the others save and end; a second one ends them at once.

        Args:
            rerun_changed: repeat, from the start, the runs made with other arguments or contents.

        Raises:
            UsageError: runs were made with other arguments or contents (without `rerun_changed`), or the folder is in
                use. OSError: the command cannot be run.
        """
        for folder in (self.folder / "logs", self.measured.parent):
            folder.mkdir(parents=True, exist_ok=True)
        in_use = f"another sweep is running in {self.folder}, or writes {self.measured}; wait for it or stop it"
        # A sweep of this name may have another folder and the same lines.
        locks = self.folder / LOCK, self.measured.with_name(f".{self.measured.stem}.lock")
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        caught = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        with contextlib.ExitStack() as held:
            for lock in locks:
                held.enter_context(locked(lock, UsageError(in_use)))
            states = self.states()
            if not rerun_changed:
                self._refuse_changed([run for run in self.runs if states[run.name] == "changed"])
            write_plan(self.measured, self.experiment)
            held.enter_context(handled_by(lambda number, _: self.signals.append(number), caught))
            self._keep_running(launcher, states, rerun_changed)
        for name, reason in self.failures.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        counts = f"{self.finished} run(s) finished now, {len(self.failures)} failed"
        print(f"{counts}; the results of all are in {self.measured}")
        if self.signals:
            print("stopped; the same command continues from here", file=sys.stderr)
        code = 128 + self.signals[0] if self.signals else int(bool(self.failures))
        return code, read_lines(self.measured)

    def _refuse_changed(self, runs: list[Run]) -> None:
        if runs:
            differences = self.changes(runs[0], read_lines(self.measured)[runs[0].name])
            raise UsageError(
                f"{len(runs)} run(s), for example {runs[0].name}, were made with other arguments or "
                f"contents ({differences}); pass --rerun_changed to repeat them, or give the experiment a new name "
                "(with compare.py: --name)"
            )

    def _keep_running(self, launcher: Launcher, states: dict[str, str], rerun_changed: bool) -> None:
        pending = [run for run in self.runs if states[run.name] != "finished"]
        interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a log file keeps every update
        total, done = len(self.runs), len(self.runs) - len(pending)
        # The time left follows from the runs made now, by their mean (smoothing 0), because they end in groups.
        bar = tqdm(total=total, initial=done, desc=self.measured.stem, unit="run", mininterval=interval, smoothing=0)
        running: dict[str, tuple[Run, Job | EarlierJob]] = {}
        told = 0  # signals that have been passed on
        try:
            while (pending and not self.signals) or running:
                while pending and not self.signals and len(running) < launcher.jobs:
                    run = pending.pop(0)
                    if job := self._start(run, states[run.name], launcher, rerun_changed):
                        running[run.name] = run, job
                    bar.set_postfix_str(", ".join(running))
                for name, (run, job) in list(running.items()):
                    code = job.poll()
                    if code is not None:
                        del running[name]
                        # A process of a killed sweep locks its folder only after some seconds; ours is then refused.
                        if isinstance(job, EarlierJob) or (code == REFUSED and is_held(self.folder / name / LOCK)):
                            pending.insert(0, run)  # its folder says whether it has finished
                        else:
                            self._ended(run, code)
                if ended := done + self.finished + len(self.failures) - bar.n:
                    bar.update(ended)
                if len(self.signals) > told:
                    told = len(self.signals)
                    for _, job in running.values():
                        job.stop(at_once=told > 1)
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for _, job in running.values():
                job.stop()
            raise
        finally:
            bar.close()

    def _start(self, run: Run, state: str, launcher: Launcher, rerun_changed: bool) -> Job | EarlierJob | None:
        """Start a run, or wait for an earlier sweep's; None if it has finished meanwhile, and has its line now."""
        if state not in ("failed", "changed"):
            state = self.state(run)
        if state == "running":
            tqdm.write(f"{run.name}: an earlier sweep's process still runs it; waiting for its end", file=sys.stderr)
            return launcher.adopt(self.folder / run.name / LOCK, self.log(run))
        if state == "ended":
            self._ended(run, 0)
            return None
        command = self.command_line(run)
        if state == "failed" or rerun_changed:
            command.append("--overwrite_output_dir")  # replaces another run, and resumes this one
        if state in ("failed", "changed"):
            write_line(self.measured, run.name, None)
        return launcher.start(command, self.log(run))

    def _ended(self, run: Run, code: int) -> None:
        """Write the line of a run that has finished or failed, and note a failure."""
        line: dict[str, Any] = {}
        try:
            # A refused start writes no record: the one in its folder is an earlier start's.
            if code != REFUSED and (made := self.line_of(run)):
                line = made
                write_line(self.measured, run.name, line)
        except UsageError as error:  # this run's record is damaged; the others continue
            line = {"error": str(error)}
        if code == 0 and line.get("status") == "finished":
            self.finished += 1
        elif not self.signals:
            error = line.get("error") or _last_line(self.log(run)) or "it left no message"
            self.failures[run.name] = f"exit code {code}: {error} (log: {self.log(run)})"


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = (line.strip() for line in reversed(text.splitlines()) if not line.startswith(ON))
    return next(filter(None, lines), "")
