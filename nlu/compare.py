"""Compare methods on one task: every method with the same seeds, one table and its figures.

    python nlu/compare.py --task_name rte --glue_dir DIR --model_name_or_path DIR --methods lora2,lora,adalora --seeds 3
    python nlu/compare.py --train_file train.csv --validation_file dev.csv --model_name_or_path DIR --methods lora2,lora
    python nlu/compare.py --task_name rte --published debertav3 --methods lora2,lora:lora_alpha=64,adalora_r8 --seeds 5

Every other flag goes to nlu/run_glue.py for all methods; NAME:flag=value in --methods sets it for one method.
The others are compared with the first method. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Collection
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import packages_missing

if packages_missing():
    sys.exit(2)

import pandas as pd

from nlu import ROOT
from nlu.arguments import DataArguments, build_parser, method_file, translate
from nlu.errors import OneLineParser, UsageError, exit_code
from nlu.experiments.cells import Table
from nlu.experiments.choosing import choose, chosen_runs, not_finished
from nlu.experiments.experiment import SET_BY_THE_SWEEP, Experiment, make_experiment
from nlu.experiments.fairness import shape_of, unlike
from nlu.experiments.figures import draw
from nlu.experiments.launchers import RUN_GLUE, LocalLauncher
from nlu.experiments.loop import run_experiment
from nlu.experiments.places import Places, check_data, check_writable, parsed_command
from nlu.experiments.records import place_of, portable, settings_of
from nlu.experiments.statistics import as_frame, finished
from nlu.experiments.tables import comparison_table
from nlu.runs.files import write_bytes, write_text
from nlu.tasks import get_task

COMMAND = [sys.executable, str(RUN_GLUE)]
SCRIPTS = ROOT / "scripts"
RATES = "3e-4,1e-3,3e-3"  # tried by --tune; one more where the best is at an end, BEYOND times further
USUAL = "usual"  # --tune without rates
BEYOND = 3.0
_FOR_ALL = {field.name for field in fields(DataArguments)} - {
    "class_weights", "length_bucketing", "max_train_samples", "pad_to_max_length",
} | {"do_train", "do_eval", "eval_strategy", "eval_steps", "eval_delay"}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit code: 0, 1 where a run failed, 2 for bad arguments, 128 + signal when stopped."""
    try:
        args, rest = own_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        return compare(args, flag_values(rest))
    except BaseException as error:
        return exit_code(error)


def own_parser() -> argparse.ArgumentParser:
    """The flags that are this program's own."""
    parser = OneLineParser(
        prog="compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="compare.py --methods NAMES [--seeds N] [--tune [RATES]] [--published BACKBONE] [run_glue's flags]",
    )
    add = parser.add_argument
    add("--methods", required=True, metavar="NAMES", help="files of configs/methods/, comma-separated: lora2,lora,…")
    add("--seeds", type=int, default=3, metavar="N", help="runs with the seeds 1 to N (3)")
    add(
        "--tune",
        nargs="?",
        const=USUAL,
        metavar="RATES",
        help="first choose each method's learning rate on a held-out tenth of the training set, among RATES, or "
        f"{RATES} (full: around its own rate)",
    )
    add("--published", choices=("debertav3", "robertalarge"), help="the published settings of scripts/run_*.sh")
    add("--name", help="name of the comparison (default: compare-TASK)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (1); with more, step times are not comparable")
    add("--output_dir", type=Path, default=Path("output"), help="runs, table, figures go to OUTPUT_DIR/NAME/ (output)")
    add("--rerun_changed", action="store_true", help="run again what was made with other arguments or contents")
    return parser


def flag_values(words: list[str]) -> dict[str, Any]:
    """run_glue's flags as a mapping, read by its own parser.

    Raises:
        UsageError: for what run_glue does not take, or a flag that a comparison sets itself.
    """
    values = vars(_parser().parse_args(translate(words)))
    for name in ("method", "seed", *SET_BY_THE_SWEEP):
        if name in values:
            raise UsageError(f"--{name} is set for each run: give --methods, --seeds and --output_dir")
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}


@cache
def _parser() -> argparse.ArgumentParser:
    """run_glue's parser, which gives the flags that are there, without defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser


def compare(args: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Check everything, run what is not finished, and write the table and the figures.

    Raises:
        UsageError: for whatever the user can put right, before the first run starts.
    """
    if args.seeds < 1 or args.jobs < 1:
        raise UsageError("--seeds and --jobs must be at least 1")
    check_writable(args.output_dir, "output_dir")
    experiment = plan(args, flags)
    folder = args.output_dir / experiment.name
    measured = args.output_dir / "measured" / f"{experiment.name}.jsonl"
    places = Places(measured, folder, COMMAND)
    selecting = experiment.selection.runs if experiment.selection else []
    parsed = {run.folder: parsed_command(run, places) for run in [*selecting, *experiment.runs]}
    if not all(each.training.do_eval for each in parsed.values()):
        raise UsageError("--do_eval False leaves nothing to compare: leave it out")
    firsts = [run for run in experiment.runs if run.axes["seed"] == 1]
    shapes = {run.axes["method"]: shape_of(parsed[run.folder]) for run in firsts}
    labels = {run.axes["method"]: place_of(run, parsed[run.folder].method.method)["label"] for run in firsts}
    if len({*labels.values()}) < len(labels):
        raise UsageError(f"--methods: two would have one name in the table: {', '.join(labels.values())}")
    warnings = unlike(firsts, shapes, places, tuned=args.tune is not None)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    pending = not_finished(selecting, experiment.runs, experiment.selection, places)
    check_data(parsed[run.folder] for run in pending)
    code = run_experiment(
        experiment, selecting, experiment.runs, places, LocalLauncher(args.jobs), args.jobs, args.rerun_changed
    )
    lines = {run: line for run, line in places.lines().items() if run in parsed or _beyond(line, shapes)}
    frame = as_frame((experiment.name, line) for line in lines.values())
    final = finished(frame)
    if len(final):
        final = final.assign(place=final.label.map(list(labels.values()).index)).sort_values(["place", "seed"])
        table = comparison_table(experiment.name, final, {labels[name]: each.scale for name, each in shapes.items()})
        table.notes.extend(f"Not alike: {warning}." for warning in warnings)
        known, _ = chosen_runs(experiment.runs, experiment.selection, choose(experiment.selection, places))
        changed = {labels[run.axes["method"]]: run for run in known if places.state(run) == "changed"}
        table.notes.extend(f"{label}: what is shown was {places.what_changed(run)}." for label, run in changed.items())
        done = {label: int((final.label == label).sum()) for label in labels.values()}
        table.notes.extend(
            f"{label}: {n} of {args.seeds} runs finished." for label, n in done.items() if n < args.seeds
        )
        write(table, final, frame, folder)
    return code


