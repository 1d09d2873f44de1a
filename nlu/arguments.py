"""Command line of ``nlu/run_glue.py``: its flags, the published and older spellings, and the files that set flags."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nlu import METHOD_FOLDER, TASK_FOLDER
from nlu.argument_checks import check_method_flags, check_values, share_batch
from nlu.errors import OneLineParser, UsageError, refuse_unknown_flags
from nlu.flags import SHARE, make_parser
from nlu.json_yaml import read_yaml
from nlu.methods.registry import FLAGS as METHOD_FLAGS
from nlu.methods.registry import METHODS
from nlu.run_flags import CHOICE_FLAGS, DATA_FLAGS, MODEL_FLAGS, TRAINING_FLAGS
from nlu.tasks import TASKS, get_task

logger = logging.getLogger("nlu")

_SVD = ("adalora", "lora2")  # what the published --lora_type svd can mean
_RENAMED = {"evaluation_strategy": "eval_strategy", "output_dir": "root_output_dir"}
PARTS = (MODEL_FLAGS, DATA_FLAGS, (*CHOICE_FLAGS, *METHOD_FLAGS.values()), TRAINING_FLAGS)
DEFAULTS = {flag.name: flag.default for flags in PARTS for flag in flags}

HELP = """\
usage: run_glue.py [FILE.yaml] --model_name_or_path MODEL {{--task_name T | --train_file F}} --root_output_dir DIR …

Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method. The same command
continues an interrupted run from its last checkpoint. --help_all lists every argument.

model and data
  --model_name_or_path MODEL   hub name or local folder of the pretrained encoder
  --task_name TASK             {tasks}
  --glue_dir DIR               <task>/<split>.jsonl|parquet|csv, or the official TSV folders; default: the hub's
  --published BACKBONE         the task's published settings on deberta-v3-base or roberta-large (configs/tasks/)
  --train_file, --validation_file, --test_file FILE
                               your own data: CSV, TSV, JSONL or Parquet
  --text_columns A[,B], --label_column NAME, --metric NAME, --class_weights balanced
                               columns, score and class weights of your own data
  --holdout_fraction F         evaluate on a share of the training set
  --max_seq_length N           tokens per input (128)
method
  --method NAME                a file of configs/methods/: lora2, adalora, lora, sora, hadapter, bitfit, full, … (lora2)
  --lora_k K, --lora_r R, --lora_alpha ALPHA, --lora_module NAMES
                               width of LoRA²'s outer scale, rank, scale of the update (alpha / r), adapted modules
  --target_rank R, --init_warmup N, --final_warmup N
                               rank to prune to; steps before pruning starts, and after it ends
training
  --do_train, --do_eval, --do_predict
  --root_output_dir DIR        the run's folder: results.json, adapter/, model/ (checkpoints), log/
  --learning_rate LR, --head_learning_rate LR, --warmup_steps N, --weight_decay D
  --num_train_epochs E, --max_steps N, --early_stopping_patience N
  --total_batch_size N, --per_device_train_batch_size N, --bf16, --length_bucketing, --seed N
  --eval_strategy, --save_strategy no|steps|epoch, --eval_steps, --save_steps, --logging_steps N
results
  --load_best_model_at_end     keep the best checkpoint's weights, not the last ones
  --report_to NAME             tensorboard, wandb or trackio
  --push_to_hub --hub_model_id OWNER/NAME
                               upload the adapter with its card at the end
