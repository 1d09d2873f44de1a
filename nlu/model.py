"""From a checkpoint to a model with the task's head: configuration, weights, order of the classes, precision."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from loralib.adapter_folder import has_tokenizer
from loralib.interop.precision import cast_frozen
from loralib.interop.transformers_models import model_folder, quiet_transformers, why_not_loaded
from nlu.arguments import Arguments
from nlu.errors import UsageError
from nlu.fast import ATTENTION, speed_up
from nlu.methods.method import head_modules, head_parameters
from nlu.methods.registry import METHODS
from nlu.runs.processes import first_computes
from nlu.tasks import Task

logger = logging.getLogger("nlu")

_NO_NAME = re.compile(r"label_\d+", re.IGNORECASE)  # transformers' names for labels without names
# Names of the dropout before the classifier, by architecture. DeBERTa's configurations may lack theirs.
_DROPOUTS = (
    "cls_dropout", "classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob", "summary_last_dropout",
)  # fmt: skip
_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")  # names of tables of positions


class Head(NamedTuple):
    """What a checkpoint's head is for the task: the row of each of the task's classes in its output layer, None if they
    are in order; and what it was trained for instead, None if it fits."""

    rows: list[int] | None = None
    unfit: str | None = None


def head_for(task: Task, saved: Any) -> Head:
    """Compare a checkpoint's configuration with the task.

    A wrong number of labels may be noticed only when the weights are loaded.
    """
    if task.labels is None:
        return Head()
    names = [str(saved.id2label[number]).lower() for number in sorted(saved.id2label)]
    words = [label.lower() for label in task.labels]
    if sorted(names) == sorted(words):
        return Head(rows=None if names == words else [names.index(word) for word in words])
    return Head(unfit=None if all(map(_NO_NAME.fullmatch, names)) else f"the labels {', '.join(names)}")


def load_config(arguments: Arguments, task: Task) -> tuple[Any, Any, Head]:
    """The model's configuration with the task's labels, its tokenizer, and what its head is for the task.

    The configuration has as `_commit_hash` the commit of a model on the hub (None for a folder), from which
    :func:`load_model` then loads the weights.

    Raises:
        UsageError: if the model does not exist or cannot be read.
    """
    name = arguments.model_name_or_path
    source = {"revision": arguments.model_revision}
    try:
        # A branch may move between two loads: all processes load one commit.
        folder = first_computes(lambda: model_folder(name, **source))
        commit = source["revision"] = None if Path(name).is_dir() else folder.name
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **source)
    except Exception as error:  # a damaged file can raise any exception
        raise _unreadable(arguments, error) from None
    config._commit_hash = commit
    check_tokenizer(tokenizer, name, "--model_name_or_path ", **source)
    head = head_for(task, config)
    config.problem_type = "regression" if task.is_regression else None
    if task.labels is None:
        config.num_labels = 1
    else:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: number for number, name in enumerate(task.labels)}
    config.return_dict = True
    if arguments.cls_dropout is not None:
        known = [dropout for dropout in _DROPOUTS if hasattr(config, dropout)]
        known += ["cls_dropout"] if config.model_type.startswith("deberta") else []
        known = [] if config.model_type.startswith("gpt_neo") else known  # only their token classifiers read it
        if not known:
            raise UsageError(f"--cls_dropout: {config.model_type} has no dropout of its own in the head; leave it out")
        for dropout in known:
            setattr(config, dropout, arguments.cls_dropout)
    return config, tokenizer, head


def _unreadable(arguments: Arguments, error: Exception) -> UsageError:
    name = arguments.model_name_or_path
    return UsageError(f"--model_name_or_path {name}: {why_not_loaded(name, error)}")


def check_tokenizer(tokenizer: Any, source: str, flag: str = "", **options: Any) -> None:
    """Raises UsageError if the tokenizer cannot pad, or ``source`` has no files of a tokenizer.

    For such a source transformers makes a tokenizer of special tokens alone, to which every text is unknown.

    Args:
        options: with which the tokenizer was loaded.
    """
    if not has_tokenizer(model_folder(source, **options)):
        raise UsageError(f"{flag}{source} has no tokenizer: save it beside the model (tokenizer.save_pretrained)")
    if tokenizer.pad_token is None:
        raise UsageError(f"{flag}{source}: its tokenizer has no padding token: save a copy with pad_token set")


def longest_input(model: Any) -> int | None:
    """The maximum number of tokens of a model with a table of positions; None for a model without one (DeBERTa).

    No token uses the rows of RoBERTa's table up to the padding index, or rows beyond the configured maximum (OPT, BART,
    Nyströmformer).
    """
    for name, table in model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(table, nn.Embedding):
            rows = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            return min(rows, getattr(getattr(model, "config", None), "max_position_embeddings", rows))
    return None


def limit_length(tokenizer: Any, asked: int, model: nn.Module) -> None:
    """Make rows be cut at the length asked for, or at the limit of the tokenizer or of the model if that is lower."""
    limits = (asked, tokenizer.model_max_length, longest_input(model))
    tokenizer.model_max_length = min(limit for limit in limits if limit)


def without_weights(arguments: Arguments, config: Any) -> nn.Module:
    """The classifier on the meta device; raises UsageError if the configuration cannot make one."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # an architecture without a classifier, or values that contradict each other
        raise _unreadable(arguments, error) from None