def plan(args: argparse.Namespace, flags: dict[str, Any]) -> Experiment:
    """The comparison as an experiment: a grid of methods and seeds, and a selection for --tune."""
    task = get_task(flags["task_name"]).name if "task_name" in flags else None
    if task is None and "train_file" not in flags:
        raise UsageError("nothing to compare on: give --task_name, or --train_file and --validation_file")
    if "model_name_or_path" not in flags and not args.published:
        raise UsageError("--model_name_or_path is missing: give a model's folder or its name on the hub")
    specs = {spec: _spec(spec) for spec in args.methods.split(",")}
    if len(specs) < len(args.methods.split(",")):
        raise UsageError("--methods names a method twice")
    name = args.name or f"compare-{task or re.sub('[^A-Za-z0-9_.-]+', '_', Path(flags.get('train_file', 'own')).stem)}"
    content: dict[str, Any] = {"name": name, "description": f"{', '.join(specs)} on {task or 'own data'}"}
    usual = {"do_train": True, "do_eval": True, "eval_strategy": "steps" if "eval_steps" in flags else "epoch"}
    content["base"] = {**({} if args.published else usual), **flags, **({"task_name": task} if task else {})}
    content["grid"] = {"method": specs, "seed": list(range(1, args.seeds + 1))}
    if args.published:
        script = SCRIPTS / f"run_{args.published}_{task}.sh"
        if not SCRIPTS.is_dir():
            raise UsageError(
                "--published reads the repository's scripts/, which an installed package lacks: use a clone"
            )
        if not script.is_file():
            raise UsageError(f"--published {args.published} has no settings for {task or 'own data'} in {SCRIPTS}")
        content["command"] = shlex.join(["env", f"PYTHON={sys.executable}", "bash", str(script)])
    if args.tune is not None:
        if "learning_rate" in flags:
            raise UsageError("--tune chooses the learning rate: leave --learning_rate out")
        untold = args.tune == USUAL
        named = (RATES if untold else args.tune).split(",")
        rates = [flag_values([f"--learning_rate={rate}"])["learning_rate"] for rate in named]
        own = {spec: _own_rates(values["method"]) for spec, values in specs.items()} if untold else {}
        content["select"] = {
            "values": {"learning_rate": rates}, "beyond": {"learning_rate": BEYOND}, "seeds": [101],
            "set": {"holdout_fraction": 0.1},
            "overrides": [
                {"when": {"method": spec}, "values": {"learning_rate": each}} for spec, each in own.items() if each
            ],
        }  # fmt: skip
    return make_experiment(content)


def _beyond(line: dict[str, Any], methods: Collection[str]) -> bool:
    """Whether a line is of a learning rate that --tune tried further out, for one of these methods."""
    return bool(line.get("extra")) and line["axes"].get("method") in map(portable, methods)


def _spec(spec: str) -> dict[str, Any]:
    """NAME:flag=value:… as arguments."""
    name, *settings = settings_of(spec)
    if not name:
        raise UsageError("--methods holds an empty name: give files of configs/methods/, such as lora2,lora")
    if ":" in name:
        raise UsageError(f"--methods {spec}: what follows a name has the form :flag=value")
    values = flag_values([f"--{setting}" for setting in settings])
    if len(values) < len(settings):
        raise UsageError(f"--methods {spec} gives a flag twice")
    if common := sorted(_FOR_ALL & set(values)):
        raise UsageError(f"--methods {spec}: {common[0]} decides what is scored: give --{common[0]} for all methods")
    return {"method": name} | values


def _own_rates(method: str) -> list[float]:
    """What --tune tries for a method whose file has a learning rate of its own: around that."""
    flags = dict(flag.split("=", 1) for flag in method_file(["--method", method])[2])
    rate = float(flags.get("--learning_rate", 0))
    return [float(f"{rate * factor:.3g}") for factor in (1 / BEYOND, 1, BEYOND)] if rate else []


def write(table: Table, final: pd.DataFrame, frame: pd.DataFrame, folder: Path) -> None:
    """Print the table, and write it (comparison.md and .csv) with its figures into the comparison's folder."""
    print(f"\n{table.markdown()}")
    write_text(folder / "comparison.md", table.markdown())
    write_text(folder / "comparison.csv", table.csv())
    for name, drawn in draw("comparison", final, frame):
        drawing = drawn()
        if drawing is not None:
            write_bytes(folder / f"{name}.png", drawing.image("png"))
    print(f"written: {folder}/comparison.md, .csv and comparison_*.png")


if __name__ == "__main__":
    sys.exit(main())
