"""The command line of ``nlu/run_glue.py``: which source the value of each argument comes from.

Later sources override earlier ones: the defaults in ``nlu/arguments.py``, the published settings (``--published``),
the method's file, the flags. ``--dry_run`` shows the source of each value. Torch and transformers are not imported.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlu import METHOD_FOLDER, TASK_FOLDER
from nlu.argument_conflicts import check_and_complete
from nlu.arguments import CHOICE_FLAGS, DATA_FLAGS, MODEL_FLAGS, TRAINING_FLAGS, Arguments
from nlu.errors import OneLineParser, UsageError
from nlu.json_yaml import read_yaml
from nlu.methods.registry import FLAGS as METHOD_FLAGS
from nlu.methods.registry import METHODS, scale_of
from nlu.runs.processes import world_size

logger = logging.getLogger("nlu")

PARTS = {
    "model": MODEL_FLAGS,
    "data": DATA_FLAGS,
    "method": (*CHOICE_FLAGS, *METHOD_FLAGS.values()),
    "training": TRAINING_FLAGS,
}
DEFAULTS = {flag.name: flag.default for flags in PARTS.values() for flag in flags}


@functools.cache
def build_parser() -> OneLineParser:
    """The parser of all flags; its result holds only the flags that a command gives."""
    parser = OneLineParser(
        prog="run_glue.py",
        usage="run_glue.py --model_name_or_path MODEL {--task_name T | --train_file F} --do_train …",
        description="Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method.\nThe same "
        "command continues an interrupted run from its last checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    for part, flags in PARTS.items():
        group = parser.add_argument_group(part)
        for flag in flags:
            flag.add_to(group)
    parser.add_argument("--dry_run", action="store_true", help="Print the values that the run would use and stop.")
    # torch.distributed.launch passes this flag; the environment has the same value.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse the command line, and check all that can be checked without data or model.

    Raises:
        UsageError: for anything unknown, malformed or contradictory; one line that says what to change.
    """
    given = read_flags(argv)
    dry_run = given.pop("dry_run", False)
    config, implied = chosen_method(given)
    base, of_method = method_file(config)
    sources = {
        "default": DEFAULTS,
        **published_settings(given, base),
        f"configs/methods/{config}.yaml": of_method,
        "the command": implied | given,
    }
    values, source = {}, {}
    for name, found in sources.items():
        values |= found
        source |= dict.fromkeys(found, name)
    chosen = {name for name in values if source[name] != "default"}
    args = Arguments(**values | {"method": base, "method_config": config, "world_size": world_size()})
    check_and_complete(args, given, chosen)
    if args.root_output_dir is None:
        model = Path(args.model_name_or_path).name
        data = f"glue/{model}/{args.task_name}" if args.task_name else f"own/{model}/{Path(args.train_file).stem}"
        args.root_output_dir = f"output/{data}/{config}/seed-{args.seed}"
    args.values = {name: getattr(args, name) for name in (*DEFAULTS, "method_config")}
    args.command = shlex.join(["python", "nlu/run_glue.py", *argv])
    args.dry_run, args.sources = dry_run, source
    return args


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """The values of the flags in a command, by name.

    Raises:
        UsageError: for an unknown flag or a value that a flag does not accept.
    """
    values = vars(build_parser().parse_args(words))
    values.pop("local_rank", None)
    return values


def as_words(values: Any, source: str | Path) -> list[str]:
    """{"lora_r": 8, "do_train": true} → ["--lora_r=8", "--do_train=True"]; a flag whose value is null is left out.

    Raises:
        UsageError: if ``values`` is not a mapping of names to values; the message names the file, ``source``.
    """
    if not isinstance(values, dict) or any(isinstance(value, list) for value in values.values()):
        raise UsageError(f"{source} must be a mapping of argument names to values")
    texts = {n: json.dumps(value) if isinstance(value, dict) else value for n, value in values.items()}
    return [f"--{name}={text}" for name, text in texts.items() if text is not None]


