"""The arguments of a training run, each with its default, its range and its ``--help`` text.

The arguments of the methods are in their files (``nlu/methods/``).
``nlu/command_line.py`` decides which source a value comes from.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nlu.errors import reason
from nlu.tasks import METRICS, TASKS
from nlu.trackers import TRACKERS


@dataclass(frozen=True)
class Range:
    """The numbers above ``low`` and below ``high``, ``low`` itself if ``closed``, and ``off``, which means "none".

    NaN and infinity are never in the range.
    """

    low: float
    high: float = math.inf
    closed: bool = True
    off: int | None = None

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high or (self.closed and value == self.low) or value == self.off

    def __str__(self) -> str:
        lower = f"at least {self.low}" if self.closed else f"above {self.low}"
        off = "" if self.off is None else f", or {self.off} for none"
        return f"{lower} and {'finite' if self.high == math.inf else f'below {self.high}'}{off}"


NOT_NEGATIVE, POSITIVE, AT_LEAST_1 = Range(0), Range(0, closed=False), Range(1, 2**31)
SHARE, INSIDE_1 = Range(0, 1), Range(0, 1, closed=False)


def boolean(text: str) -> bool:
    """Parse ``true`` or ``false``, in upper or lower case."""
    if text.lower() not in ("true", "false"):
        raise ValueError("give true or false")
    return text.lower() == "true"


@dataclass(frozen=True)
class Flag:
    """One flag of the command line.

    Attributes:
        name, help: the flag without its dashes, and its ``--help`` text.
        kind: converts the text to the value; a tuple lists the allowed words; a bool flag may be given without a value.
        default: the value if the flag is not given; None if another source then decides.
        range: the allowed numbers; None allows all.
        aliases: other names of the flag, published or older.
        contents: (value) → what a value that names something stands for, so that a change of it makes another run; None
            if it stands for nothing.
    """

    name: str
    kind: Any
    default: Any
    help: str
    range: Range | None = None
    aliases: tuple[str, ...] = ()
    contents: Callable[[Any], Any] = lambda value: None

    def value(self, text: str) -> Any:
        """Convert a text to the flag's value; raises ArgumentTypeError for an invalid one."""
        kind = boolean if self.kind is bool else str if isinstance(self.kind, tuple) else self.kind
        try:
            value = kind(text)
        except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a valid value: {reason(error, 80)}") from None
        if self.range is not None and isinstance(value, (int, float)) and value not in self.range:
            raise argparse.ArgumentTypeError(f"must be {self.range}, got {text}")
        return value

    def add_to(self, parser: Any) -> None:
        """Add the flag to a parser or to an argument group."""
        default = "" if self.default is None or self.default is False else f" Default: {self.default}."
        parser.add_argument(
            *(f"--{name}" for name in (self.name, *self.aliases)),
            type=self.value,
            help=(self.help + default).replace("%", "%%"),
            **({"nargs": "?", "const": True} if self.kind is bool else {}),
            **({"choices": self.kind} if isinstance(self.kind, tuple) else {}),
        )


positive_int = Flag("positive_int", int, None, "", AT_LEAST_1).value  # for other programs' arguments


class Arguments(SimpleNamespace):
    """All arguments of one run: the value of every flag by name.

    Attributes:
        method, method_config: the base method, and the name of its file in configs/methods/.
        world_size: the number of processes, from the launcher.
        values: the value of every flag by name, and ``method_config``, in types that JSON can hold; they never change.
        command: the command of the run.
    """

    def reads(self, split: str) -> bool:
        """Whether the run needs a split of this name: train, validation, test, or one of MNLI's (test_matched, …)."""
        held_out = self.holdout_fraction is not None  # instead of the validation set
        needs = {
            "train": self.do_train or (self.do_eval and held_out),
            "validation": self.do_eval and not held_out,
            "test": self.do_predict,
        }
        return needs[split.partition("_")[0]]


# ---- the table -----------------------------------------------------------------------------------------------------

_SEED = Range(0, 2**32)  # NumPy's global generator accepts no larger seeds
_INTERVALS = ("no", "steps", "epoch")
_SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip

MODEL_FLAGS = (
    Flag("model_name_or_path", str, None, "Hub name or local folder of the pretrained encoder."),
    Flag("model_revision", str, "main", "Branch, tag or commit of the model on the hub."),
    Flag("cls_dropout", float, None, "Dropout probability before the classifier. Default: the model's own.", SHARE),
    Flag("no_fast_attention", bool, False,
         "Use transformers' own attention and compute every token in the last layer, not the faster equivalents."),
)  # fmt: skip
DATA_FLAGS = (
    Flag("task_name", tuple(name for name, task in TASKS.items() if task.train_splits), None, "Name of the GLUE task."),
    Flag("glue_dir", str, None, "Folder with GLUE data: <task>/<split>.jsonl|parquet|csv, or the TSV folders of the "
         "official release. Default: the environment variable GLUE_DIR if set, otherwise nyu-mll/glue on the hub."),
    Flag("train_file", str, None, "File with your own training data: CSV, TSV, JSONL or Parquet."),
    Flag("validation_file", str, None, "File with your own validation data."),
    Flag("test_file", str, None, "File with your own data to predict with --do_predict."),
    Flag("text_columns", str, None,
         "Text column or columns of your own files: NAME or NAME,NAME. Default: found by name, if unambiguous."),
    Flag("encoding", str, "utf-8", "Text encoding of your own CSV, TSV and JSON files."),
    Flag("label_column", str, "label", "Label column of your own files."),
    Flag("on_error", ("stop", "skip"), "stop", "What to do with a row of your own files that is malformed or has an "
         "empty text or label: stop, or skip such rows, up to ten or a tenth of those read so far."),
    Flag("metric", tuple(METRICS), None,
         "Main metric for your own data; f1 is that of the second of the two sorted classes. Default: accuracy; "
         "pearson for regression."),
    Flag("class_weights", ("balanced",), None,
         "balanced: the training loss weighs each class by the inverse of its share of the rows."),
    Flag("predict_task", ("ax",), None, "Predict this task's test set too, after training on mnli."),
    Flag("max_seq_length", int, 128, "Maximum input length in tokens; longer inputs are truncated.", AT_LEAST_1),
    Flag("length_bucketing", bool, False,
         "Put examples of similar length into the same batch, which saves padding but changes the batches."),
    Flag("max_train_samples", int, None, "Use only the first N training rows.", AT_LEAST_1),
    Flag("max_eval_samples", int, None, "Use only the first N validation or held-out rows.", AT_LEAST_1),
    Flag("max_predict_samples", int, None, "Use only the first N test rows.", AT_LEAST_1),
    Flag("holdout_fraction", float, None, "Hold out this fraction of the training set, drawn with --holdout_seed, "
         "and evaluate on it instead of the validation set. Use this to choose hyperparameters.",
         INSIDE_1),
    Flag("holdout_seed", int, 0, "Seed that draws the held-out rows.", _SEED),
)  # fmt: skip
# The supported fields of transformers' TrainingArguments, under their own names, and a few additional flags.
TRAINING_FLAGS = (
    Flag("root_output_dir", str, None,
         "Output folder: results.json, adapter/, model/ (checkpoints), log/. Default: a path below output/ that is "
         "made of the model, the data, the method and the seed.", None, ("output_dir",)),
    Flag("overwrite_output_dir", bool, False, "Replace the results of another or a finished run in root_output_dir."),
    Flag("measured_dir", str, None, "Folder of result lines, one per run, for nlu/report.py; the run adds its own."),
    Flag("do_train", bool, False, "Train."),
    Flag("do_eval", bool, False, "Evaluate on the validation set, or on the held-out rows."),
    Flag("do_predict", bool, False, "Predict the test set and, with --do_eval, the validation set."),
    Flag("learning_rate", float, None, "Learning rate. A training needs one: methods differ too much for a default.",
         POSITIVE),
    Flag("head_learning_rate", float, None,
         "Learning rate of the classification head. Default: --learning_rate.", POSITIVE),
    Flag("lr_scheduler_type", _SCHEDULES, "linear", "Learning-rate schedule after the warm-up (constant: no warm-up)."),
    Flag("warmup_steps", float, 0.0, "Warm-up steps; a value below 1 is a fraction of all steps.", NOT_NEGATIVE,
         ("warmup_ratio",)),
    Flag("schedule_steps", int, None, "Number of training steps that --warmup_steps, --init_warmup, --final_warmup and "
         "--mask_interval were chosen for. In a shorter training they shrink in proportion. Default: they are used "
         "unchanged.", AT_LEAST_1),
    Flag("num_train_epochs", float, 3.0, "Number of training epochs.", POSITIVE),
    Flag("max_steps", int, -1, "Number of optimiser steps; overrides --num_train_epochs.", Range(1, 2**31, off=-1)),
    Flag("total_batch_size", int, None, "Rows per optimiser step, over all processes. Each process takes its share at "
         "once, or accumulates gradients over batches of at most --per_device_train_batch_size rows.", AT_LEAST_1),
    Flag("per_device_train_batch_size", int, 8, "Training batch size of each process.", AT_LEAST_1),
    Flag("gradient_accumulation_steps", int, 1, "Batches per process in one optimiser step.", AT_LEAST_1),
    Flag("optim", str, "adamw_torch_fused", "Optimiser, under its transformers name."),
    Flag("weight_decay", float, 0.0, "Weight decay.", NOT_NEGATIVE),
    Flag("adam_epsilon", float, 1e-8, "Adam's epsilon.", NOT_NEGATIVE),
    Flag("max_grad_norm", float, 1.0, "Gradients are clipped to this norm; 0 turns clipping off.", NOT_NEGATIVE),
    Flag("bf16", bool, False, "Compute in bfloat16. Trainable parameters, head and logits stay in float32 "
         "(full, bitfit and the methods of peft compute the logits in bfloat16 too)."),
    Flag("fp16", bool, False, "Compute in float16, on a GPU."),
    Flag("gradient_checkpointing", bool, False, "Recompute activations in the backward pass to save memory."),
    Flag("torch_compile", bool, False, "Compile the model with torch.compile."),
    Flag("eval_strategy", _INTERVALS, "no", "When to evaluate during training; --eval_steps alone means steps.",
         None, ("evaluation_strategy",)),
    Flag("eval_steps", int, None, "Steps between two evaluations. Default: --logging_steps.", AT_LEAST_1),
    Flag("per_device_eval_batch_size", int, 64, "Evaluation batch size of each process.", AT_LEAST_1),
    Flag("early_stopping_patience", int, None,
         "Stop after this many evaluations without a better main metric.", AT_LEAST_1),
    Flag("save_strategy", _INTERVALS, "steps", "When to write a checkpoint."),
    Flag("save_steps", int, 500, "Steps between two checkpoints.", AT_LEAST_1),
    Flag("save_total_limit", int, 2, "Number of checkpoints to keep; the best one is kept too.", AT_LEAST_1),
    Flag("load_best_model_at_end", bool, False,
         "Use the weights of the best evaluation instead of the last ones. Every evaluation then saves a checkpoint."),
    Flag("logging_strategy", _INTERVALS, "steps", "When to log the loss."),
    Flag("logging_steps", int, 10, "Steps between two log lines.", AT_LEAST_1),
    Flag("seed", int, 42, "Seed of all random numbers but those of --holdout_seed.", _SEED),
    Flag("full_determinism", bool, False, "Use deterministic GPU kernels, which are slower."),
    Flag("use_cpu", bool, False, "Use the CPU even if there is an accelerator."),
    Flag("report_to", ("none", *TRACKERS), "none", "Tracker; its package must be installed."),
    Flag("run_name", str, None, "The run's name in the tracker."),
)  # fmt: skip
CHOICE_FLAGS = (
    Flag("method", str, None, "A file in configs/methods/, without .yaml: lora2, adalora, lora, … Default: lora2."),
    Flag("published", str, None, "Use the settings published for the task on this backbone (deberta-v3-base or "
         "roberta-large) in configs/tasks/TASK.yaml. The method's file and the flags override them."),
    Flag("apply_lora", bool, False, "Flag of the published code; alone it means --method lora."),
    Flag("apply_adalora", bool, False, "Flag of the published code: --method lora2 with pruning."),
    Flag("lora_type", ("svd", "frd"), None, "Flag of the published code: frd is --method lora; "
         "svd is --method lora2, which prunes only with --apply_adalora."),
)  # fmt: skip
