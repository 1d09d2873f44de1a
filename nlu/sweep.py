"""Run an experiment: every combination of methods, tasks, seeds and flags that a file in configs/experiments/ names.

    python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --set glue_dir=DIR --jobs 2
    python nlu/sweep.py configs/experiments/evidence.yaml --set model_name_or_path=DIR --only 'cola' --dry_run

It starts the runs that are not finished and continues interrupted ones. The command can be stopped (Ctrl-C or SIGTERM:
the runs save and end) and given again at any time. A failing run does not stop the others; the exit code is then 1.

A run's folder, with its full record, checkpoints and adapter, is OUTPUT_DIR/EXPERIMENT/RUN/. When a run ends, one line
with what tables and figures need is added to MEASURED_DIR/EXPERIMENT.jsonl, without paths of this machine;
python nlu/report.py makes tables and figures from these lines.

If a finished run had arguments that the file no longer gives, or a model, data or files whose contents have changed,
the sweep does not start; --rerun_changed replaces such runs. A model on the hub that has changed does not stop it: each
run keeps the commit that it began with, and the report gives the runs of another commit a row of their own.

The top of nlu/experiments/experiment.py explains the format of an experiment file.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlu.arguments import positive_int
from nlu.data.glue import required_files
from nlu.errors import OneLineParser, UsageError, program, reason
from nlu.experiments.experiment import Experiment, Run, load_experiment
from nlu.experiments.fairness import unlike_scales
from nlu.experiments.launcher import RUN_GLUE, Launcher
from nlu.experiments.lines import read_lines
from nlu.experiments.sweep_loop import Ran, Sweep
from nlu.json_yaml import parse_yaml
from nlu.runs.identity import INPUTS
from nlu.tasks import TASKS


def build_parser() -> argparse.ArgumentParser:
    """The command line of the sweep."""
    parser = OneLineParser(prog="sweep.py", description=__doc__)
    add = parser.add_argument
    add("experiment", type=Path, help="an experiment file, such as configs/experiments/evidence.yaml")
    add("--set", type=_pair, action="append", default=[], metavar="FLAG=VALUE",
        help="an argument for every run; repeat as needed")  # fmt: skip
    add("--jobs", type=positive_int, metavar="N",
        help="runs at once (default: one for each device, and one without)")  # fmt: skip
    add("--gpus_per_run", type=positive_int, default=1, metavar="N",
        help="devices of a run, with torchrun in --command (1)")  # fmt: skip
    add("--only", metavar="REGEX",
        help="only runs whose name matches; their rows are tuned on all tasks that get one rate")  # fmt: skip
    add("--dry_run", action="store_true", help="print each run's state and command, start nothing")
    add("--rerun_changed", action="store_true",
        help="repeat, from the start, the runs of this file made with other arguments or contents")  # fmt: skip
    add("--command", type=shlex.split, default=RUN_GLUE,
        help="what starts one run, such as 'python scripts/launch.py --standalone "
        "--nproc_per_node 2 nlu/run_glue.py'; run_glue.py's flags are appended")  # fmt: skip
    add("--measured_dir", type=Path, default=Path("output/measured"), help="the runs' lines (output/measured)")
    add("--output_dir", type=Path, default=Path("output"), help="the runs' folders (output)")
    return parser


@program
def main(words: Sequence[str]) -> int:
    """Check everything, then run what is not finished.

    Returns the exit code: 0 all finished, 1 some failed, 128 + the signal's number when stopped.

    Raises:
        UsageError: anything wrong with the file, the flags or the records found, before the first run starts.
    """
    args = build_parser().parse_args(words)
    experiment = load_experiment(args.experiment, dict(args.set))
    if args.only is not None:
        experiment = replace(experiment, runs=_only(experiment.runs, args.only))
    check(experiment.needed)
    print(f"{experiment.name}: {experiment.description or 'no description'}")
    asked = [run for run in experiment.runs if run.asked]
    for warning in unlike_scales(asked):
        print(f"warning: {warning}", file=sys.stderr)
    launcher = Launcher(args.jobs, args.gpus_per_run, all(run.arguments.get("use_cpu") for run in asked))
    print(f"devices: {launcher}")
    if args.dry_run:
        _show(args, experiment)
        return 0
    from nlu.experiments.tuning import tune_and_run  # takes seconds

    return tune_and_run(experiment, lambda part: _sweep(args, part).run(launcher, args.rerun_changed))


def _sweep(args: argparse.Namespace, experiment: Experiment) -> Sweep:
    return Sweep(experiment, args.measured_dir, args.output_dir, args.command)


def _show(args: argparse.Namespace, experiment: Experiment) -> None:
    """Print the state and the command of each run, and what all of them cost; runs without a rate yet wait for it."""
    from nlu.experiments.cost import cost_table
    from nlu.experiments.tuning import choose, tuning_runs

    texts: dict[str, str] = {}

    def show(part: Experiment) -> Ran:
        sweep = _sweep(args, part)
        states = sweep.states()
        for run in sweep.runs:
            texts[run.name] = f"{states[run.name]:<10}{run.name}\n    {shlex.join(sweep.command_line(run))}"
        return 0, read_lines(sweep.measured)

    _, finals, _ = choose(experiment, show)
    show(finals)
    for run in finals.runs:
        if run.rates and run.asked:
            texts[run.name] = f"{'waits':<10}{run.name}\n    until its tuning has chosen a learning rate"
    tuning, finals = ([run for run in runs if run.asked] for runs in (tuning_runs(experiment), experiment.runs))
    print("\n".join([*texts.values(), cost_table(tuning, finals, args.gpus_per_run)]))


def check(runs: list[Run]) -> None:
    """Refuse now, not after hours, what a run would refuse; runs that differ only in seed are checked once.

    Raises:
        UsageError: a wrong flag, or data that are not there; the message names a run.
    """
    for run in {str(run.arguments | {"seed": None}): run for run in runs}.values():
        values = run.parse()
        task = TASKS.get(values.task_name)
        splits = filter(values.reads, task.splits if task else ("train", "validation", "test"))
        try:
            for split in splits:
                if task is None and (file := getattr(values, f"{split}_file")):
                    open(file, "rb").close()
                elif task and values.glue_dir:
                    required_files(task, split, values.glue_dir)
        except (UsageError, OSError) as error:
            raise UsageError(f"{run.name}: {reason(error)}") from None


def _only(runs: list[Run], only: str) -> list[Run]:
    """The runs, of which those whose names match are asked for."""
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UsageError(f"--only {only} is not a regular expression: {error}") from None
    matching = [replace(run, asked=bool(pattern.search(run.name))) for run in runs]
    if not any(run.asked for run in matching):
        raise UsageError(f"--only {only} matches no run; --dry_run lists their names")
    return matching


def _pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE as a pair; the value is read as YAML, but the name of a file or folder stays text."""
    key, _, value = text.partition("=")
    if not key or not value.strip():
        raise argparse.ArgumentTypeError(f"{text} must have the form KEY=VALUE; KEY=null removes a flag")
    try:
        return key, value if key in INPUTS and value != "null" else parse_yaml(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
