"""From a checkpoint to a model with the task's head: configuration, order of the labels, weights, precision."""

from __future__ import annotations

import copy
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from loralib.interop.export import quiet_transformers
from loralib.interop.precision import cast_frozen
from nlu.arguments import Arguments
from nlu.data.splits import check_tokenizer, longest_input
from nlu.errors import UsageError, one_line, reason
from nlu.fast import speed_up
from nlu.fast.sharding import sharding_asked_for
from nlu.methods.method import AppliedMethod, head_modules, head_parameters
from nlu.methods.registry import check_method_fits
from nlu.runs.adapter import check_warm_start
from nlu.tasks import Task

logger = logging.getLogger("nlu")

_NO_NAME = re.compile(r"label_\d+", re.IGNORECASE)  # what transformers calls labels that nobody named
# Before the classifier, by architecture. DeBERTa's configurations need not have theirs.
_DROPOUTS = (
    "cls_dropout", "classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob", "summary_last_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """What becomes of a checkpoint's head.

    Attributes:
        labels: the task's labels in the order in which the head numbers them; None for regression.
        unfit: why the checkpoint's output layer, if it has one, cannot serve the task; None where it can.
    """

    labels: tuple[str, ...] | None
    unfit: str | None = None


def choose_head(saved: Any, task: Task) -> Head:
    """Decide from a checkpoint's configuration what its head can do for the task."""
    names = [str(saved.id2label[number]) for number in sorted(saved.id2label)]
    problem = getattr(saved, "problem_type", None)
    if task.labels is None:
        fits = len(names) == 1 and problem != "multi_label_classification"
        return Head(None, None if fits else f"{_counted(names)}, and {task.name} asks for one number")
    words = {label.lower(): label for label in task.labels}
    found = [name.lower() for name in names]
    if sorted(found) == sorted(words) and problem != "regression":
        return Head(tuple(words[name] for name in found))
    labels = tuple(task.labels)
    if len(names) != len(labels):
        return Head(labels, f"{_counted(names)}, and {task.name} has {len(labels)}")
    if problem == "regression":
        return Head(labels, f"the numbers of a regression, and {task.name} has classes")
    if not all(map(_NO_NAME.fullmatch, names)):
        return Head(labels, f"the labels {', '.join(names)}, and {task.name} has {', '.join(labels)}")
    return Head(labels)


def _counted(names: list[str]) -> str:
    return "1 label" if len(names) == 1 else f"{len(names)} labels"


def load_config(arguments: Arguments, task: Task) -> tuple[Any, Any, Head]:
    """The encoder's configuration, with the task's labels in it, its tokenizer, and what becomes of its head.

    Raises:
        UsageError: for a model that is not there, or cannot be read.
    """
    model = arguments.model
    source = {"revision": model.model_revision, "cache_dir": model.cache_dir, "trust_remote_code": False}
    _refuse_missing_folder(model.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, **source)
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **source)
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise _unreadable(arguments, error) from None
    check_tokenizer(tokenizer, model.model_name_or_path, "--model_name_or_path ")
    head = choose_head(config, task)
    config.problem_type = "regression" if task.is_regression else None
    if head.labels is not None:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {name: number for number, name in enumerate(head.labels)}
    elif config.num_labels != 1:
        config.num_labels = 1
    config.return_dict = True
    if model.cls_dropout is not None:
        known = [name for name in _DROPOUTS if hasattr(config, name)]
        known += ["cls_dropout"] if config.model_type.startswith("deberta") else []
        if not known:
            raise UsageError(f"--cls_dropout: {config.model_type} has no dropout of its own in the head; leave it out")
        for name in known:
            setattr(config, name, model.cls_dropout)
    return config, tokenizer, head