"""


@dataclass(frozen=True)
class Arguments:
    """All arguments of one run, which stay as they are.

    Attributes:
        model, data, method, training: values by the names of the flags, in four parts. ``method.method`` is the base
            method; ``training.world_size`` and ``training.process_index`` are what the launcher says.
        method_config: the name of the method's file.
        record: every flag's value by name, as JSON can hold it.
    """

    model: Any
    data: Any
    method: Any
    training: Any
    method_config: str
    record: Mapping[str, Any]


def build_parser() -> OneLineParser:
    """The parser behind the command line; also what tests check scripts and configs against."""
    return make_parser(
        (flag for flags in PARTS for flag in flags),
        prog="run_glue.py",
        usage="run_glue.py [FILE.yaml] --model_name_or_path MODEL {--task_name T | --train_file F} "
        "--root_output_dir DIR …",
        add_help=False,
    )


def parse_arguments(argv: list[str]) -> Arguments:
    """Arguments from the command line, checked as far as that needs neither data nor model.

    Later ones win: defaults, the published settings, the method's file, an argument file (first argument), the command
    line. It imports neither torch nor transformers.

    Raises:
        UsageError: for anything unknown, malformed or contradictory; one line that says what to change.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[:1] = file_flags(Path(words[0]))
    words = translate(words)
    parser = build_parser()
    _explain(parser, words)
    given = _names(words, parser)
    config, base, of_method = method_file(words)
    published = published_flags(words, base)
    check_method_flags(given, _names(of_method, parser), config, base)
    values = vars(parser.parse_args([*published, *of_method, *words]))
    values["method"] = base
    parts = [SimpleNamespace(**{flag.name: values[flag.name] for flag in flags}) for flags in PARTS]
    model, data, method, training = parts
    training.world_size, training.process_index = (int(os.environ.get(n, d)) for n, d in _PROCESSES.items())
    for flags, part in zip(PARTS, parts, strict=True):
        for flag in flags:
            flag.check(getattr(part, flag.name))
    check_values(model, data, method, training, given)
    if training.root_output_dir is None:
        name = Path(model.model_name_or_path).name
        training.root_output_dir = f"output/glue/{name}/{data.task_name}/{config}/seed-{training.seed}"
    share_batch(training, given | _names(of_method + published, parser))
    record = {flag.name: getattr(p, flag.name) for flags, p in zip(PARTS, parts, strict=True) for flag in flags}
    return Arguments(*parts, config, {**record, "method_config": config})


_PROCESSES = {"WORLD_SIZE": "1", "RANK": "0"}  # set by torchrun and accelerate launch


def _explain(parser: OneLineParser, words: Iterable[str]) -> None:
    """For ``--help`` print the usual arguments by purpose, for ``--help_all`` every one; exit."""
    if {"-h", "--help"} & {*words}:
        print(HELP.format(tasks=", ".join(TASKS)), end="")
    elif "--help_all" in words:
        parser.print_help()
    else:
        return
    sys.exit(0)


def _names(words: Iterable[str], parser: OneLineParser) -> set[str]:
    """The arguments that flags set; UsageError for a flag that there is not."""
    refuse_unknown_flags(words, parser._option_string_actions)
    return {word.partition("=")[0][2:] for word in words if word.startswith("--")}


def command_line() -> str:
    """The command as given, for the record."""
    return " ".join(["python", *sys.argv])


