"""The order of the training examples. It depends on the seed and the epoch alone, not on the number of processes.

Accelerate deals the batches of one order out to the processes in turn. So one process with batches of 32, two with 16,
and four accumulation steps of 8 see the same 32 examples in one optimiser step. (In the last step of an epoch
accelerate repeats examples until every process has a whole batch; the trainer gives the repeated ones no weight.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

_POOL_BATCHES = 50  # batches sorted together: more of them give less padding, fewer give more random batches


class SeededRandomSampler(Sampler[int]):
    """A random order of n examples that depends on (seed, epoch) alone, never on a global generator."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        return generator.permutation(self.n)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order(np.random.default_rng([self.seed, self.epoch])).tolist())


class LengthBucketSampler(SeededRandomSampler):
    """A random order that puts examples of similar length into the same effective batch, which saves padding.

    It cuts a random order into pools of 50 batches, sorts each pool by length, cuts it into batches, and puts the
    batches into random order. The examples that do not fill a batch are a random choice and come last. A batch has the
    examples of one optimiser step, over all processes and accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], effective_batch_size: int, seed: int):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch = np.asarray(lengths), effective_batch_size

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        order = generator.permutation(self.n)
        batches = self.n // self.batch
        body, rest = np.split(order, [batches * self.batch])
        pool = np.arange(len(body)) // (_POOL_BATCHES * self.batch)
        body = body[np.lexsort((self.lengths[body], pool))].reshape(batches, self.batch)
        rest = rest[np.argsort(self.lengths[rest], kind="stable")]
        return np.concatenate([body[generator.permutation(batches)].ravel(), rest])


def effective_batch_size(args: Any) -> int:
    """Rows of one optimiser step, over all processes and accumulation steps."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def planned_steps(args: Any, rows: int) -> int:
    """Optimiser steps of the whole training over ``rows`` rows, as the Trainer counts them; 0 without training."""
    if not args.do_train:
        return 0
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * max(1, math.ceil(rows / effective_batch_size(args))))