def _refuse_missing_folder(name: str) -> None:
    path = Path(name)
    no_hub_name = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not path.is_dir() and (no_hub_name or path.exists()):
        raise UsageError(f"--model_name_or_path {name}: there is no such folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"--model_name_or_path {name}: the folder holds no model (it has no config.json)")


def _unreadable(arguments: Arguments, error: Exception) -> UsageError:
    name = arguments.model.model_name_or_path
    absent = "" if Path(name).exists() else "there is no such folder, and the hub gave no such model: "
    return UsageError(f"--model_name_or_path {name}: {absent}{reason(error, 300)}")


def check_model_arguments(arguments: Arguments, config: Any, tokenizer: Any, total_steps: int, warm_start: Any) -> None:
    """Module patterns, schedule, precision and warm start, on a model without weights, before anything is loaded.

    The tokenizer learns how many tokens the model reads, where its own files do not say so.

    Raises:
        UsageError: for whatever does not fit.
    """
    if config.model_type == "fnet" and (arguments.training.bf16 or arguments.training.fp16):
        raise UsageError("FNet's Fourier transform has no half precision: leave --bf16 and --fp16 out")
    model = without_weights(arguments, config)
    if arguments.training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"--gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(model) or sys.maxsize)
    with torch.device("meta"):
        if total_steps:
            _check_optimisation(arguments.training, model, total_steps)
        applied = check_method_fits(model, arguments.method, total_steps)
    training = arguments.training
    if applied is not None and sharding_asked_for() and all(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"FSDP splits frozen weights here, and --method {arguments.method.method} trains all: leave FSDP out"
        )
    casts = training.fp16 or (training.bf16 and applied is not None and applied.needs_autocast)
    if config.model_type == "deberta" and casts:
        flag = "--fp16" if training.fp16 else f"--bf16 with --method {arguments.method.method}"
        raise UsageError(
            f"{flag}: DeBERTa's (not V2's) attention masks with a number that half precision cannot hold; leave it out"
        )
    if warm_start is not None:
        check_warm_start(*warm_start, model, arguments)


def without_weights(arguments: Arguments, config: Any) -> nn.Module:
    """The classifier on the meta device; UsageError for a configuration that makes none."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # an architecture without a classifier, or values that contradict each other
        raise _unreadable(arguments, error) from None


def load_model(arguments: Arguments, config: Any, head: Head) -> nn.Module:
    """The pretrained encoder in float32; its output layer is new where the checkpoint's does not fit the task.

    Raises:
        UsageError: for weights that are missing, or have other shapes, anywhere but in the head's output layer.
    """
    model, training = arguments.model, arguments.training
    try:
        with quiet_transformers():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                model.model_name_or_path, config=config, revision=model.model_revision, cache_dir=model.cache_dir,
                dtype=torch.float32, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise _unreadable(arguments, error) from None
    missing = set(info["missing_keys"])
    parts = {id(p) for p in head_parameters(loaded)}
    encoder = {name for name, p in loaded.named_parameters() if id(p) not in parts}
    if encoder & missing:
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path} lacks encoder weights: {min(encoder & missing)}, …"
        )
    is_new = _renew_output_layer(arguments, loaded, config, head, info) or bool(missing)
    if is_new and not training.do_train:
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path} has no trained head for the task, and nothing trains it "
            "first: give --do_train, or predict with a trained adapter (nlu/predict.py)"
        )
    speed_up(loaded, not model.no_fast_attention, not model.no_fast_dropout)
    return loaded


def _renew_output_layer(arguments: Arguments, model: nn.Module, config: Any, head: Head, info: dict[str, Any]) -> bool:
    """Draw the output layer anew where it does not fit; returns whether the checkpoint had one that did not."""
    mismatched = {key[0]: key[1:] for key in info["mismatched_keys"]}
    if head.unfit is None and not mismatched:
        return False
    # The output layer is what depends on the number of labels, whatever the architecture calls it.
    other = copy.deepcopy(config)
    other.num_labels = config.num_labels + 1
    wider = dict(without_weights(arguments, other).named_parameters())
    output = {name: p for name, p in model.named_parameters() if wider[name].shape != p.shape}
    wrong = [n for n, shapes in mismatched.items() if n not in output or not _only_where(*shapes, wider[n].shape)]
    if wrong:
        saved, needed = (tuple(shape) for shape in mismatched[min(wrong)])
        raise UsageError(
            f"--model_name_or_path {arguments.model.model_name_or_path}: {min(wrong)} has the shape {saved} in the "
            f"checkpoint, and its config.json asks for {needed}"
        )
    if set(output) <= set(info["missing_keys"]):
        return False  # the checkpoint has no head at all
    with torch.no_grad():
        for name, parameter in output.items():
            if name not in mismatched:  # those are new already
                deviation = getattr(config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0
                parameter.normal_(std=deviation)
    if arguments.training.should_save:
        logger.warning("a new output layer: the checkpoint's has %s", head.unfit or "another number of labels")
    return True


def _only_where(saved: torch.Size, needed: torch.Size, wider: torch.Size) -> bool:
    """Whether a saved shape differs from the needed one only in dimensions in which the wider head's shape does too."""
    sizes = zip(saved, needed, wider, strict=False)
    return len(saved) == len(needed) and all(one == two or two != other for one, two, other in sizes)


def set_precision(arguments: Arguments, applied: AppliedMethod) -> None:
    """bfloat16 without autocast where only the method's own layers and the head train: no step casts a weight."""
    training = arguments.training
    if training.bf16 and not applied.needs_autocast:
        try:
            cast_frozen(applied.model, torch.bfloat16, head=head_modules(applied.model))
        except ValueError as error:
            raise UsageError(f"--bf16: {error}") from None
        training.bf16, training.mixed_precision = False, "no"


def _check_optimisation(training: TrainingArguments, model: torch.nn.Module, total_steps: int) -> None:
    """Have transformers choose the optimiser and make the schedule, on a parameter that is then thrown away.

    Args:
        model: may lie on the meta device; some optimisers look at its modules.
        total_steps: optimiser steps of the training.

    Raises:
        UsageError: for an optimiser whose package is missing, arguments that they do not take, or a schedule that
            leaves the range from 0 to the learning rate.
    """
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    warmup = training.get_warmup_steps(total_steps)
    try:
        flag = "--optim"
        Trainer.get_optimizer_cls_and_kwargs(training, model)
        flag = "--lr_scheduler_type"
        schedule = get_scheduler(
            training.lr_scheduler_type,
            optimiser,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
        steps = sorted({*range(0, total_steps, max(1, total_steps // 10_000)), total_steps - 1})
        shares = {step: schedule.lr_lambdas[0](step) for step in steps}
        beyond = next((step for step, share in shares.items() if not -1e-6 <= share <= 1 + 1e-6), None)
    except Exception as error:  # a value of the wrong kind raises whatever the schedule runs into
        planned = flag == "--lr_scheduler_type" and training.lr_scheduler_kwargs
        hint = "; change --lr_scheduler_kwargs" if planned else ""
        raise UsageError(f"{flag}: {one_line(error)}{hint}") from None
    if beyond is not None:
        raise UsageError(
            f"--lr_scheduler_type: in step {beyond + 1} the rate would be {shares[beyond]:.3g} times --learning_rate: "
            "change --lr_scheduler_kwargs"
        )
    if warmup < total_steps and not any(shares.values()):
        raise UsageError("--lr_scheduler_type: the rate would be 0 in every step: change --lr_scheduler_kwargs")
