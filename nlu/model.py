"""From a checkpoint to a model with the task's head: configuration, order of the labels, weights, precision."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from loralib.adapter_folder import has_tokenizer
from loralib.interop.export import quiet_transformers
from loralib.interop.precision import cast_frozen
from nlu.arguments import Arguments
from nlu.errors import UsageError, reason
from nlu.fast import speed_up
from nlu.methods.method import head_modules, head_parameters
from nlu.methods.registry import METHODS, check_method_fits
from nlu.runs.processes import is_first
from nlu.tasks import Task

logger = logging.getLogger("nlu")

_NO_NAME = re.compile(r"label_\d+", re.IGNORECASE)  # what transformers calls labels that nobody named
# Before the classifier, by architecture. DeBERTa's configurations need not have theirs.
_DROPOUTS = (
    "cls_dropout", "classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob", "summary_last_dropout",
)  # fmt: skip


def choose_head(saved: Any, task: Task) -> tuple[tuple[str, ...] | None, str | None]:
    """Decide from a checkpoint's configuration what its head can do for the task.

    Returns:
        The task's labels in the order in which the head numbers them, None for regression; and what the head has
        learned in their place, None where it serves. Another number of labels is seen when the weights are loaded.
    """
    names = [str(saved.id2label[number]) for number in sorted(saved.id2label)]
    problem = getattr(saved, "problem_type", None)
    if task.labels is None:
        return None, "labels that exclude no other" if problem == "multi_label_classification" else None
    if problem == "regression":
        return tuple(task.labels), "the numbers of a regression"
    words = {label.lower(): label for label in task.labels}
    if sorted(name.lower() for name in names) == sorted(words):
        return tuple(words[name.lower()] for name in names), None
    return tuple(task.labels), None if all(map(_NO_NAME.fullmatch, names)) else f"the labels {', '.join(names)}"


def load_config(arguments: Arguments, task: Task) -> tuple[Any, Any, str | None]:
    """The encoder's configuration, its tokenizer, and what its head has learned, if that cannot serve the task.

    The configuration has the task's labels, in the order in which the head numbers them.

    Raises:
        UsageError: for a model that is not there, or cannot be read.
    """
    model = arguments.model
    source = {"revision": model.model_revision, "cache_dir": model.cache_dir, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, **source)
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **source)
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise _unreadable(arguments, error) from None
    check_tokenizer(tokenizer, model.model_name_or_path, "--model_name_or_path ")
    labels, unfit = choose_head(config, task)
    config.problem_type = "regression" if task.is_regression else None
    if labels is None:
        config.num_labels = 1
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    config.return_dict = True
    if model.cls_dropout is not None:
        known = [name for name in _DROPOUTS if hasattr(config, name)]
        known += ["cls_dropout"] if config.model_type.startswith("deberta") else []
        if not known:
            raise UsageError(f"--cls_dropout: {config.model_type} has no dropout of its own in the head; leave it out")
        for name in known:
            setattr(config, name, model.cls_dropout)
    return config, tokenizer, unfit


def _unreadable(arguments: Arguments, error: Exception) -> UsageError:
    name = arguments.model.model_name_or_path
    absent = "" if Path(name).exists() else "there is no such folder, and the hub gave no such model: "
    return UsageError(f"--model_name_or_path {name}: {absent}{reason(error, 300)}")


def check_tokenizer(tokenizer: Any, source: str, flag: str = "") -> None:
    """Raises UsageError for a tokenizer that cannot pad, and a folder ``source`` without a tokenizer's files.

    For such a folder transformers makes one of special tokens alone, which reads any text as unknown.
    """
    if os.path.isdir(source) and not has_tokenizer(source):
        raise UsageError(f"{flag}{source} has no tokenizer: save it into that folder (tokenizer.save_pretrained)")
    if tokenizer.pad_token is None:
        raise UsageError(f"{flag}{source}: its tokenizer has no padding token: save a copy with pad_token set")


def longest_input(model: Any) -> int | None:
    """The most tokens that a model with a table of positions reads; None for one without (DeBERTa).

    RoBERTa's table has padding's row and those before it on top, which no token uses, and those of OPT and BART begin
    with an offset.
    """
    for name, table in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions") and hasattr(
            table, "padding_idx"
        ):
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - getattr(table, "offset", first)
    return None


def check_model_arguments(arguments: Arguments, config: Any, tokenizer: Any, total_steps: int) -> None:
    """Module patterns and pruning schedule, on a model without weights, before anything is loaded.

    The tokenizer learns how many tokens the model reads, where its own files do not say so.

    Raises:
        UsageError: for whatever does not fit.
    """
    model = without_weights(arguments, config)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(model) or sys.maxsize)
    with torch.device("meta"):
        check_method_fits(model, arguments.method, total_steps)


def without_weights(arguments: Arguments, config: Any) -> nn.Module:
    """The classifier on the meta device; UsageError for a configuration that makes none."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # an architecture without a classifier, or values that contradict each other
        raise _unreadable(arguments, error) from None


def load_model(arguments: Arguments, config: Any, unfit: str | None) -> nn.Module:
    """The pretrained encoder in float32; its output layer is new where the checkpoint's does not fit the task.

    Args:
        config, unfit: of :func:`load_config`.

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
    missing, mismatched = set(info["missing_keys"]), {key[0]: key[1:] for key in info["mismatched_keys"]}
    output = _output_layer(loaded, config)
    kept = {id(p) for p in head_parameters(loaded)}
    encoder = {name for name, p in loaded.named_parameters() if id(p) not in kept}
    if lacking := sorted(encoder & missing):
        raise UsageError(f"--model_name_or_path {model.model_name_or_path} lacks encoder weights: {lacking[0]}, …")
    if wrong := sorted(set(mismatched) - set(output)):
        saved, needed = map(tuple, mismatched[wrong[0]])
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path}: {wrong[0]} has the shape {saved} in the checkpoint, and "
            f"its config.json asks for {needed}"
        )
    unfit = unfit or ("another number of labels" if mismatched else None)
    if unfit is not None and not set(output) <= missing:
        with torch.no_grad():
            for parameter in (p for name, p in output.items() if name not in mismatched):  # those are new already
                parameter.normal_(std=getattr(config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0)
        if is_first():
            logger.warning("a new output layer: the checkpoint's has %s", unfit)
    if (missing or unfit is not None) and not training.do_train:
        raise UsageError(
            f"--model_name_or_path {model.model_name_or_path} has no trained head for the task, and nothing trains it "
            "first: give --do_train, or predict with a trained adapter (nlu/predict.py)"
        )
    speed_up(loaded, not model.no_fast_attention)
    return loaded


def _output_layer(model: nn.Module, config: Any) -> dict[str, nn.Parameter]:
    """The parameters of the head's last layer, which has a row for each label, by name."""
    head = {id(module) for part in head_modules(model) for module in part.modules()}
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if id(layer) in head and isinstance(layer, nn.Linear) and layer.out_features == config.num_labels
    ]
    name, layer = layers[-1]
    return {f"{name}.{part}": parameter for part, parameter in layer.named_parameters()}


def set_precision(arguments: Arguments, model: nn.Module) -> None:
    """bfloat16 without autocast where only the method's own layers and the head train: no step casts a weight."""
    if arguments.training.bf16 and not METHODS[arguments.method.method].needs_autocast:
        try:
            cast_frozen(model, torch.bfloat16, head=head_modules(model))
        except ValueError as error:
            raise UsageError(f"--bf16: {error}") from None
