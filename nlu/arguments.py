"""Command line of ``nlu/run_glue.py``: its arguments, the published and older spellings, and the method's file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from nlu import METHOD_FOLDER
from nlu.argument_checks import REFUSED_FLAGS, check_given, check_values, one_device, share_batch
from nlu.errors import OneLineParser, UsageError, reason, refuse_unknown_flags
from nlu.json_yaml import parse_yaml
from nlu.methods.registry import MethodArguments, MethodChoice
from nlu.tasks import METRICS, TASKS

_SVD = ("adalora", "lora2")  # what the published --lora_type svd can mean
_RENAMED = {"evaluation_strategy": "eval_strategy", "output_dir": "root_output_dir"}
_WINS = "--method_file_wins"

HELP = """\
usage: run_glue.py [FILE.yaml] --model_name_or_path MODEL {{--task_name T | --train_file F}} --root_output_dir DIR …

Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method. The same command
continues an interrupted run from its last checkpoint. --help_all lists every argument.

model and data
  --model_name_or_path MODEL   hub name or local folder of the pretrained encoder
  --task_name TASK             {tasks}
  --glue_dir DIR               <task>/<split>.jsonl|parquet|csv, or the official TSV folders; default: the hub's
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


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(help="Hub name or local folder of the pretrained encoder.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit on the hub.")
    cache_dir: str | None = HfArg(default=None, help="Where the hub's downloads are kept.")
    cls_dropout: float | None = HfArg(
        default=None, help="Dropout before the classifier, in [0, 1). Default: the model's own."
    )
    lora_path: str | None = HfArg(
        default=None, help="Start from the factors of this saved adapter folder (the head is new)."
    )
    no_fast_attention: bool = HfArg(
        default=False,
        help="Use transformers' own attention, and compute all tokens in the last layer, not the exact faster ways.",
    )
    no_fast_dropout: bool = HfArg(
        default=False, help="On a CPU, use torch's own dropout instead of the faster one (other draws)."
    )


