"""The samplers: every example once, in an order that depends on seed and epoch only."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.data.batching import LengthBucketSampler, SeededRandomSampler, planned_steps


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 9)
)
@settings(max_examples=50, deadline=None)
def test_samplers_yield_each_example_once_and_depend_on_seed_and_epoch_only(lengths, batch, seed, epoch):
    n = len(lengths)
    for make in (lambda: LengthBucketSampler(lengths, batch, seed), lambda: SeededRandomSampler(n, seed)):
        sampler = make()
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(n)) and len(sampler) == n
        again = make()
        list(again)
        again.set_epoch(epoch)
        torch.manual_seed(random.randrange(1000))
        np.random.seed(random.randrange(1000))
        assert list(again) == order


def test_batches_are_of_similar_length_in_random_order():
    lengths = np.random.default_rng(1).integers(5, 100, 6400)

    def padding(sampler):
        batches = lengths[np.fromiter(sampler, int)].reshape(-1, 32)
        return (batches.max(1, keepdims=True) - batches).sum() / batches.sum(), batches.mean(1)

    wasted, means = padding(LengthBucketSampler(lengths, 32, 0))
    assert 0.015 < wasted / padding(SeededRandomSampler(6400, 0))[0] < 0.03  # one pool of all batches: 0.005
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # the lengths of successive batches are unrelated


def test_planned_steps_are_those_of_the_rows_of_all_processes_and_accumulated_batches():
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, world_size=2,
                           do_train=True, max_steps=-1, num_train_epochs=1.5)  # fmt: skip
    assert [planned_steps(args, rows) for rows in (33, 32, 31, 3)] == [8, 6, 6, 2]


def test_rows_of_an_incomplete_batch_come_last_and_are_sorted_by_length():
    lengths = np.random.default_rng(0).integers(5, 60, 1000)
    rest = list(SeededRandomSampler(1000, 0))[600:]
    last = list(LengthBucketSampler(lengths, 600, 0))[600:]
    assert last == sorted(rest, key=lambda row: lengths[row])  # equal lengths: in random order, on any machine
