"""Command line of ``nlu/run_glue.py``: published flags, methods, argument files, and what contradicts what."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from nlu.errors import UsageError, reason
from nlu.flags import file_flags, method_file, translate
from nlu.methods.registry import FLAGS, MethodArguments, check_arguments, flag_methods
from nlu.ranges import check_ranges
from nlu.tasks import TASKS, get_task

logger = logging.getLogger("nlu")

# Flags of the Trainer that a run would ignore or that would break it, each with what to do.
REFUSED_FLAGS = {
    "label_names": "the label's name is fixed",
    "push_to_hub": "a run uploads nothing",
    "resume_from_checkpoint": "the same command goes on from the run's last checkpoint by itself",
    "metric_for_best_model": "the best checkpoint is the one where the task's main metric is highest",
    "greater_is_better": "the best checkpoint is the one where the task's main metric is highest",
    "train_sampling_strategy": "the order is random; --length_bucketing batches similar lengths together",
    "auto_find_batch_size": "it would change the effective batch; set --per_device_train_batch_size",
    "average_tokens_across_devices": "the loss is always the mean over the rows of all processes",
    "prediction_loss_only": "every evaluation computes the task's metrics",
    "batch_eval_metrics": "the metrics are computed over the whole set",
    "eval_do_concat_batches": "the metrics are computed over the whole set",
}

EPILOG = """examples:
  LoRA² on local CoLA:    python nlu/run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name cola \\
                          --glue_dir data/glue --method lora2 --do_train --do_eval --root_output_dir output/cola
  the same from a file:   python nlu/run_glue.py arguments.yaml --learning_rate 1e-3
  your own data:          … --train_file train.csv --validation_file dev.csv (columns sentence[1,2] or text, and label)
An interrupted run goes on from its last checkpoint when the same command is given again."""


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub name or local folder of the pretrained encoder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the hub's downloads are kept."})
    cls_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the classifier, in [0, 1). Default: the model's own."}
    )
    lora_path: str | None = field(
        default=None, metadata={"help": "Start from the factors of this saved adapter folder (the head starts anew)."}
    )
    no_fast_attention: bool = field(
        default=False,
        metadata={
            "help": "Use transformers' own attention, not the exact faster one (DeBERTa; on a CPU BERT, RoBERTa …)."
        },
    )
    no_fast_dropout: bool = field(
        default=False, metadata={"help": "On a CPU, use torch's own dropout instead of the faster one (other draws)."}
    )


@dataclass
class DataArguments:
    task_name: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}."})
    glue_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of GLUE data: <task>/<split>.jsonl|parquet|csv or the official release's TSV "
                  "folders. Default: the environment variable GLUE_DIR, else the hub's nyu-mll/glue."},
    )  # fmt: skip
    train_file: str | None = field(default=None, metadata={"help": "Your own training data: CSV, TSV, JSONL, Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Your own validation data."})
    test_file: str | None = field(default=None, metadata={"help": "Your own data to predict with --do_predict."})
    predict_task: str | None = field(
        default=None, metadata={"help": "With --do_predict: predict this task's test set too; ax with mnli."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every batch to max_seq_length, not to its longest row."}
    )
    length_bucketing: bool = field(
        default=False, metadata={"help": "Batch examples of similar length together: less padding, other batches."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N test rows."})
    holdout_fraction: float | None = field(
        default=None,
        metadata={"help": "Evaluate on this share of the training set, drawn by --holdout_seed and kept out of "
                  "training, instead of on the validation set: for choosing hyperparameters."},
    )  # fmt: skip
    holdout_seed: int = field(default=0, metadata={"help": "Seed of that draw."})


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments; output_dir is set from root_output_dir."""

    root_output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run: results.json, adapter/, model/ (checkpoints), log/."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what another or a finished run left in root_output_dir."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classification head. Default: --learning_rate."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows a process evaluates at once."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is not finite ends the run in place of being left out."}
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


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.splitlines()[0]} (--help lists the arguments)")


def build_parser() -> HfArgumentParser:
    """The parser behind the command line; also what tests check scripts and configs against."""
    return _Parser(
        (ModelArguments, DataArguments, MethodArguments, RunArguments),
        prog="run_glue.py",
        description="Fine-tune an encoder on a GLUE task, or your own, with LoRA² or another method.",
        usage="run_glue.py [arguments.yaml] --model_name_or_path MODEL --task_name TASK [--flag value …]",
        epilog=EPILOG,
        allow_abbrev=False,
    )


