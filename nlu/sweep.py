"""Run an experiment: every combination of methods, tasks, seeds and flags that a file in configs/experiments/ names."""

import argparse
import contextlib
import fcntl
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import UsageError, exit_code, reason
from nlu.experiments.choosing import choose, chosen_runs
from nlu.experiments.files import Experiment, Run, load_experiment
from nlu.experiments.launchers import LocalLauncher, SlurmLauncher
from nlu.experiments.loop import SweepLoop
from nlu.experiments.places import Places, command_line
from nlu.readers import parse_yaml

ROOT = Path(__file__).resolve().parents[1]

DESCRIPTION = """\
Runs what has no finished record yet and goes on with what was interrupted, so the same command can be stopped
(Ctrl-C or SIGTERM: the runs save and end) and started again at any time. A failing run does not stop the others; the
sweep then ends with exit code 1. What another experiment has finished with the same arguments is copied, not run again.

Records (results.json, rank_pattern.json) are copied to results/measured/EXPERIMENT/RUN/ when a run ends, with this
machine's folders taken out of them; checkpoints, adapters and logs stay in output/EXPERIMENT/. Runs made with other
arguments than the file now asks for, or with a model or data that hold something else under the same name, are refused
before anything starts; --rerun_changed replaces them."""

EPILOG = """\
examples:
  python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --set glue_dir=DIR --jobs 2
  python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --only 'cola' --dry_run
  python nlu/sweep.py configs/experiments/paper_table1.yaml --launcher slurm \\
      --slurm slurm_partition=gpu --slurm gpus_per_node=1
The format of an experiment file is explained at the top of nlu/experiments/files.py."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of the sweep."""
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", type=Path, help="an experiment file, such as configs/experiments/evidence.yaml")
    add("--set", action="append", default=[], metavar="FLAG=VALUE", help="an argument for every run; repeat as needed")
    add("--jobs", type=int, default=None, metavar="N", help="runs at once (local: 1, sharing the threads; slurm: all)")
    add("--only", metavar="REGEX", help="only runs whose name matches (and the selection runs that they need)")
    add("--dry_run", action="store_true", help="print each run's state and command, start nothing")
    add("--rerun_changed", action="store_true", help="run again, from the start, what was made with other arguments")
    add("--launcher", choices=("local", "slurm"), default="local", help="processes here, or a cluster (submitit)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="a parameter of submitit's executor")
    add("--command", default=None, help="what starts one run (default: the experiment's, or nlu/run_glue.py)")
    add("--measured_dir", type=Path, default=ROOT / "results" / "measured", help="records (default: results/measured)")
    add("--output_dir", type=Path, default=ROOT / "output", help="checkpoints, adapters, logs (default: output)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; returns the exit code: 0 all finished, 1 some failed, 2 bad input, 128 + signal when stopped."""
    args = build_parser().parse_args(argv)
    try:
        return run_sweep(args)
    except (UsageError, OSError, KeyboardInterrupt) as error:
        return exit_code(error)


def run_sweep(args: argparse.Namespace) -> int:
    """Check everything, then run the selection stage (if any) and the final stage.

    Raises:
        UsageError: anything wrong with the file, the flags or the records found, before the first run starts.
    """
    experiment = load_experiment(args.experiment, _pairs(args.set, "--set"))
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}; it must be at least 1")
    command = _command(args.command)
    measured, output = args.measured_dir / experiment.name, args.output_dir / experiment.name
    _check_writable(measured, "measured_dir")
    _check_writable(output, "output_dir")
    places = Places(measured, output, command, forced=args.command is not None)
    selecting, final = _wanted(experiment, args.only)
    if not places.forced:
        _check_arguments([*selecting, *final], places)
    print(f"{experiment.name}: {experiment.description or 'no description'}")
    if args.dry_run:
        _print_plan(experiment, selecting, final, places)
        return 0
    selection = experiment.selection
    with _locked(places.output):
        # A final run's chosen argument is known only after the selection; what is known now is checked now.
        known, _ = chosen_runs(final, selection, choose(selection, places))
        places.check_unchanged([*selecting, *known], args.rerun_changed)
        launcher, jobs = _launcher(args, places, len(selecting) + len(final))
        with SweepLoop(launcher, jobs, places, total=len(selecting) + len(final)) as loop:
            loop.run(selecting)
            if not loop.stopped_by:
                choice = choose(selection, places)
                if selection and selection.candidates:
                    places.write_selection(selection, choice)
                runnable, blocked = chosen_runs(final, selection, choice)
                places.check_unchanged(runnable, args.rerun_changed)
                if blocked:
                    loop.block(blocked, selection.why_missing)
                loop.run(runnable)
        return loop.summary()


def _command(text: str | None) -> list[str]:
    """The words of --command, or those that start run_glue.py."""
    if text is None:
        return [sys.executable, os.path.relpath(ROOT / "nlu/run_glue.py")]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--command {text} cannot be split into words: {reason(error)}") from None
    if not words:
        raise UsageError("--command is empty; give what starts one run, or leave it out")
    return words


def _check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder that is none, or in which nothing can be made, before hours of work go nowhere."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to" if existing.is_dir() else "is no folder"
        raise UsageError(f"--{flag} {folder}: {existing} {what}; name another")


def _wanted(experiment: Experiment, only: str | None) -> tuple[list[Run], list[Run]]:
    """The selection runs and the final runs that `--only` leaves."""
    selection = experiment.selection
    candidates = selection.runs if selection else []
    if only is None:
        return candidates, experiment.runs
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UsageError(f"--only {only} is no regular expression: {error}") from None
    final = [run for run in experiment.runs if pattern.search(run.folder)]
    needed = {selection.key(run) for run in final} if selection else set()
    selecting = [run for run in candidates if pattern.search(run.folder) or selection.key(run) in needed]
    if not final and not selecting:
        raise UsageError(f"--only {only} matches no run; names look like {experiment.runs[0].folder}")
    return selecting, final


def _check_arguments(runs: list[Run], places: Places) -> None:
    """Have run_glue's own parser read every command, so that a wrong flag shows now and not after hours."""
    from nlu.arguments import parse_arguments  # loads torch and transformers: only where there is something to check

    for run in runs:
        if not run.command:
            try:
                parse_arguments(command_line(run, places)[len(places.command) :])
            except UsageError as error:
                raise UsageError(f"{run.folder}: {error}") from None


def _print_plan(experiment: Experiment, selecting: list[Run], final: list[Run], places: Places) -> None:
    runnable, waiting = chosen_runs(final, experiment.selection, choose(experiment.selection, places))
    elsewhere = places.finished_elsewhere([*selecting, *runnable])
    for run in [*selecting, *runnable]:
        state, line = places.state(run), shlex.join(command_line(run, places))
        if run.folder in elsewhere:
            source = elsewhere[run.folder].parent.relative_to(places.measured.parent)
            state, line = "taken over", f"finished with the same arguments as {source}"
        print(f"{state:<12}{run.folder}\n    {line}")
    for run in waiting:
        line = shlex.join(command_line(run, places))
        print(f"{'waiting':<12}{run.folder}\n    {line} --{experiment.selection.argument} CHOSEN-BY-THE-SELECTION")


def _launcher(args: argparse.Namespace, places: Places, total: int) -> tuple[LocalLauncher | SlurmLauncher, int]:
    if args.launcher == "slurm":
        return SlurmLauncher(places.output / "logs" / "submitit", _pairs(args.slurm, "--slurm")), args.jobs or total
    if args.slurm:
        raise UsageError("--slurm has no meaning without --launcher slurm")
    return LocalLauncher(args.jobs or 1), args.jobs or 1


def _pairs(texts: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE texts, values read as YAML would read them."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} {text} must have the form KEY=VALUE")
        try:
            pairs[key] = parse_yaml(value)
        except ValueError:
            pairs[key] = value
    return pairs


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another sweep is running in {folder}; wait for it or stop it") from None
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--dry_run | head` ends quietly
    sys.exit(main())
