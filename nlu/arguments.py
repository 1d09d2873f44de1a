"""Every argument of a training run, with its default, its range and what ``--help`` says.

Methods that are not low-rank have their flags in their own files (``nlu/methods/``). ``nlu/command_line.py`` says from
which source a value comes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nlu.errors import reason
from nlu.tasks import METRICS, TASKS


@dataclass(frozen=True)
class Range:
    """The numbers from ``low``, itself too where ``closed``, to below ``high``; and ``off``, which means none.

    NaN and infinity are none.
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
    """``true`` or ``false``, in any case."""
    if text.lower() not in ("true", "false"):
        raise ValueError("give true or false")
    return text.lower() == "true"


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    return dict(json.loads(text))


@dataclass(frozen=True)
class Flag:
    """One flag of the command line.

    Attributes:
        name, help: the flag without its dashes, and what ``--help`` says.
        kind: makes the value of a text; a tuple lists the words that the flag takes; bool needs no text.
        default: the value where the flag is not given; None where something else then decides.
        range: of a number.
        aliases: published or older names.
    """

    name: str
    kind: Any
    default: Any
    help: str
    range: Range | None = None
    aliases: tuple[str, ...] = ()

    def value(self, text: str) -> Any:
        """The value that a text stands for; what argparse catches where it stands for none."""
        kind = boolean if self.kind is bool else str if isinstance(self.kind, tuple) else self.kind
        try:
            value = kind(text)
        except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} cannot be its value: {reason(error, 80)}") from None
        if self.range is not None and isinstance(value, (int, float)) and value not in self.range:
            raise argparse.ArgumentTypeError(f"must be {self.range}, got {text}")
        return value

    def add_to(self, parser: Any) -> None:
        """Add the flag to a parser or to a group of one."""
        parser.add_argument(
            *(f"--{name}" for name in (self.name, *self.aliases)),
            type=self.value,
            help=self.help.replace("%", "%%"),
            **({"nargs": "?", "const": True} if self.kind is bool else {}),
            **({"choices": self.kind} if isinstance(self.kind, tuple) else {}),
        )


positive_int = Flag("positive_int", int, None, "", AT_LEAST_1).value  # for other programs' arguments


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


# ---- the table -----------------------------------------------------------------------------------------------------

_SEED = Range(0, 2**32)  # numpy's global generator takes no larger ones
_INTERVALS = ("no", "steps", "epoch")
_SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "warmup_stable_decay",
)  # fmt: skip

