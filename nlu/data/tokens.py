"""From text to token ids."""

from __future__ import annotations

import math
import os
from typing import Any

from datasets import Dataset
from torch import nn

from loralib.adapter_folder import has_tokenizer
from nlu.errors import UsageError
from nlu.tasks import Task


def check_tokenizer(tokenizer: Any, source: str, flag: str = "") -> None:
    """Raises UsageError for a tokenizer that cannot pad, and a folder ``source`` without a tokenizer's files.

    For such a folder transformers makes one of special tokens alone, which reads any text as unknown.
    """
    if os.path.isdir(source) and not has_tokenizer(source):
        raise UsageError(f"{flag}{source} has no tokenizer: save it into that folder (tokenizer.save_pretrained)")
    if tokenizer.pad_token is None:
        raise UsageError(
            f"{flag}{source}: its tokenizer has no padding token, which batches need: save a copy with pad_token set "
            "(and pad_token_id in config.json)"
        )


def check_room(tokenizer: Any, max_seq_length: int, texts: int) -> None:
    """Raises UsageError where so many tokens leave no room for one or two texts beside the special ones."""
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_seq_length <= special:
        raise UsageError(f"--max_seq_length {max_seq_length} has no room for text: {special} tokens are special ones")


def tokenize(
    splits: dict[str, Dataset], task: Task, tokenizer: Any, max_seq_length: int, pad_to_max_length: bool = False
) -> dict[str, Dataset]:
    """Turn text into token ids, in memory (nothing is written beside the source or into a cache).

    Args:
        tokenizer: a transformers tokenizer; where it allows fewer than `max_seq_length` tokens, its limit holds.
        pad_to_max_length: pad every row to `max_seq_length` here; otherwise the collator pads to a batch's longest row.

    Returns:
        The same splits with `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer has them, `labels`
        (left out of a split whose labels are hidden), `idx`, and `length`, the number of tokens without padding.
    """
    check_room(tokenizer, max_seq_length, len(task.text_fields))
    max_length = min(max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            *(batch[field] for field in task.text_fields),
            truncation=True,
            max_length=max_length,
            padding="max_length" if pad_to_max_length else False,
            return_attention_mask=True,
        )
        return {**encoded, "length": [sum(mask) for mask in encoded["attention_mask"]]}

    result = {}
    for split, dataset in splits.items():
        dataset = dataset.select_columns([*task.text_fields, "label", "idx"])
        dataset = dataset.map(
            encode,
            batched=True,
            remove_columns=list(task.text_fields),
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"tokens-{split}",
            desc=f"Tokenizing {task.name} {split}",
        )
        hidden = split in task.test_splits and _any_hidden(task, dataset["label"][:])
        result[split] = dataset.remove_columns("label") if hidden else dataset.rename_column("label", "labels")
    return result


def longest_input(model: nn.Module) -> int | None:
    """The most tokens that a model with a table of positions reads; None for one without (DeBERTa).

    RoBERTa's table has padding's row and those before it on top, which no token uses, and those of OPT and BART begin
    with an offset.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions") and isinstance(
            module, nn.Embedding
        ):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", first)
    return None


def _any_hidden(task: Task, labels: list) -> bool:
    """Whether labels are missing: NaN where any number may be a label, -1 elsewhere."""
    unbounded = task.is_regression and task.value_range is None
    return any(map(math.isnan, labels)) if unbounded else min(labels) < 0