def parse_arguments(argv: list[str]) -> Arguments:
    """Arguments from the command line, checked as far as that needs neither data nor model.

    Later ones win: defaults, the method's file, an argument file (first argument), the command line.

    Raises:
        UsageError: for anything unknown, malformed or contradictory; one line that says what to change.
    """
    explicit = list(argv)
    if explicit and not explicit[0].startswith("-"):
        explicit[:1] = file_flags(Path(explicit[0]))
    explicit = translate(explicit)
    parser = build_parser()
    if {"-h", "--help"} & set(explicit):
        parser.parse_args(["--help"])
    given = _given_names(parser, explicit)
    config, base, method_flags = method_file(explicit)
    # The Trainer refuses bfloat16 on a machine without an accelerator unless it is told to use the CPU.
    device = [] if torch.accelerator.is_available() else ["--use_cpu=True"]
    try:
        model, data, method, training = parser.parse_args_into_dataclasses(
            [*device, *method_flags, *explicit], look_for_args_file=False
        )
    except UsageError:
        raise
    except Exception as error:  # transformers' own checks raise whatever they run into
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(kind + reason(error, 400)) from None
    method.method = base
    for name in sorted(given & set(REFUSED_FLAGS)):
        raise UsageError(f"--{name} is not supported here ({REFUSED_FLAGS[name]}): leave it out")
    _refuse_ignored_flags(given, base)
    _refuse_replaced_flags(given, _given_names(parser, method_flags), config, base)
    _one_device(training)
    _check(model, data, method, training, given)
    return Arguments(model, data, method, training, config)


def _given_names(parser: HfArgumentParser, flags: list[str]) -> set[str]:
    known = {option: action.dest for action in parser._actions for option in action.option_strings}
    return {known[f.partition("=")[0]] for f in flags if f.partition("=")[0] in known}


def _refuse_ignored_flags(given: set[str], method: str) -> None:
    for name in sorted(given):
        readers = flag_methods(name)
        if readers and method not in readers:
            raise UsageError(
                f"--{name} has no meaning with --method {method} (only with {', '.join(readers)}): leave it out"
            )


def _refuse_replaced_flags(given: set[str], from_file: set[str], config: str, method: str) -> None:
    for name in sorted(given & from_file & FLAGS.keys()):
        if FLAGS[name].fixed:
            raise UsageError(f"--method {config} has a {name} of its own: give --method {method} with --{name}")


def _one_device(training: RunArguments) -> None:
    """A process trains on one device: DataParallel over all that it sees would multiply the batch unasked."""
    if training.n_gpu > 1:
        logger.warning("%d devices are visible, one is used: start with torchrun for more", training.n_gpu)
        training._n_gpu = 1


def _check(model: ModelArguments, data: DataArguments, method: Any, training: RunArguments, given: set[str]) -> None:
    """Contradictions that need neither data nor model."""
    if training.root_output_dir is None:
        raise UsageError("--root_output_dir is missing: name the folder that the run writes to")
    if data.task_name is None and data.train_file is None and data.test_file is None:
        raise UsageError("nothing to train on: give --task_name, or --train_file and --validation_file")
    if data.task_name is not None:
        task = get_task(data.task_name)
        data.task_name = task.name
        if not task.train_splits and (training.do_train or training.do_eval):
            raise UsageError(f"{task.name} has a test set only: give --task_name mnli --predict_task {task.name}")
        if data.train_file or data.validation_file or data.test_file:
            raise UsageError("--task_name and --train_file/--validation_file/--test_file exclude each other")
    elif training.do_eval and data.validation_file is None and data.holdout_fraction is None:
        raise UsageError("nothing to evaluate on: give --validation_file or --holdout_fraction, or leave --do_eval out")
    elif training.do_predict and data.test_file is None:
        raise UsageError("nothing to predict: give --test_file, or leave --do_predict out")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    absent = sorted({*training.report_to} - {*get_available_reporting_integrations()})
    if absent:
        raise UsageError(f"--report_to {absent[0]}: unknown, or not installed here: install it, or leave it out")
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        raise UsageError("--dataloader_persistent_workers needs --dataloader_num_workers: give both or neither")
    if training.fsdp and training.world_size < 2:
        raise UsageError("--fsdp splits a model over several processes: start it with torchrun or accelerate launch")
    check_ranges(vars(model) | vars(data) | vars(method) | vars(training))
    if training.max_steps == 0 or (training.max_steps < 0 and not 0 < training.num_train_epochs < float("inf")):
        raise UsageError("there is no step to train: --max_steps or --num_train_epochs must be positive and finite")
    if data.holdout_fraction is not None and not 0 < data.holdout_fraction < 1:
        raise UsageError(f"--holdout_fraction must lie between 0 and 1, got {data.holdout_fraction}")
    check_arguments(method, given)


def command_line() -> str:
    """The command as given, for the record."""
    return " ".join(["python", *sys.argv])