MODEL_FLAGS = (
    Flag("model_name_or_path", str, None, "Hub name or local folder of the pretrained encoder."),
    Flag("model_revision", str, "main", "Branch, tag or commit on the hub."),
    Flag("cache_dir", str, None, "Where the hub's downloads are kept."),
    Flag("cls_dropout", float, None, "Dropout before the classifier. Default: the model's own.", SHARE),
    Flag("lora_path", str, None, "Start from the factors of this saved adapter folder (the head is new)."),
    Flag("no_fast_attention", bool, False,
         "Use transformers' own attention, and compute all tokens in the last layer, not the exact faster ways."),
)  # fmt: skip
DATA_FLAGS = (
    Flag("task_name", tuple(TASKS), None, "A task of GLUE."),
    Flag("glue_dir", str, None, "Folder of GLUE data: <task>/<split>.jsonl|parquet|csv or the official release's TSV "
         "folders. Default: the environment variable GLUE_DIR, else the hub's nyu-mll/glue."),
    Flag("train_file", str, None, "Your own training data: CSV, TSV, JSONL, Parquet."),
    Flag("validation_file", str, None, "Your own validation data."),
    Flag("test_file", str, None, "Your own data to predict with --do_predict."),
    Flag("text_columns", str, None,
         "Columns of your own files with the text, NAME or NAME,NAME. Default: the unambiguous ones."),
    Flag("encoding", str, "utf-8", "Encoding of your own CSV, TSV and JSON files."),
    Flag("label_column", str, "label", "Column of your own files with the label."),
    Flag("on_error", ("stop", "skip"), "stop",
         "A malformed row, or one with an empty text, in your own files: stop, or skip up to ten or a tenth."),
    Flag("metric", tuple(METRICS), None, "Main metric for your own data. Default: by the labels."),
    Flag("class_weights", ("balanced",), None,
         "balanced: the training loss weighs each class by the inverse of its share of the rows."),
    Flag("predict_task", tuple(TASKS), None, "With --do_predict: predict this task's test set too; ax with mnli."),
    Flag("max_seq_length", int, 128, "Longest input in tokens; longer ones are cut.", AT_LEAST_1),
    Flag("pad_to_max_length", bool, False, "Pad every batch to max_seq_length, not to its longest row."),
    Flag("length_bucketing", bool, False,
         "Batch examples of similar length together: less padding, other batches."),
    Flag("max_train_samples", int, None, "Use only the first N training rows.", AT_LEAST_1),
    Flag("max_eval_samples", int, None, "Use only the first N validation rows.", AT_LEAST_1),
    Flag("max_predict_samples", int, None, "Use only the first N test rows.", AT_LEAST_1),
    Flag("holdout_fraction", float, None, "Evaluate on this share of the training set, drawn by --holdout_seed and "
         "kept out of training, instead of on the validation set: for choosing hyperparameters.",
         INSIDE_1),
    Flag("holdout_seed", int, 0, "Seed of that draw.", _SEED),
)  # fmt: skip
# Those of transformers' TrainingArguments that a run takes, by their own names, and a few of its own.
TRAINING_FLAGS = (
    Flag("root_output_dir", str, None,
         "Folder of the run: results.json, adapter/, model/ (checkpoints), log/. Default: output/ and a path of the "
         "model, the data, the method and the seed.", None, ("output_dir",)),
    Flag("overwrite_output_dir", bool, False, "Replace what another or a finished run left in root_output_dir."),
    Flag("measured_dir", str, None, "Folder of the runs' lines that nlu/report.py reads: the run adds its own."),
    Flag("do_train", bool, False, "Train."),
    Flag("do_eval", bool, False, "Evaluate on the validation set."),
    Flag("do_predict", bool, False, "Predict the test set."),
    Flag("learning_rate", float, 5e-5, "Learning rate.", POSITIVE),
    Flag("head_learning_rate", float, None,
         "Learning rate of the classification head. Default: --learning_rate.", POSITIVE),
    Flag("lr_scheduler_type", _SCHEDULES, "linear", "How the rate goes on after the warm-up."),
    Flag("lr_scheduler_kwargs", json_object, None, "What the schedule takes besides, as JSON."),
    Flag("warmup_steps", float, 0.0, "Steps of the warm-up, or below 1 its share of all steps.", NOT_NEGATIVE,
         ("warmup_ratio",)),
    Flag("schedule_steps", int, None, "Steps of the training for which --warmup_steps, --init_warmup, --final_warmup "
         "and --mask_interval were chosen: they shrink in proportion in a shorter training. Default: they are used "
         "unchanged.", AT_LEAST_1),
    Flag("num_train_epochs", float, 3.0, "Epochs.", POSITIVE),
    Flag("max_steps", int, -1, "Optimiser steps, in place of --num_train_epochs.", Range(1, 2**31, off=-1)),
    Flag("total_batch_size", int, None, "Rows per step, over all processes. The rows a process takes at once follow "
         "from it, or, where --per_device_train_batch_size is lower, the steps it accumulates.", AT_LEAST_1),
    Flag("per_device_train_batch_size", int, 8, "Rows a process takes at once.", AT_LEAST_1),
    Flag("gradient_accumulation_steps", int, 1, "Batches of a process in one optimiser step.", AT_LEAST_1),
    Flag("optim", str, "adamw_torch_fused", "Optimiser, by transformers' name."),
    Flag("weight_decay", float, 0.0, "Weight decay.", NOT_NEGATIVE),
    Flag("adam_beta1", float, 0.9, "Adam's moving average of the gradient.", SHARE),
    Flag("adam_beta2", float, 0.999, "Adam's moving average of its square.", SHARE),
    Flag("adam_epsilon", float, 1e-8, "Adam's epsilon.", NOT_NEGATIVE),
    Flag("max_grad_norm", float, 1.0, "Largest norm of the gradient; longer ones are cut.", NOT_NEGATIVE),
    Flag("label_smoothing_factor", float, 0.0, "Smoothing of the labels in the training loss.", SHARE),
    Flag("bf16", bool, False, "Compute in bfloat16; what trains, head and logits stay in float32."),
    Flag("fp16", bool, False, "Compute in float16, on a GPU."),
    Flag("gradient_checkpointing", bool, False, "Compute activations again in the backward pass: less memory."),
    Flag("torch_compile", bool, False, "Compile the model."),
    Flag("eval_strategy", _INTERVALS, "no", "When to evaluate while training.", None, ("evaluation_strategy",)),
    Flag("eval_steps", int, None, "Steps between two evaluations. Default: --logging_steps.", AT_LEAST_1),
    Flag("per_device_eval_batch_size", int, 64, "Rows a process evaluates at once.", AT_LEAST_1),
    Flag("early_stopping_patience", int, None,
         "Stop after this many evaluations without a better main metric.", AT_LEAST_1),
    Flag("early_stopping_threshold", float, 0.0, "Improvement of the main metric that counts as one.", NOT_NEGATIVE),
    Flag("save_strategy", (*_INTERVALS, "best"), "steps", "When to write a checkpoint."),
    Flag("save_steps", int, 500, "Steps between two checkpoints.", AT_LEAST_1),
    Flag("save_total_limit", int, 2, "Checkpoints that are kept.", AT_LEAST_1),
    Flag("load_best_model_at_end", bool, False,
         "Keep the weights of the best evaluation, not the last ones; each evaluation then has its checkpoint."),
    Flag("logging_strategy", _INTERVALS, "steps", "When to log the loss."),
    Flag("logging_steps", int, 10, "Steps between two log lines with the loss.", AT_LEAST_1),
    Flag("report_to", ("none", "tensorboard", "wandb", "trackio"), "none", "A tracker, which must be installed."),
    Flag("run_name", str, None, "The run's name in the tracker."),
    Flag("disable_tqdm", bool, False, "No progress bars."),
    Flag("push_to_hub", bool, False, "Upload the adapter with its card to --hub_model_id at the end."),
    Flag("hub_model_id", str, None, "OWNER/NAME on the hub."),
    Flag("hub_private_repo", bool, None, "Whether that repository is private, if it is new."),
    Flag("seed", int, 42, "Seed of all random numbers.", _SEED),
    Flag("data_seed", int, None, "Seed of the order of the rows. Default: --seed.", _SEED),
    Flag("full_determinism", bool, False, "Deterministic kernels on a GPU: slower."),
    Flag("dataloader_num_workers", int, 0, "Processes that make batches.", NOT_NEGATIVE),
    Flag("use_cpu", bool, False, "Use the CPU although there is an accelerator."),
    Flag("ddp_find_unused_parameters", bool, False, "As of torch's DistributedDataParallel."),
)  # fmt: skip
CHOICE_FLAGS = (
    Flag("method", str, None, "A file of configs/methods/ without .yaml: lora2, adalora, lora, …. Default: lora2."),
    Flag("published", str, None, "The settings published for the task on this backbone, a section of "
         "configs/tasks/TASK.yaml: deberta-v3-base or roberta-large. The method's file and the flags win over them."),
    Flag("apply_lora", bool, False, "Published flag; with --lora_type it means --method."),
    Flag("apply_adalora", bool, False, "Published flag: with rank allocation."),
    Flag("lora_type", ("svd", "frd"), None, "Published flag: svd is --method lora2, frd is --method lora."),
)  # fmt: skip

