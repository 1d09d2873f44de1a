"""Compare methods on one task: train each with the same seeds, and write a page with the answer, a table and figures.

    python nlu/compare.py --task_name rte --glue_dir DIR --model_name_or_path DIR --methods lora2,lora,adalora --tune
    python nlu/compare.py --train_file train.csv --validation_file dev.csv --model_name_or_path DIR \\
        --methods lora2,lora --seeds 5 --learning_rate 1e-3
    python nlu/compare.py --task_name rte --published deberta-v3-base --methods lora2,lora --tune

All other flags go to nlu/run_glue.py, for every method; NAME:flag=value in --methods sets a flag for one method.
After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlu import METHOD_FOLDER
from nlu.arguments import positive_int
from nlu.command_line import method_file, read_flags
from nlu.errors import OneLineParser, UsageError, program
from nlu.experiments.experiment import Experiment, make_experiment
from nlu.experiments.fairness import unlike_scales
from nlu.experiments.launcher import RUN_GLUE, Launcher
from nlu.experiments.names import settings_of
from nlu.experiments.sweep_loop import Ran, Sweep

RATES = "3e-4,1e-3,3e-3"  # tried by --tune
# Flags that decide what is scored: they cannot differ between methods.
_FOR_ALL = {
    "task_name", "glue_dir", "train_file", "validation_file", "test_file", "text_columns", "label_column", "metric",
    "max_seq_length", "max_eval_samples", "holdout_fraction", "holdout_seed", "do_train", "do_eval", "eval_strategy",
    "eval_steps",
}  # fmt: skip


@program
def main(words: Sequence[str]) -> int:
    """Check everything, run what is not finished, and write the table and the figures.

    Returns the exit code: 0, 1 if a run failed, 128 + the signal's number when stopped.

    Raises:
        UsageError: anything that the user can correct, before the first run starts.
    """
    args, rest = own_parser().parse_known_args(words)
    experiment = plan(args, flag_values(rest))
    labels = {run.axes["method"]: run.label for run in experiment.runs}
    parsed = [run.parse() for run in experiment.runs if run.axes["seed"] == 1]
    # These imports take seconds, so a command with an error is refused before them.
    from nlu.data.splits import load_data
    from nlu.experiments.page import PAGE, TITLE, earlier_page, write_report
    from nlu.experiments.tuning import tune_and_run, tuning_runs

    measured, output = args.output_dir / "measured", args.output_dir / experiment.name
    earlier_page(output / PAGE, TITLE)  # refuses a page of somebody else's now, not after the runs
    for arguments in [parsed[0], *(run.parse() for run in tuning_runs(experiment)[:1])]:
        load_data(arguments)  # an error in the data shows now, not in every run
    for warning in unlike_scales(experiment.runs):
        print(f"warning: {warning}", file=sys.stderr)
    launcher = Launcher(args.jobs, use_cpu=parsed[0].use_cpu)
    print(f"devices: {launcher}")

    def run_all(part: Experiment) -> Ran:
        return Sweep(part, measured, args.output_dir, RUN_GLUE).run(launcher, args.rerun_changed)

    code = tune_and_run(experiment, run_all)
    if code <= 1:  # not stopped
        text = write_report(measured, output, experiment, labels.get(args.reference))
        print(f"\n{text}", end="")
    return code


def own_parser() -> argparse.ArgumentParser:
    """The parser of compare.py's own flags."""
    parser = OneLineParser(
        prog="compare.py",
        description=__doc__,
        usage="compare.py --methods NAMES [--seeds N] [--tune [RATES]] [run_glue's flags]",
    )
    add = parser.add_argument
    add("--methods", required=True, metavar="NAMES", help="files of configs/methods/, comma-separated: lora2,lora,…")
    add("--reference", metavar="NAME",
        help="the one of --methods that the others are compared with (LoRA, else the first)")  # fmt: skip
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs with the seeds 1 to N (3)")
    add("--tune", nargs="?", const="", metavar="RATES",
        help="first choose each method's learning rate by its score on a held-out tenth of the training set, from "
        f"RATES or {RATES} (a method whose file has a rate, such as full: from three around it); these runs are named "
        "NAME_tuning; --holdout_fraction changes the tenth)")  # fmt: skip
    add("--name", help="name of the comparison (default: compare-TASK, or compare-FILE for your own data)")
    add("--jobs", type=positive_int, metavar="N",
        help="runs at once (default: one for each device, or one); sharing a device, step times vary more")  # fmt: skip
    add("--output_dir", type=Path, default=Path("output"), help="runs and report.md go to OUTPUT_DIR/NAME/ (output)")
    add("--rerun_changed", action="store_true", help="repeat the runs made with other arguments or contents")
    return parser


