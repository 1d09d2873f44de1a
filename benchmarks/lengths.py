"""Batches of the real token lengths of a GLUE task."""

from __future__ import annotations

import numpy as np

from nlu.data.batching import LengthBucketSampler, SeededRandomSampler
from nlu.data.glue import load_split
from nlu.tasks import get_task

SAMPLED = 6  # batches that stand for an epoch, evenly spaced among those sorted by cost
TOKENS_A_WORD = 1.3  # DeBERTaV3's tokenizer cannot be had offline; its English runs at about this
SPECIAL_TOKENS = 3


def token_lengths(task_name: str, glue_dir: str | None) -> list[int]:
    """Estimated tokens of every training example: 1.3 a word and three special ones.

    Raises:
        UsageError: when the data cannot be read.
    """
    task = get_task(task_name)
    rows = load_split(task, "train", glue_dir)
    words = [sum(len(text.split()) for text in texts) for texts in zip(*map(rows.get, task.text_fields), strict=True)]
    return [SPECIAL_TOKENS + round(TOKENS_A_WORD * count) for count in words]


def epoch_batches(lengths: list[int], batch: int, bucketed: bool) -> list[tuple[int, int]]:
    """(rows, tokens) of each batch of an epoch, padded to its longest: similar lengths together, or as they come."""
    sampler = LengthBucketSampler(lengths, batch, seed=0) if bucketed else SeededRandomSampler(len(lengths), seed=0)
    order = np.asarray(lengths)[list(sampler)]
    return [(len(order[i : i + batch]), int(order[i : i + batch].max())) for i in range(0, len(order), batch)]


def real_batches(task_name: str, glue_dir: str | None, batch: int, bucketed: bool) -> tuple[tuple[int, int], ...]:
    """A few batches whose mean cost is near the epoch's: the middles of equal parts of the batches sorted by length."""
    batches = sorted(epoch_batches(token_lengths(task_name, glue_dir), batch, bucketed), key=lambda b: b[1])
    return tuple(batches[int((i + 0.5) * len(batches) / SAMPLED)] for i in range(SAMPLED))