def chosen_method(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method's file in configs/methods/ that a command chooses, and the values that published flags set besides.

    Raises:
        UsageError: if published flags contradict each other or are combined with --method.
    """
    flags = [name for name in ("apply_lora", "apply_adalora", "lora_type") if given.get(name)]
    if not flags:
        return given.get("method", "lora2"), {}
    if "method" in given:
        raise UsageError(f"--{flags[0]} chooses a method too: leave out either it or --method")
    prunes, lora_type = given.get("apply_adalora", False), given.get("lora_type")
    if prunes and lora_type == "frd":
        raise UsageError("--apply_adalora needs --lora_type svd: plain LoRA has no singular values to allocate")
    return ("lora2", {"rank_allocation": prunes}) if prunes or lora_type == "svd" else ("lora", {})


def method_file(config: str) -> tuple[str, dict[str, Any]]:
    """Read the base method, and the values of its flags, from a file in configs/methods/; null removes a published one.

    Raises:
        UsageError: if there is no such file.
    """
    files = {path.stem: path for path in sorted(METHOD_FOLDER.glob("*.yaml"))}
    if config not in files:
        raise UsageError(f"unknown method {config!r}: --method takes one of {', '.join(files)}")
    content = read_yaml(files[config])
    values = read_flags(as_words(content, files[config].name))
    return values.pop("method"), values | {name: None for name, value in content.items() if value is None}


def published_settings(given: Mapping[str, Any], method: str) -> dict[str, dict[str, Any]]:
    """The settings that ``--published`` selects, by their source; a later one takes precedence.

    They are those of all methods, without flags that this one does not read, and those published for this one.

    Raises:
        UsageError: if there are no published settings for the task or the backbone.
    """
    backbone, task = given.get("published"), given.get("task_name")
    if backbone is None:
        return {}
    if task is None:
        raise UsageError("--published needs --task_name: settings are published for each task")
    found: dict[str, dict[str, Any]] = {}
    read = {flag.name for flag in METHODS[method].flags}
    for file in ("every_task", task):
        path = TASK_FOLDER / f"{file}.yaml"
        settings = read_yaml(path) if path.is_file() else {}
        if backbone not in settings:
            raise UsageError(f"--published {backbone} is unknown: {path} has {', '.join(settings) or 'no settings'}")
        common = {n: v for n, v in settings[backbone].items() if n in read or n not in (*METHOD_FLAGS, *METHODS)}
        for section, values in (("all methods", common), (method, settings[backbone].get(method, {}))):
            found[f"configs/tasks/{path.name}, {section}"] = read_flags(as_words(values, path))
    order = sorted(found, key=lambda source: source.endswith(f", {method}"))  # a method's own sections come last
    return {source: found[source] for source in order}


# The values that --dry_run shows even if they are defaults, if the method reads them.
_ALWAYS = (
    "learning_rate", "lora_r", "lora_alpha", "lora_k", "num_train_epochs", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_seq_length", "seed",
)  # fmt: skip


def resolved_lines(args: Arguments) -> list[str]:
    """The values that decide what a run computes, for --dry_run: lines of name, value and source.

    Those are the flags that something sets, and the most important defaults. Below them are the rows of a step, and for
    a low-rank method, the scale α/r and the learning rate × α/r, which methods are compared at.
    """
    read = {flag.name for flag in METHODS[args.method].flags}
    args = fit_schedule(args, max(0, args.max_steps))  # the steps of epochs are known only with the data
    rows = []
    for name in DEFAULTS:
        value, source = getattr(args, name), args.sources[name]
        if source == "default" and value != DEFAULTS[name]:
            source = "follows from the others"
        is_read, matters = name in read or name not in METHOD_FLAGS, source != "default" or name in _ALWAYS
        if value is not None and is_read and matters:
            rows.append((name, str(value), source))
    parts = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    rows.append(("batch", str(math.prod(parts)), "{} at once × {} accumulated × {} processes".format(*parts)))
    if (scale := scale_of(vars(args))) is not None:
        rows.append(("α/r", f"{scale:.4g}", "the scale of the update"))
        if args.learning_rate is not None:
            rows.append(("learning_rate × α/r", f"{scale * args.learning_rate:.4g}", "compare methods at this"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows]


def fit_schedule(arguments: Arguments, total_steps: int) -> Arguments:
    """Shrink the warm-ups and the masking interval of a training that is shorter than ``--schedule_steps``.

    Args:
        total_steps: optimiser steps of this training; 0 if nothing is trained.

    Each number n of steps becomes ⌊n · total_steps / schedule_steps⌋, the masking interval at least 1. A warm-up given
    as a fraction of the training does not change, nor does a number that is not set.
    """
    made_for = arguments.schedule_steps
    if made_for is None or not 0 < total_steps < made_for:
        return arguments
    logger.warning(
        "the training has %d steps, but its schedule was made for %d: warm-ups and masking interval shrink in "
        "proportion", total_steps, made_for,
    )  # fmt: skip
    fitted = copy.copy(arguments)
    if fitted.warmup_steps >= 1:
        fitted.warmup_steps = int(fitted.warmup_steps) * total_steps // made_for
    for name, least in (("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1)):
        number = getattr(fitted, name)
        if number is not None:
            setattr(fitted, name, max(least, number * total_steps // made_for))
    return fitted
