"""The allocator against the published algorithm, written entry by entry, and against peft's; and its properties."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

import loralib
from tests.loralib.small import SCHEDULE, model_to_prune, random_step, randomise, refused


class PublishedLoop:
    """Eqs. 6–9 of arXiv 2408.06854 with one Python float at a time, in float64, on AdaLoRA's schedule."""

    def __init__(self, model, r, target_total, importance, init_warmup, final_warmup, mask_interval, beta1, beta2,
                 total_steps):  # fmt: skip
        self.layers = loralib.lora_layers(model)
        self.start, self.target, self.importance = r * len(self.layers), target_total, importance
        self.ti, self.tf, self.every, self.total = init_warmup, final_warmup, mask_interval, total_steps
        self.beta1, self.beta2 = beta1, beta2
        self.mean, self.spread = {}, {}

    def entry(self, p):
        return (self.mean[id(p)] * self.spread[id(p)]).double()

    def scores(self):
        for name, layer in self.layers.items():
            for i in range(layer.r):
                s = self.entry(layer.lora_E)[i].item()
                column, row = self.entry(layer.lora_B[-1])[:, i].tolist(), self.entry(layer.lora_A[-1])[i, :].tolist()
                s += sum(column) / len(column) + sum(row) / len(row)
                if self.importance == "full":
                    for factor in [*layer.lora_B[:-1], *layer.lora_A[:-1]]:
                        flat = self.entry(factor).flatten().tolist()
                        s += sum(flat) / len(flat)
                yield (name, i), s

    def step(self, t):
        unique = {id(p): p for layer in self.layers.values() for p in layer.lora_parameters()}
        if t < self.total - self.tf:
            for key, p in unique.items():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                now = (p.detach().double() * gradient.double()).abs()
                self.mean[key] = self.beta1 * self.mean.get(key, 0) + (1 - self.beta1) * now
                gap = (now - self.mean[key]).abs()
                self.spread[key] = self.beta2 * self.spread.get(key, 0) + (1 - self.beta2) * gap
        if t <= self.ti:
            return self.start
        if t > self.total - self.tf:
            budget, due = self.target, True
        else:
            share = 1 - (t - self.ti) / (self.total - self.ti - self.tf)
            budget, due = int(self.target + (self.start - self.target) * share**3), t % self.every == 0
        ranked = sorted(self.scores(), key=lambda item: item[1]) if due else []
        for (name, i), _ in ranked[: self.start - budget]:
            self.layers[name].lora_E.data[i] = 0
        return budget


@pytest.mark.parametrize("importance", ["inner", "full"])
@pytest.mark.parametrize("widths, share", [((), False), ((1,), False), ((3,), False), ((2, 3), False), ((3,), True)])
def test_whole_schedule_equals_the_published_loop(widths, share, importance):
    model = model_to_prune(widths, share_outer=share)
    twin = copy.deepcopy(model)
    allocator = loralib.RankAllocator(model, target_rank=2, importance=importance, **SCHEDULE)
    loop = PublishedLoop(twin, 4, 6, importance, **SCHEDULE)
    for t in range(1, 41):
        skip = ("layer.1.",) if t % 7 == 0 and not share else ()
        random_step(model, torch.Generator().manual_seed(t), skip)
        random_step(twin, torch.Generator().manual_seed(t), skip)
        allocator.step(t)
        assert allocator.budget(t) == loop.step(t)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs), t
        live = {name: (layer.lora_E != 0).tolist() for name, layer in loralib.lora_layers(model).items()}
        assert allocator.ranks(t).pattern == live and allocator.importance_scores().dtype == torch.float32
    ranks = allocator.ranks(40)
    assert (ranks.initial, ranks.budget, ranks.target, ranks.live) == (12, 6, 6, 6)
    resumed = loralib.RankAllocator(model, target_rank=2, importance=importance, **SCHEDULE)
    resumed.load_state_dict(allocator.state_dict())
    random_step(model, torch.Generator().manual_seed(41))
    resumed.step(40)
    assert resumed.ranks(40).pattern == live


def allocator_of(model, **changes):
    return loralib.RankAllocator(model, **{"target_rank": 2} | SCHEDULE | changes)


def test_agrees_with_pefts_adalora_over_a_whole_schedule():
    """The regulariser agrees too.

    peft's allocator is called in every step, so that it masks to the budget in every final step. peft's own model
    instead fixes the pattern at step T − t_f, which gives the same masks.
    """
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4))
    ours = copy.deepcopy(base)
    loralib.inject(ours, "adalora", ["0", "1", "2"], r=4, lora_alpha=8)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=5, tfinal=8, deltaT=3, beta1=0.85, beta2=0.7, total_step=40, lora_alpha=8,
        target_modules=["0", "1", "2"],
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    inner = theirs.base_model.model
    allocator, peer_allocator = allocator_of(ours), PeftAllocator(inner, config, "default")
    pairs = []
    for name, layer in loralib.lora_layers(randomise(ours)).items():
        peer = inner.get_submodule(name)
        factors = (peer.lora_B, peer.lora_E, peer.lora_A)
        pairs += zip(layer.lora_parameters(), (each["default"] for each in factors), strict=True)
    for t in range(1, 41):
        random_step(ours, torch.Generator().manual_seed(t))
        for own, other in pairs:
            other.data, other.grad = own.detach().clone().view_as(other), own.grad.view_as(other)
        allocator.step(t)
        peer_budget, _ = peer_allocator.update_and_allocate(inner, t)
        assert allocator.budget(t) == peer_budget
        assert all(torch.equal(own.view_as(other), other) for own, other in pairs), t
    inner.forward = lambda x: SimpleNamespace(loss=x.sum() * 0)  # peft adds the regulariser to a model's own loss
    torch.testing.assert_close(loralib.compute_orth_regu(ours, 0.5), theirs.base_model(torch.ones(1)).loss)


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_ties_keep_the_later_names_and_indices_for_any_order_of_modules(order):
    """All scores are equal. The budget after two of nine steps is 7 of 12, which cuts through a layer."""
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in order})
    loralib.inject(model, "lora2", list(order), r=4, k=2)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    allocator = loralib.RankAllocator(model, 10, 1, init_warmup=0, final_warmup=1, mask_interval=1)
    for t in (1, 2):
        allocator.step(t)
    budget = allocator.budget(2)
    live = [value for mask in allocator.ranks(2).pattern.values() for value in mask]
    assert budget % 4 and live == [False] * (12 - budget) + [True] * budget


@pytest.mark.parametrize("shape, changes", [
    ({"count": 2}, {}), ({"widths": (2,)}, {}), ({}, {"importance": "full"}),
    *(({}, {name: value / 2 if value < 1 else value - 1}) for name, value in {"target_rank": 2, **SCHEDULE}.items()),
])  # fmt: skip
def test_a_state_of_other_layers_or_settings_is_refused(shape, changes):
    state = allocator_of(model_to_prune(**shape), **changes).state_dict()
    with refused("".join(f"has {name} = {value}" for name, value in changes.items()) or "other layers"):
        allocator_of(model_to_prune()).load_state_dict(state)