# ---- the low-rank methods -------------------------------------------------------------------------------------------

MATCH = "match:"


def _number_or_match(text: str) -> int | str:
    """``--lora_k``: a whole number, or ``match:`` and the name of a LoRA file in configs/methods/."""
    return text if text.startswith(MATCH) else int(text)


LORA_MODULE = Flag(
    "lora_module", str, "auto", "Comma-separated modules: the six published names, module-name suffixes, or a regular "
    "expression. Default: the six where the encoder has them, else each of its linear layers.",
)  # fmt: skip
LOW_RANK_FLAGS = (
    Flag("lora_r", int, 8, "Rank r: initial singular values per layer.", AT_LEAST_1),
    Flag("lora_alpha", float, 16.0, "The update is scaled by lora_alpha / lora_r.", POSITIVE),
    Flag("lora_dropout", float, 0.0, "Dropout on the input of the update.", SHARE),
    LORA_MODULE,
)
LORA_PLUS_FLAGS = (
    Flag("lora_b_lr_ratio", float, 1.0, "LoRA+: learning rate of B, as a multiple of --learning_rate.", POSITIVE),
)
PRUNING_FLAGS = (
    Flag("target_rank", int, None, "Average number of singular values kept per layer. Default: half of lora_r.",
         AT_LEAST_1),
    Flag("init_warmup", int, None, "Steps before pruning starts. Default: a tenth of the training.",
         NOT_NEGATIVE),
    Flag("final_warmup", int, None, "Last steps, with the ranks held. Default: half of the training.",
         NOT_NEGATIVE),
    Flag("mask_interval", int, 10, "Steps between two allocations.", AT_LEAST_1),
    Flag("beta1", float, 0.85, "Moving average of the sensitivity.", INSIDE_1),
    Flag("beta2", float, 0.85, "Moving average of the uncertainty.", INSIDE_1),
    Flag("importance", ("inner", "full"), "inner",
         "inner: the paper's importance; full: outer factors scored too.", None),
)  # fmt: skip
REGULARISER_FLAGS = (
    Flag("reg_orth_coef", float, 0.1, "Weight of the orthogonality regulariser.", NOT_NEGATIVE),
    Flag("orth_terms", str, "all", "Regulariser: all, or some of uv, UV, PQ joined by +."),
    Flag("orth_squared", bool, False, "Squared norms in the regulariser."),
)
SINGULAR_VALUE_FLAGS = (
    Flag("lora_init", ("gaussian", "orthogonal"), "gaussian", "Initial factors; gaussian is the paper's."),
    Flag("orthogonality", ("penalty", "retraction"), "penalty",
         "penalty: the paper's regulariser; retraction: factors made exactly orthonormal after each step."),
    *REGULARISER_FLAGS,
    Flag("rank_allocation", bool, True, "Whether singular values are pruned to the target rank."),
    *PRUNING_FLAGS,
    Flag("value_lr_ratio", float, 1.0,
         "Learning rate of the singular values, as a multiple of --learning_rate.", POSITIVE),
)  # fmt: skip
SCALE_FLAGS = (
    Flag("lora_k", _number_or_match, 8,
         "LoRA²: width k of the outer scale; match:lora chooses it for LoRA's number of parameters.", AT_LEAST_1),
    Flag("lora_share_outer", bool, False, "All layers of one module type share their outer factors."),
)  # fmt: skip
