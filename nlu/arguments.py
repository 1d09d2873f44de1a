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

from loralib.allocator import check_allocator_arguments
from loralib.orthogonality import parse_terms
from nlu.errors import UsageError, reason
from nlu.flags import SVD, file_flags, method_file, translate
from nlu.ranges import check_ranges
from nlu.tasks import get_task

logger = logging.getLogger("nlu")

SIX_MODULES = "query,key,value,attention.output,intermediate,layer.output"
LOW_RANK = frozenset({"lora", "adalora", "lora2", "sora"})
ADAPTERS = frozenset({"hadapter", "padapter"})

# Flags that only some methods read; given with another method they would be silently ignored, so they are refused.
FLAG_METHODS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout"), LOW_RANK),
    "lora_module": LOW_RANK | {"peft"},
    **dict.fromkeys(("lora_k", "lora_widths", "lora_share_outer"), frozenset({"lora2"})),
    **dict.fromkeys(
        ("lora_init", "orth_terms", "orth_squared", "reg_orth_coef", "rank_allocation", "target_rank",
         "target_total_rank", "init_warmup", "final_warmup", "mask_interval", "beta1", "beta2", "importance",
         "value_lr_ratio"),
        SVD,
    ),
    "adapter_size": ADAPTERS,
    "sora_lambda": frozenset({"sora"}),
    "peft_config": frozenset({"peft"}),
}  # fmt: skip

ALLOCATION_FLAGS = frozenset(
    {"target_rank", "target_total_rank", "init_warmup", "final_warmup", "mask_interval", "beta1", "beta2", "importance"}
)