def load_model(arguments: Arguments, config: Any, head: Head) -> nn.Module:
    """Load the classifier in float32, with its output layer's rows in the task's order, or a new one if it is unfit.

    Args:
        config, head: from :func:`load_config`.

    Raises:
        UsageError: if encoder weights are missing, shapes outside the output layer differ, or a new head is untrained.
    """
    name = arguments.model_name_or_path
    try:
        with quiet_transformers():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, revision=config._commit_hash, dtype=torch.float32,
                output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # a damaged file can raise any exception
        raise _unreadable(arguments, error) from None
    missing, mismatched = set(info["missing_keys"]), {key[0]: key[1:] for key in info["mismatched_keys"]}
    output = _output_layer(loaded, config)
    kept = {id(p) for p in head_parameters(loaded)}
    encoder = {key for key, p in loaded.named_parameters() if id(p) not in kept}
    if lacking := sorted(encoder & missing):
        raise UsageError(f"--model_name_or_path {name} lacks encoder weights: {lacking[0]}, …")
    if wrong := sorted(set(mismatched) - set(output)):
        saved, needed = map(tuple, mismatched[wrong[0]])
        raise UsageError(
            f"--model_name_or_path {name}: {wrong[0]} has the shape {saved} in the checkpoint, and its config.json "
            f"asks for {needed}"
        )
    unfit = head.unfit or ("another number of labels" if mismatched else None)
    if unfit is not None and not set(output) <= missing:
        with torch.no_grad():
            for parameter in (p for key, p in output.items() if key not in mismatched):  # those are new already
                parameter.normal_(std=getattr(config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0)
        logger.warning("a new output layer is made, because the checkpoint's has %s", unfit)
    elif head.rows is not None:
        with torch.no_grad():
            for parameter in output.values():
                parameter.copy_(parameter[head.rows])
    if (missing or unfit is not None) and not arguments.do_train:
        raise UsageError(
            f"--model_name_or_path {name} has no trained head for the task, and nothing trains it first: give "
            "--do_train, or predict with a trained adapter (nlu/predict.py)"
        )
    device = torch.device("cpu") if arguments.use_cpu else None
    speed_up(loaded, ATTENTION if arguments.no_fast_attention else (), device)
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
    """Cast frozen weights to bfloat16 for a method that needs no autocast, so that no step casts a weight."""
    if arguments.bf16 and not METHODS[arguments.method].needs_autocast:
        try:
            cast_frozen(model, torch.bfloat16, head=head_modules(model))
        except ValueError as error:
            raise UsageError(f"--bf16: {error}") from None