@dataclass
class DataArguments:
    task_name: str | None = HfArg(default=None, help=f"One of {', '.join(TASKS)}.")
    glue_dir: str | None = HfArg(
        default=None,
        help="Folder of GLUE data: <task>/<split>.jsonl|parquet|csv or the official release's TSV "
        "folders. Default: the environment variable GLUE_DIR, else the hub's nyu-mll/glue.",
    )
    train_file: str | None = HfArg(default=None, help="Your own training data: CSV, TSV, JSONL, Parquet.")
    validation_file: str | None = HfArg(default=None, help="Your own validation data.")
    test_file: str | None = HfArg(default=None, help="Your own data to predict with --do_predict.")
    text_columns: str | None = HfArg(
        default=None, help="Columns of your own files with the text, NAME or NAME,NAME. Default: the unambiguous ones."
    )
    label_column: str = HfArg(default="label", help="Column of your own files with the label.")
    on_error: Literal["stop", "skip"] = HfArg(
        default="stop", help="A malformed row, or one with an empty text, in your own files: stop, or skip it."
    )
    encoding: str = HfArg(default="utf-8", help="Encoding of your own CSV, TSV and JSON files.")
    save_splits: str | None = HfArg(
        default=None,
        help="Folder for train.csv and validation.csv, the rows that --holdout_fraction parts.",
    )
    metric: Literal[tuple(METRICS)] | None = HfArg(
        default=None, help="Main metric for your own data. Default: by the labels."
    )
    class_weights: Literal["balanced"] | None = HfArg(
        default=None, help="balanced: the training loss weighs each class by the inverse of its share of the rows."
    )
    predict_task: str | None = HfArg(
        default=None, help="With --do_predict: predict this task's test set too; ax with mnli."
    )
    max_seq_length: int = HfArg(default=128, help="Longest input in tokens; longer ones are cut.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad every batch to max_seq_length, not to its longest row.")
    length_bucketing: bool = HfArg(
        default=False, help="Batch examples of similar length together: less padding, other batches."
    )
    max_train_samples: int | None = HfArg(default=None, help="Use only the first N training rows.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only the first N validation rows.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only the first N test rows.")
    holdout_fraction: float | None = HfArg(
        default=None,
        help="Evaluate on this share of the training set, drawn by --holdout_seed and kept out of "
        "training, instead of on the validation set: for choosing hyperparameters.",
    )
    holdout_seed: int = HfArg(default=0, help="Seed of that draw.")


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments; output_dir is set from root_output_dir."""

    root_output_dir: str | None = HfArg(
        default=None, help="Folder of the run: results.json, adapter/, model/ (checkpoints), log/."
    )
    output_dir: str | None = HfArg(default=None, help="Another name of --root_output_dir.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Replace what another or a finished run left in root_output_dir."
    )
    logging_steps: float = HfArg(default=10, help="Steps between two log lines with the loss.")
    head_learning_rate: float | None = HfArg(
        default=None, help="Learning rate of the classification head. Default: --learning_rate."
    )
    total_batch_size: int | None = HfArg(
        default=None,
        help="Rows per step, over all processes. The rows a process takes at once follow from it, or, where "
        "--per_device_train_batch_size is lower, the steps it accumulates.",
    )
    schedule_steps: int | None = HfArg(
        default=None,
        help="Steps of the training for which --warmup_steps, --init_warmup, --final_warmup and "
        "--mask_interval were chosen: they shrink in proportion in a shorter training. Default: they are "
        "used unchanged.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after this many evaluations without a better main metric."
    )
    early_stopping_threshold: float | None = HfArg(
        default=None, help="Improvement of the main metric that counts as one. Default: any."
    )
    push_to_hub: bool = HfArg(default=False, help="Upload the adapter with its card to --hub_model_id at the end.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Rows a process evaluates at once.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints that are kept.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Off: a loss that is not finite ends the run instead of being left out."
    )


@dataclass
class Arguments:
    """All arguments of one run; ``record`` has every one by name, as JSON can hold it, secrets left out."""

    model: ModelArguments
    data: DataArguments
    method: Any
    training: RunArguments
    method_config: str
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Taken now: the Trainer's arguments are completed later by what follows from the task and the folder.
        for part in (self.model, self.data, self.method):
            self.record |= vars(part)
        self.record |= {k: v for k, v in self.training.to_dict().items() if "token" not in k}
        self.record["method_config"] = self.method_config


class _Parser(OneLineParser, HfArgumentParser):
    """transformers' parser, with one line for an error."""


def build_parser() -> HfArgumentParser:
    """The parser behind the command line; also what tests check scripts and configs against."""
    return _Parser(
        (ModelArguments, DataArguments, MethodArguments, RunArguments),
        prog="run_glue.py",
        usage="run_glue.py [FILE.yaml] --model_name_or_path MODEL {--task_name T | --train_file F} "
        "--root_output_dir DIR …",
        add_help=False,
        allow_abbrev=False,
    )


def parse_arguments(argv: list[str]) -> Arguments:
    """Arguments from the command line, checked as far as that needs neither data nor model.

    Later ones win: defaults, the method's file, an argument file (first argument), the command line. What stands
    before ``--method_file_wins`` gives way to the method's file too.

    Raises:
        UsageError: for anything unknown, malformed or contradictory; one line that says what to change.
    """
    explicit = list(argv)
    if explicit and not explicit[0].startswith("-"):
        explicit[:1] = file_flags(Path(explicit[0]))
    explicit = translate(explicit)
    parser = build_parser()
    _explain(parser, set(explicit))
    named = _names(parser, explicit)
    config, base, method_flags = method_file(explicit)
    settings, explicit = _split(explicit)
    given = _names(parser, explicit)
    check_given(named, given & _names(parser, method_flags), config, base)
    # The Trainer refuses bfloat16 on a machine without an accelerator unless it is told to use the CPU.
    device = [] if torch.accelerator.is_available() else ["--use_cpu=True"]
    try:
        model, data, method, training = parser.parse_args_into_dataclasses(
            [*device, *settings, *method_flags, *explicit], look_for_args_file=False
        )
    except UsageError:
        raise
    except Exception as error:  # transformers' own checks raise whatever they run into
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(kind + reason(error, 400)) from None
    method.method = base
    one_device(training)
    check_values(model, data, method, training, given)
    share_batch(training, named | _names(parser, method_flags))
    return Arguments(model, data, method, training, config)