def flag_values(words: list[str]) -> dict[str, Any]:
    """run_glue's flags as a mapping, read by its own parser.

    Raises:
        UsageError: run_glue has no such flag, or the comparison sets it itself.
    """
    values = read_flags(words)
    for name in ("method", "seed", "root_output_dir", "overwrite_output_dir"):
        if name in values:
            raise UsageError(f"--{name} is set by compare.py: use --methods, --seeds and --output_dir instead")
    if values.get("dry_run"):
        raise UsageError("--dry_run shows one run (run_glue.py) or an experiment (sweep.py): leave it out")
    return values


def plan(args: argparse.Namespace, flags: dict[str, Any]) -> Experiment:
    """The comparison as an experiment: methods × seeds, and with --tune its section `tune`."""
    specs = {spec: _spec(spec) for spec in split_methods(args.methods)}
    if args.reference not in (None, *specs):
        raise UsageError(f"--reference {args.reference} is none of --methods: {', '.join(specs)}")
    data = flags.get("task_name") or re.sub("[^A-Za-z0-9_.-]+", "_", Path(flags.get("train_file", "own")).stem)
    name = args.name or f"compare-{data}"
    usual = {"do_train": True, "do_eval": True}
    if "published" not in flags:
        usual["eval_strategy"] = "steps" if "eval_steps" in flags else "epoch"
    base = {**usual, **flags}
    grid = {"method": specs, "seed": list(range(1, args.seeds + 1))}
    tune = None
    if args.tune is not None:
        if any("learning_rate" in values for values in (flags, *specs.values())):
            raise UsageError("--tune sets --learning_rate itself: leave it out")
        tune = {
            "learning_rate": {spec: _rates(args.tune, own["method"]) for spec, own in specs.items()},
            "share_of_steps": 1,
            "holdout_fraction": base.pop("holdout_fraction", 0.1),
        }
    return make_experiment(name, grid, base=base, tune=tune)


def split_methods(text: str) -> list[str]:
    """NAME,NAME:flag=value,… as its parts; a comma inside a value (lora_module=query,value) does not separate them."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and ":" in parts[-1] and not (METHOD_FOLDER / f"{part.partition(':')[0]}.yaml").is_file():
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _spec(spec: str) -> dict[str, Any]:
    """NAME:flag=value:… as arguments."""
    name, *settings = settings_of(spec)
    values = flag_values([f"--{setting}" for setting in settings])
    if common := sorted(_FOR_ALL & set(values)):
        raise UsageError(f"--methods {spec}: {common[0]} decides what is scored: give --{common[0]} for all methods")
    return {"method": name} | values


def _rates(named: str, method: str) -> list[float]:
    """The rates to try: those that --tune names, three around the one in the method's file, or `RATES`."""
    rate = method_file(method)[1].get("learning_rate")
    if rate and not named:
        return [float(f"{rate * factor:.3g}") for factor in (1 / 3, 1, 3)]
    return [flag_values([f"--learning_rate={each}"])["learning_rate"] for each in (named or RATES).split(",")]


if __name__ == "__main__":
    sys.exit(main())
