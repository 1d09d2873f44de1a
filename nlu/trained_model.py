"""Loads a trained adapter on its base as a function from rows of text to probabilities."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import loralib
from loralib.adapter_folder import adapter_in
from loralib.interop.transformers_models import load_base_of, revision_of
from nlu.data.file_formats import Row
from nlu.data.tokens import encode
from nlu.errors import UsageError, reason
from nlu.fast import speed_up
from nlu.methods.registry import rebuild
from nlu.model import check_tokenizer, limit_length


@dataclass
class Predictor:
    """A model ready to predict.

    Attributes:
        columns: the one or two columns with the text. labels: the names of the classes; None for regression.
        cut: number of rows longer than the tokenizer's maximum so far, which were cut.
    """

    model: nn.Module
    tokenizer: Any
    columns: tuple[str, ...]
    labels: list[str] | None
    cut: int = 0

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row], batch_size: int) -> list[list[float]]:
        """Class probabilities, or one predicted number, for each row; raises UsageError if any is not finite."""
        texts = [[row.values[column] for row in rows] for column in self.columns]
        encoded, too_long = encode(self.tokenizer, texts)
        self.cut += too_long
        order = sorted(range(len(rows)), key=lambda i: len(encoded["input_ids"][i]), reverse=True)
        results: list[list[float]] = [[]] * len(rows)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: [values[i] for i in chosen] for name, values in encoded.items()}
            batch = self.tokenizer.pad(batch, return_tensors="pt").to(self.model.device)
            logits = self.model(**batch).logits.float()
            values = logits if self.labels is None else logits.softmax(-1)
            if not values.isfinite().all():
                raise UsageError("the model gives NaN or infinity: its training has failed")
            for i, value in zip(chosen, values.tolist(), strict=True):
                results[i] = value
        return results


def load_predictor(arguments: argparse.Namespace) -> Predictor:
    """Load the adapter and its base onto the accelerator if there is one.

    Raises:
        UsageError: if the adapter is damaged, its base is missing or does not fit, or the model does not predict one
            class or one number for each row.
    """
    folder = adapter_in(arguments.adapter)
    try:
        config = loralib.read_adapter_config(folder)
        source, card = arguments.base or config.base_model, config.card
        if source is None:
            raise UsageError("the adapter does not record its base model: give --base NAME_OR_FOLDER")
        if not config.architecture.endswith("ForSequenceClassification"):
            raise UsageError(f"{folder} is an adapter of {config.architecture}, not of a sequence classifier")
        model = load_base_of(config, source)
        rebuild(model, card)
        loralib.load_adapter(model, folder, allow_other_base=arguments.allow_other_base)
        revision = revision_of(config.base_model, config.base_revision, source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **revision)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # damaged files raise exceptions of many unrelated types
        raise UsageError(f"{arguments.adapter}: {reason(error, 400)}") from None
    check_tokenizer(tokenizer, source, **revision)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # no warning: rows are padded after sorting
    speed_up(model)
    limit_length(tokenizer, arguments.max_seq_length or card.get("max_seq_length") or 512, model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    columns, names = _text_columns(arguments.text_columns, card), _class_names(model.config, folder)
    return Predictor(model.eval().to(device), tokenizer, columns, names)


def _class_names(config: Any, folder: Path) -> list[str] | None:
    """The names of the classes by number; None for a regression of one number."""
    number, problem = config.num_labels, config.problem_type
    names = [str(config.id2label[i]) for i in range(number) if i in config.id2label]
    several = problem == "multi_label_classification" or (problem == "regression" and number > 1)
    if several or (number > 1 and len({*names}) < number):
        raise UsageError(
            f"{folder} must predict one number or one class for each row: its id2label must hold {number} different "
            "names, numbered from 0"
        )
    return None if number == 1 else names


def _text_columns(asked: str | None, card: dict[str, Any]) -> tuple[str, ...]:
    """The text columns, from --text_columns or else from the training; raises UsageError if neither names any."""
    trained = tuple(card.get("text_fields") or ())
    columns = tuple(asked.split(",")) if asked else trained
    if len(columns) not in ([len(trained)] if trained else [1, 2]) or len({*columns}) < len(columns):
        raise UsageError(f"--text_columns: name the {len(trained) or '1 or 2'} different column(s) that hold the text")
    return columns