def _explain(parser: HfArgumentParser, flags: set[str]) -> None:
    """For ``--help`` print the usual arguments by purpose, for ``--help_all`` every one that is not refused; exit."""
    if flags & {"-h", "--help"}:
        print(HELP.format(tasks=", ".join(TASKS)), end="")
    elif "--help_all" in flags:
        for action in parser._actions:
            if action.dest in REFUSED_FLAGS:
                action.help = argparse.SUPPRESS
        parser.print_help()
    else:
        return
    sys.exit(0)


def _names(parser: HfArgumentParser, flags: list[str]) -> set[str]:
    """The arguments that flags set; UsageError for a flag that there is not."""
    known = parser._option_string_actions
    refuse_unknown_flags(flags, known)
    return {known[flag.partition("=")[0]].dest for flag in flags if flag.startswith("--")}


def command_line() -> str:
    """The command as given, for the record."""
    return " ".join(["python", *sys.argv])


# ---- flags before they are parsed ----------------------------------------------------------------------------------


def file_flags(path: Path) -> list[str]:
    """An argument file (a mapping of argument names to values) as command-line flags."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bytes that are no UTF-8, no JSON, no YAML
        raise UsageError(f"cannot read the argument file {path}: {reason(error, 300)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: an argument file is a mapping of argument names to values")
    return _mapping_flags(values, str(path))


def _mapping_flags(values: dict[str, Any], source: str) -> list[str]:
    """{"lora_r": 8, "do_train": true} → ["--lora_r", "8", "--do_train", "True"].

    Raises:
        UsageError: for a value that is no plain string, number or boolean; ``source`` names the file.
    """
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool)):
            # Its kind, not its content: a few lines of YAML can stand for gigabytes.
            raise UsageError(f"{source}: {str(name)[:80]!r} needs a plain value, got a {type(value).__name__}")
        flags.append(f"--{name}={value}")
    return flags


def translate(argv: list[str]) -> list[str]:
    """Published and older flags in today's spelling."""
    out: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        bare = name.removeprefix("--").replace("-", "_")
        if value == "--":  # argparse would make an empty list of it
            raise UsageError(f"{name} needs a value, got --")
        if not name.startswith("--"):
            out.append(token)
        elif bare == "local_rank":  # torch.distributed.launch passes it; the environment says the same
            if not equals:
                next(tokens, None)
        elif bare == "warmup_ratio":
            ratio = value if equals else next(tokens, "")
            out += ["--warmup_steps", _ratio(ratio)]
        elif bare in _RENAMED:
            out.append(f"--{_RENAMED[bare]}{equals}{value}")
        else:
            out.append(f"--{bare}{equals}{value}")
    return out


def _split(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags that give way to the method's file, and the others."""
    places = [i for i, flag in enumerate(flags) if flag.partition("=")[0] == _WINS]
    if not places:
        return [], flags
    rest = flags[places[0] :]
    if rest[0] != _WINS or len(places) > 1 or not all(flag.startswith("-") for flag in rest[1:2]):
        raise UsageError(f"give {_WINS} once, between two flags and without a value")
    return flags[: places[0]], rest


def _ratio(text: str) -> str:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--warmup_ratio must lie in [0, 1), got {text!r}; for a number of steps use --warmup_steps")
    return text


def method_file(flags: list[str]) -> tuple[str, str, list[str]]:
    """(config name, base method, default flags) from --method or the published flags that stand for it.

    Raises:
        UsageError: for an unknown method, or published flags that contradict it or each other.
    """
    chosen = _Parser(MethodChoice, add_help=False).parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )[0]
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
    values = parse_yaml(path.read_text(encoding="utf-8"))
    base = values.pop("method")
    if published and name is not None and (base in _SVD) != (meant == "lora2"):
        raise UsageError(f"--method {name} contradicts --lora_type {lora_type or 'frd'}: give one of the two")
    defaults = _mapping_flags(values, str(path.name))
    if published and name is None and meant == "lora2" and not chosen.apply_adalora:
        defaults.append("--rank_allocation=False")  # svd layers without --apply_adalora: nothing is pruned
    return config, base, defaults
