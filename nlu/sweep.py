"""Run an experiment: every combination of methods, tasks, seeds and flags that a file in configs/experiments/ names."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import packages_missing

if packages_missing():
    sys.exit(2)

from nlu.errors import OneLineParser, UsageError, exit_code
from nlu.experiments.choosing import choose, chosen_runs, not_finished, possible_second_round
from nlu.experiments.experiment import Experiment, Run, load_experiment, split_command
from nlu.experiments.launchers import RUN_GLUE, LocalLauncher, SlurmLauncher
from nlu.experiments.loop import run_experiment
from nlu.experiments.places import Places, can_be_checked, check_data, check_writable, command_line, parsed_command
from nlu.json_yaml import parse_yaml
from nlu.runs.digests import INPUTS

DESCRIPTION = """\
Starts the runs that are not finished and continues interrupted ones, so the command can be stopped (Ctrl-C or
SIGTERM: the runs save and end) and given again at any time. A failing run does not stop the others; the sweep then ends
with exit code 1. A run that another row or experiment has finished with the same arguments and contents is taken over,
not repeated.

A run's folder, with its full record, checkpoints and adapter, is OUTPUT_DIR/EXPERIMENT/RUN/. When a run ends, one line
with what tables and figures need is added to MEASURED_DIR/EXPERIMENT.jsonl, without paths of this machine. The
repository's own evidence is made with --measured_dir results/measured; by default lines go to output/measured, which
git ignores. python nlu/report.py --measured_dir DIR makes tables and figures from them.

Runs finished with arguments that the file no longer gives, or with a model, data or files whose contents have changed,
are refused before anything starts; --rerun_changed replaces them."""

EPILOG = """\
examples:
  python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --set glue_dir=DIR --jobs 2
  python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --only 'cola' --dry_run
  python nlu/sweep.py configs/experiments/paper_table1.yaml --launcher slurm \\
      --slurm slurm_partition=gpu --slurm gpus_per_node=1 --slurm timeout_min=240