def fit_schedule(arguments: Arguments, total_steps: int) -> Arguments:
    """The arguments with warm-ups and masking interval shrunk, for a training shorter than ``--schedule_steps``.

    Args:
        total_steps: optimiser steps of this training; 0 where nothing is trained.

    Each number n of steps becomes ⌊n · total_steps / schedule_steps⌋, the masking interval at least 1. A warm-up given
    as a share of the training stays, and so does a number that is not set.
    """
    made_for = arguments.training.schedule_steps
    if made_for is None or not 0 < total_steps < made_for:
        return arguments
    if arguments.training.process_index == 0:
        logger.warning(
            "the training has %d steps, its schedule was made for %d: warm-ups and masking interval shrink in "
            "proportion", total_steps, made_for,
        )  # fmt: skip
    fitted = copy.deepcopy(arguments)
    if fitted.training.warmup_steps >= 1:
        fitted.training.warmup_steps = int(fitted.training.warmup_steps) * total_steps // made_for
    for name, least in (("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1)):
        number = getattr(fitted.method, name)
        if number is not None:
            setattr(fitted.method, name, max(least, number * total_steps // made_for))
    return fitted


# ---- flags before they are parsed ----------------------------------------------------------------------------------


def file_flags(path: Path) -> list[str]:
    """An argument file (YAML or JSON, a mapping of argument names to values) as command-line flags."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: an argument file is a mapping of argument names to values")
    return _mapping_flags(values, str(path))


def _mapping_flags(values: Mapping[str, Any], source: str) -> list[str]:
    """{"lora_r": 8, "do_train": true} → ["--lora_r=8", "--do_train=True"].

    Raises:
        UsageError: for a value that is no plain string, number or boolean; ``source`` names the file.
    """
    flags = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise UsageError(f"{source}: {name} needs a plain value, got a {type(value).__name__}")
        flags += [] if value is None else [f"--{name}={value}"]
    return flags


def translate(argv: Iterable[str]) -> list[str]:
    """Published and older flags in today's spelling."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        bare = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--"):
            out.append(word)
        elif bare == "local_rank":  # torch.distributed.launch passes it; the environment says the same
            if not equals:
                next(words, None)
        elif bare == "warmup_ratio":
            out.append(f"--warmup_steps={_ratio(value if equals else next(words, ''))}")
        else:
            out.append(f"--{_RENAMED.get(bare, bare)}{equals}{value}")
    return out


def _ratio(text: str) -> str:
    try:
        if float(text) in SHARE:
            return text
    except ValueError:
        pass
    raise UsageError(f"--warmup_ratio must lie in [0, 1), got {text!r}; for a number of steps use --warmup_steps")


def _chosen(words: list[str]) -> Any:
    """What the command line says of the flags that choose files, the others unread."""
    flags = [*CHOICE_FLAGS, *(flag for flag in DATA_FLAGS if flag.name == "task_name")]
    return make_parser(flags, add_help=False).parse_known_args(words)[0]


def method_file(words: list[str]) -> tuple[str, str, list[str]]:
    """(config name, base method, default flags) from --method or the published flags that stand for it.

    Raises:
        UsageError: for an unknown method, or published flags that contradict it or each other.
    """
    chosen = _chosen(words)
    name, lora_type = chosen.method, chosen.lora_type
    published = lora_type is not None or chosen.apply_lora or chosen.apply_adalora
    if lora_type == "frd" and chosen.apply_adalora:
        raise UsageError("--apply_adalora needs --lora_type svd: plain LoRA has no singular values to allocate")
    plain = lora_type == "frd" or (chosen.apply_lora and lora_type is None)
    meant = "lora" if plain and not chosen.apply_adalora else "lora2"
    config = meant if name is None else name
    path = METHOD_FOLDER / f"{config}.yaml"
    if Path(config).name != config or not path.is_file():
        names = ", ".join(sorted(p.stem for p in METHOD_FOLDER.glob("*.yaml")))
        raise UsageError(f"unknown method {config!r}: --method takes one of {names}")
    values = read_yaml(path)
    base = values.pop("method")
    if published and name is not None and (base in _SVD) != (meant == "lora2"):
        raise UsageError(f"--method {name} contradicts --lora_type {lora_type or 'frd'}: give one of the two")
    defaults = _mapping_flags(values, path.name)
    if published and name is None and meant == "lora2" and not chosen.apply_adalora:
        defaults.append("--rank_allocation=False")  # svd layers without --apply_adalora: nothing is pruned
    return config, base, defaults


def published_flags(words: list[str], method: str) -> list[str]:
    """The settings of ``--published``: the task's, without flags that the method does not read, then the method's own.

    Raises:
        UsageError: for a task or a backbone without published settings.
    """
    chosen = _chosen(words)
    if chosen.published is None:
        return []
    if chosen.task_name is None:
        raise UsageError("--published needs --task_name: the settings are a task's")
    path = TASK_FOLDER / f"{get_task(chosen.task_name).name}.yaml"
    settings = read_yaml(path) if path.is_file() else {}
    if chosen.published not in settings:
        raise UsageError(f"--published {chosen.published}: {path} has {', '.join(settings) or 'no settings'}")
    layers = read_yaml(TASK_FOLDER / "every_task.yaml")[chosen.published], settings[chosen.published]
    read = {flag.name for flag in METHODS[method].flags}
    merged: dict[str, Any] = {}
    for layer in layers:
        shared = {n: v for n, v in layer.items() if n in read or not (n in METHOD_FLAGS or n in METHODS)}
        merged |= shared | layer.get(method, {})
    return _mapping_flags(merged, path.name)
