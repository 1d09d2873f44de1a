"""The allocator by its properties: budgets, ties, revival, resuming, and what it refuses."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib
from tests.loralib.small import SCHEDULE, model_to_prune, random_step, refused


def test_ties_keep_exactly_the_budget_whatever_the_order_of_modules():
    def build(order):
        model = nn.ModuleDict({name: nn.Linear(3, 3) for name in order})
        loralib.inject(model, "lora2", list(order), r=4, k=2)
        for p in model.parameters():
            nn.init.ones_(p)
            p.grad = torch.ones_like(p)
        return model

    patterns = []
    for order in ("abc", "cab"):
        model = build(order)
        allocator = loralib.RankAllocator(model, 4, 1, 0, 1, 1, 0.85, 0.85, total_step=4, target_total_rank=5)
        for t in range(1, 5):
            allocator.update_and_mask(model, t)
        assert allocator.live_rank == 5
        patterns.append(allocator.rank_pattern)
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("stop", [1, 17, 32, 33])
def test_resuming_from_the_state_is_exact(stop, tmp_path):
    def run(until, model, allocator, start=1):
        for t in range(start, until + 1):
            random_step(model, torch.Generator().manual_seed(t))
            allocator.update_and_mask(model, t)

    whole = model_to_prune()
    whole_allocator = loralib.RankAllocator(whole, 4, 2, **SCHEDULE)
    run(40, whole, whole_allocator)
    part = model_to_prune()
    allocator = loralib.RankAllocator(part, 4, 2, **SCHEDULE)
    run(stop, part, allocator)
    torch.save(allocator.state_dict(), tmp_path / "allocator.pt")
    fresh = loralib.RankAllocator(part, 4, 2, **SCHEDULE | {"total_step": None})
    fresh.load_state_dict(torch.load(tmp_path / "allocator.pt", weights_only=True))
    assert fresh.rank_pattern == allocator.rank_pattern
    run(40, part, fresh, start=stop + 1)
    assert fresh.rank_pattern == whole_allocator.rank_pattern
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))
    assert torch.equal(fresh.importance_scores(), whole_allocator.importance_scores())


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model = model_to_prune()
    allocator = loralib.RankAllocator(model, 4, 2, **SCHEDULE)
    random_step(model, torch.Generator().manual_seed(1))
    allocator.update_and_mask(model, 1)
    before = allocator.importance_scores()
    others = [
        loralib.RankAllocator(model_to_prune(count=2), 4, 2, **SCHEDULE).state_dict(),
        loralib.RankAllocator(model_to_prune(widths=(2,)), 4, 2, **SCHEDULE).state_dict(),
        loralib.RankAllocator(model, 4, 2, **SCHEDULE | {"beta1": 0.5}).state_dict(),
    ]
    for state in others:
        with refused():
            allocator.load_state_dict(state)
    assert torch.equal(allocator.importance_scores(), before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"target_rank": 5}, "15 singular values is larger"),
        ({"lora_r": 3}, "has 4"),
        ({"mask_interval": 0}, "mask_interval"),
        ({"init_warmup": 32}, "32 + 8 = 40"),
        ({"beta2": float("nan")}, "beta2"),
        ({"importance": "outer"}, "importance"),
        ({"target_total_rank": 13}, "larger than the 12"),
        ({"total_step": 40.5}, "total_step must be a whole number"),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, words):
    with refused(re.escape(words)):
        loralib.RankAllocator(model_to_prune(), **({"lora_r": 4, "target_rank": 2} | SCHEDULE | changes))


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 6), count=st.integers(1, 4), data=st.data(), every=st.integers(1, 5), seed=st.integers(0, 99))
def test_budget_falls_monotonically_to_the_target_and_is_what_is_live(r, count, data, every, seed):
    target = data.draw(st.integers(1, r * count))  # of some draws, all: then nothing is pruned
    warm, final, extra = (data.draw(st.integers(0, 8)) for _ in range(3))
    total = warm + final + extra + 1
    model = model_to_prune((2,), r=r, count=count, seed=seed)
    layers = loralib.lora_layers(model)
    allocator = loralib.RankAllocator(
        model, r, 1, warm, final, every, 0.85, 0.85, total_step=total, target_total_rank=target
    )
    budgets = []
    for t in range(1, total + 1):
        random_step(model, torch.Generator().manual_seed(seed + t))
        for layer in layers.values():  # as AdamW moves a pruned value
            layer.lora_E.data += 1e-3
        budget, threshold = allocator.update_and_mask(model, t)
        budgets.append(budget)
        live = {name: (layer.lora_E != 0).tolist() for name, layer in layers.items()}
        assert allocator.rank_pattern == live and allocator.live_rank == sum(map(sum, live.values()))
        assert allocator.live_rank == (r * count if threshold is None else budget)
        assert threshold is None or (budget < r * count and math.isfinite(threshold))
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == allocator.live_rank == target
    assert all(budget == r * count for budget in budgets[:warm])


def test_a_gradient_that_is_not_finite_leaves_the_scores_alone():
    """float16's scaler skips such a step; the averages decay as where the gradient is 0."""
    scores = []
    for spoiled in (0.0, torch.nan, torch.inf):
        model, generator = model_to_prune(count=3), torch.Generator().manual_seed(0)
        allocator = loralib.RankAllocator(model, 4, 2, **SCHEDULE)
        for step in range(1, 7):
            random_step(model, generator)
            for parameter in model.parameters() if step == 3 else ():
                parameter.grad = torch.full_like(parameter, spoiled)
            allocator.update_and_mask(model, step)
        scores.append(allocator.importance_scores())
    assert scores[0].isfinite().all() and torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_of_equal_scores_the_later_stay():
    model = model_to_prune()
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    allocator = loralib.RankAllocator(model, 4, 1, 0, 1, 1, 0.85, 0.85, total_step=2, target_total_rank=5)
    for t in (1, 2):
        allocator.update_and_mask(model, t)
    assert [live for mask in allocator.rank_pattern.values() for live in mask] == [False] * 7 + [True] * 5


def test_a_held_mask_is_held_by_a_resumed_training_too():
    """Whatever the scores are then."""
    model = model_to_prune()
    allocator = loralib.RankAllocator(model, 4, 2, **SCHEDULE)
    for t in range(1, 34):
        random_step(model, torch.Generator().manual_seed(t))
        allocator.update_and_mask(model, t)
    state = allocator.state_dict()
    held = allocator.rank_pattern
    fresh = loralib.RankAllocator(model, 4, 2, **SCHEDULE)
    fresh.load_state_dict(state | {"sensitivity": state["sensitivity"].flip(0)})
    for layer in loralib.lora_layers(model).values():
        nn.init.normal_(layer.lora_E)
    fresh.update_and_mask(model, 34)
    assert fresh.rank_pattern == held