# Flags of the Trainer that a run would ignore or that would break it, each with what to do.
REFUSED_FLAGS = {
    "label_names": "the label's name is fixed",
    "push_to_hub": "a run uploads nothing",
    "resume_from_checkpoint": "the same command goes on from the run's last checkpoint by itself",
    "metric_for_best_model": "the best checkpoint is the one where the task's main metric is highest",
    "greater_is_better": "the best checkpoint is the one where the task's main metric is highest",
    "train_sampling_strategy": "the order is random; --length_bucketing batches similar lengths together",
    "auto_find_batch_size": "it would change the effective batch; set --per_device_train_batch_size",
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
    task_name: str | None = field(
        default=None, metadata={"help": "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli or ax."}
    )
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
class MethodArguments:
    method: str | None = field(
        default=None,
        metadata={"help": "A file of configs/methods/ without .yaml: lora2, adalora, lora, …. Default: lora2."},
    )
    apply_lora: bool = field(default=False, metadata={"help": "Published flag; with --lora_type it means --method."})
    apply_adalora: bool = field(default=False, metadata={"help": "Published flag: with rank allocation."})
    lora_type: str | None = field(
        default=None, metadata={"help": "Published flag: svd is --method lora2, frd is --method lora."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank r: singular values a layer starts with."})
    lora_k: int | None = field(default=None, metadata={"help": "LoRA²: width k of the outer scale (8 by default)."})
    lora_widths: str | None = field(
        default=None, metadata={"help": "LoRA² with any number of scales: widths from the outermost inward, as 8,8."}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    lora_module: str = field(
        default=SIX_MODULES,
        metadata={"help": "Comma-separated modules: the six published names, module-name suffixes, or a regular "
                  "expression."},
    )  # fmt: skip
    lora_init: str = field(default="gaussian", metadata={"help": "gaussian (the paper's) or orthogonal."})
    lora_share_outer: bool = field(
        default=False, metadata={"help": "All layers of one module type share their outer factors."}
    )
    orth_terms: str = field(default="all", metadata={"help": "Regulariser: all, or some of uv, UV, PQ joined by +."})
    orth_squared: bool = field(default=False, metadata={"help": "Squared norms in the regulariser."})
    reg_orth_coef: float = field(default=0.1, metadata={"help": "Weight of the orthogonality regulariser."})
    rank_allocation: bool = field(default=True, metadata={"help": "Prune singular values to the target rank."})
    target_rank: int | None = field(
        default=None, metadata={"help": "Average singular values a layer keeps. Default: half of lora_r."}
    )
    target_total_rank: int | None = field(
        default=None, metadata={"help": "Singular values all layers keep together, in place of --target_rank."}
    )
    init_warmup: int | None = field(
        default=None, metadata={"help": "Steps before pruning starts. Default: a tenth of the training."}
    )
    final_warmup: int | None = field(
        default=None, metadata={"help": "Last steps, with the ranks held. Default: half of the training."}
    )
    mask_interval: int = field(default=10, metadata={"help": "Steps between two allocations."})
    beta1: float = field(default=0.85, metadata={"help": "Moving average of the sensitivity, in (0, 1)."})
    beta2: float = field(default=0.85, metadata={"help": "Moving average of the uncertainty, in (0, 1)."})
    importance: str = field(
        default="inner", metadata={"help": "inner: the paper's importance; full: outer factors scored too."}
    )
    value_lr_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of the singular values, as a multiple of --learning_rate."}
    )
    adapter_size: int = field(default=16, metadata={"help": "Bottleneck of the Houlsby and Pfeiffer adapters."})
    sora_lambda: float = field(
        default=0.375,
        metadata={"help": "SoRA: weight λ of the gates' L1 penalty; each step shrinks them by λ × learning rate."},
    )
    peft_config: str | None = field(
        default=None, metadata={"help": "A config file of the peft package, or the name of one in configs/peft/."}
    )


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments; output_dir is set from root_output_dir."""

    root_output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run: results.json, adapter/, model/ (checkpoints), log/."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what another or a finished run left in root_output_dir."}
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
    method: MethodArguments
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
    _refuse_contradictions(given, config, method)
    _one_device(training)
    _check(model, data, method, training)
    return Arguments(model, data, method, training, config)


def _given_names(parser: HfArgumentParser, flags: list[str]) -> set[str]:
    known = {option: action.dest for action in parser._actions for option in action.option_strings}
    return {known[f.partition("=")[0]] for f in flags if f.partition("=")[0] in known}


def _refuse_ignored_flags(given: set[str], method: str) -> None:
    for name in sorted(given):
        if name in FLAG_METHODS and method not in FLAG_METHODS[name]:
            raise UsageError(
                f"--{name} has no meaning with --method {method} (only with {', '.join(sorted(FLAG_METHODS[name]))}): "
                "leave it out"
            )


def _refuse_contradictions(given: set[str], config: str, method: MethodArguments) -> None:
    """What one given flag makes of another: it would be ignored, though a run would record it."""
    if {"target_rank", "target_total_rank"} <= given:
        raise UsageError("--target_rank and --target_total_rank say the same in two ways: give one of them")
    if "peft_config" in given and config != "peft":
        raise UsageError(f"--method {config} has a peft_config of its own: give --method peft with --peft_config")
    for switch, off, flags in (
        ("rank_allocation", not method.rank_allocation, ALLOCATION_FLAGS),
        ("reg_orth_coef", method.reg_orth_coef == 0, {"orth_terms", "orth_squared"}),
    ):
        ignored = sorted(given & flags)
        if switch in given and off and ignored:
            raise UsageError(f"--{ignored[0]} has no meaning with --{switch} {getattr(method, switch)}: leave it out")


def _one_device(training: RunArguments) -> None:
    """A process trains on one device: DataParallel over all that it sees would multiply the batch unasked."""
    if training.n_gpu > 1:
        logger.warning("%d devices are visible, one is used: start with torchrun for more", training.n_gpu)
        training._n_gpu = 1


def _check(model: ModelArguments, data: DataArguments, method: MethodArguments, training: RunArguments) -> None:
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
    _check_method(method)


def _check_method(method: MethodArguments) -> None:
    if method.method in ADAPTERS and method.adapter_size < 1:
        raise UsageError(f"--adapter_size must be at least 1, got {method.adapter_size}")
    if method.method == "peft" and method.peft_config is None:
        raise UsageError("--method peft needs --peft_config: a file of the peft package, or a name in configs/peft/")
    if not 0 <= method.sora_lambda < float("inf"):
        raise UsageError(f"--sora_lambda must not be negative, got {method.sora_lambda}")
    if method.method not in LOW_RANK:
        return
    if method.lora_widths is not None and method.lora_k is not None:
        raise UsageError("--lora_k and --lora_widths exclude each other: --lora_widths 8 is --lora_k 8")
    widths = parse_widths(method)
    if method.lora_share_outer and not widths:
        raise UsageError("--lora_share_outer needs two or more scales: leave it out, or give --lora_k")
    for name, value in (("lora_r", method.lora_r), *(("lora_k", k) for k in widths or ())):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if not 0 < method.lora_alpha < float("inf"):
        raise UsageError(f"--lora_alpha must be positive, got {method.lora_alpha}")
    if not 0 <= method.lora_dropout < 1:
        raise UsageError(f"--lora_dropout must lie in [0, 1), got {method.lora_dropout}")
    if method.lora_init not in ("gaussian", "orthogonal"):
        raise UsageError(f"--lora_init is gaussian or orthogonal, got {method.lora_init!r}")
    if not 0 <= method.reg_orth_coef < float("inf"):
        raise UsageError(f"--reg_orth_coef must not be negative, got {method.reg_orth_coef}")
    if method.target_rank is None:
        method.target_rank = max(1, method.lora_r // 2)
    try:
        parse_terms(method.orth_terms)
        check_allocator_arguments(
            method.lora_r, method.target_rank, method.init_warmup or 0, method.final_warmup or 0,
            method.mask_interval, method.beta1, method.beta2, method.importance,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_widths(method: MethodArguments) -> tuple[int, ...] | None:
    """LoRA²'s widths from the outermost inward; None for methods that have none.

    Raises:
        UsageError: for widths that are no comma-separated whole numbers.
    """
    if method.method != "lora2":
        return None
    if method.lora_widths is None:
        return (8 if method.lora_k is None else method.lora_k,)
    try:
        return tuple(int(part) for part in method.lora_widths.split(","))
    except ValueError:
        raise UsageError(f"--lora_widths takes whole numbers such as 8,8, got {method.lora_widths!r}") from None


def command_line() -> str:
    """The command as given, for the record."""
    return " ".join(["python", *sys.argv])