The format of an experiment file is explained at the top of nlu/experiments/experiment.py."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of the sweep."""
    parser = OneLineParser(
        prog="sweep.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", type=Path, help="an experiment file, such as configs/experiments/evidence.yaml")
    add("--set", action="append", default=[], metavar="FLAG=VALUE", help="an argument for every run; repeat as needed")
    add(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="runs at once (local: 1, sharing the threads unless OMP_NUM_THREADS is set; slurm: all)",
    )
    add("--only", metavar="REGEX", help="only runs whose name matches (and the selection runs that they need)")
    add("--dry_run", action="store_true", help="print each run's state and command, start nothing")
    add("--rerun_changed", action="store_true",
        help="repeat, from the start, the runs of this file made with other arguments or contents")  # fmt: skip
    add("--launcher", choices=("local", "slurm"), default="local", help="processes here, or a cluster (submitit)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="a parameter of submitit's executor")
    add("--command", default=None, help="what starts one run (default: the experiment's, or nlu/run_glue.py)")
    add("--measured_dir", type=Path, default=Path("output/measured"), help="the runs' lines (default: output/measured)")
    add("--output_dir", type=Path, default=Path("output"), help="the runs' folders (default: output)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; returns the exit code: 0 all finished, 1 some failed, 2 bad input, 128 + signal when stopped."""
    try:
        return run_sweep(build_parser().parse_args(argv))
    except BaseException as error:
        return exit_code(error)


def run_sweep(args: argparse.Namespace) -> int:
    """Check everything, then run the selection stage (if any) and the final stage.

    Raises:
        UsageError: anything wrong with the file, the flags or the records found, before the first run starts.
    """
    experiment = load_experiment(args.experiment, _pairs(args.set, "--set"))
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}; it must be at least 1")
    if args.slurm and args.launcher != "slurm":
        raise UsageError("--slurm has no meaning without --launcher slurm")
    command = [sys.executable, os.path.relpath(RUN_GLUE)]
    if args.command is not None:
        command = list(split_command(args.command, "--command"))
    check_writable(args.measured_dir, "measured_dir")
    check_writable(args.output_dir, "output_dir")
    measured, output = args.measured_dir / f"{experiment.name}.jsonl", args.output_dir / experiment.name
    places = Places(measured, output, command, forced=args.command is not None)
    selecting, final = _wanted(experiment, args.only)
    further = possible_second_round(experiment.selection, selecting)
    if not places.forced:  # a wrong flag shows now and not after hours
        # A script takes a tenth of a second: of runs that differ only in the seed, one is checked.
        different = {
            str(run.arguments | {"seed": None}) if run.command else run.folder: run
            for run in [*selecting, *further, *final]
            if can_be_checked(run)
        }
        parsed = {run.folder: parsed_command(run, places) for run in different.values()}
        for name, each in parsed.items():
            if not each.training.do_eval:
                raise UsageError(f"{name}: without --do_eval a run has no score: put do_eval: true into base")
        if args.launcher == "local" and not args.dry_run:  # a cluster's data may lie on its nodes alone
            pending = not_finished(selecting, final, experiment.selection, places)
            # A command of the experiment's own may set the environment in which the data is found.
            check_data(parsed[run.folder] for run in pending if not run.command)
    print(f"{experiment.name}: {experiment.description or 'no description'}")
    if args.dry_run:
        _print_plan(experiment, selecting, final, places)
        return 0
    launcher, jobs = _launcher(args, places, len(selecting) + len(final))
    code = run_experiment(experiment, selecting, final, places, launcher, jobs, args.rerun_changed)
    _name_left_over(experiment, places)
    return code


def _name_left_over(experiment: Experiment, places: Places) -> None:
    """Say which lines are of runs that the file no longer gives."""
    tried = experiment.selection.runs if experiment.selection else []
    known = {run.folder for run in [*experiment.runs, *tried, *possible_second_round(experiment.selection, tried)]}
    if left := [run for run in places.lines() if run not in known]:
        print(
            f"note: {places.measured} has {len(left)} line(s) of runs that the file no longer gives ({left[0]} first): "
            "tables show them until you delete them",
            file=sys.stderr,
        )


def _wanted(experiment: Experiment, only: str | None) -> tuple[list[Run], list[Run]]:
    """The selection runs and the final runs that `--only` leaves."""
    selection = experiment.selection
    candidates = selection.runs if selection else []
    if only is None:
        return candidates, experiment.runs
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UsageError(f"--only {only} is not a regular expression: {error}") from None
    final = [run for run in experiment.runs if pattern.search(run.folder)]
    needed = {selection.key(run) for run in final} if selection else set()
    selecting = [run for run in candidates if pattern.search(run.folder) or selection.key(run) in needed]
    if not final and not selecting:
        raise UsageError(f"--only {only} matches no run; names look like {experiment.runs[0].folder}")
    return selecting, final


def _print_plan(experiment: Experiment, selecting: list[Run], final: list[Run], places: Places) -> None:
    runnable, waiting = chosen_runs(final, experiment.selection, choose(experiment.selection, places))
    elsewhere = places.finished_elsewhere([*selecting, *runnable])
    for run in [*selecting, *runnable]:
        state, line = places.state(run), shlex.join(command_line(run, places))
        if run.folder in elsewhere:
            state, line = "taken over", f"finished with the same arguments as {elsewhere[run.folder][0]}"
        print(f"{state:<12}{run.folder}\n    {line}")
    for run in waiting:
        line = shlex.join(command_line(run, places))
        selection = experiment.selection
        names = next(each.tried for each in selection.runs if selection.key(each) == selection.key(run))
        chosen = " ".join(f"--{name} CHOSEN-BY-THE-SELECTION" for name in names)
        print(f"{'waiting':<12}{run.folder}\n    {line} {chosen}")


def _launcher(args: argparse.Namespace, places: Places, total: int) -> tuple[LocalLauncher | SlurmLauncher, int]:
    if args.launcher == "slurm":
        return SlurmLauncher(places.output / "logs" / "submitit", _pairs(args.slurm, "--slurm")), args.jobs or total
    return LocalLauncher(args.jobs or 1), args.jobs or 1


def _pairs(texts: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE texts, values read as YAML would read them; the name of a file or folder stays text."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} {text} must have the form KEY=VALUE")
        if not value.strip():
            raise UsageError(f"{flag} {text} has no value; {key}=null takes a flag out")
        try:
            pairs[key] = parse_yaml(value)
        except ValueError:
            pairs[key] = value
        if key in (*INPUTS, "cache_dir") and type(pairs[key]) in (int, float):
            pairs[key] = value  # a folder called 2024.10
    return pairs


if __name__ == "__main__":
    sys.exit(main())
