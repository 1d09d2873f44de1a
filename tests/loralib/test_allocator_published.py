"""The allocator against the published loop written out entry by entry, and against peft's."""

import copy

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

import loralib
from tests.loralib.small import SCHEDULE, blocks, model_to_prune, random_step


class PublishedLoop:
    """Eqs. 6–9 with one Python float at a time; the schedule of AdaLoRA; float64."""

    def __init__(self, model, r, target_total, importance, init_warmup, final_warmup, mask_interval, beta1, beta2,
                 total_step):  # fmt: skip
        self.layers = loralib.lora_layers(model)
        self.start, self.target, self.importance = r * len(self.layers), target_total, importance
        self.ti, self.tf, self.every, self.total = init_warmup, final_warmup, mask_interval, total_step
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
            return self.start, None
        if t > self.total - self.tf:
            budget, due = self.target, True
        else:
            share = 1 - (t - self.ti) / (self.total - self.ti - self.tf)
            budget, due = int(self.target + (self.start - self.target) * share**3), t % self.every == 0
        if not due:
            return budget, None
        ranked = sorted(self.scores(), key=lambda item: item[1])
        dead = ranked[: self.start - budget]
        for (name, i), _ in dead:
            self.layers[name].lora_E.data[i] = 0
        return budget, (dead[-1][1] if dead else None)


@pytest.mark.parametrize("importance", ["inner", "full"])
@pytest.mark.parametrize("widths, share", [((), False), ((1,), False), ((3,), False), ((2, 3), False), ((3,), True)])
def test_whole_schedule_equals_the_published_loop(widths, share, importance):
    model = model_to_prune(widths, share_outer=share)
    twin = copy.deepcopy(model)
    allocator = loralib.RankAllocator(model, 4, 2, importance=importance, **SCHEDULE)
    loop = PublishedLoop(twin, 4, 6, importance, **SCHEDULE)
    for t in range(1, 41):
        skip = ("layer.1.",) if t % 7 == 0 and not share else ()
        random_step(model, torch.Generator().manual_seed(t), skip)
        random_step(twin, torch.Generator().manual_seed(t), skip)
        budget, threshold = allocator.update_and_mask(model, t)
        expected_budget, expected_threshold = loop.step(t)
        assert budget == expected_budget
        if expected_threshold is None:
            assert threshold is None
        else:
            assert threshold == pytest.approx(expected_threshold, rel=1e-4)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs), t
        assert allocator.importance_scores().dtype == torch.float32
    assert allocator.live_rank == allocator.target_total_rank == 6
    for name, layer in loralib.lora_layers(model).items():
        assert [value != 0 for value in layer.lora_E.tolist()] == allocator.rank_pattern[name]


def test_agrees_with_pefts_adalora_over_a_whole_schedule():
    """The same class of peft, driven by the published loop (mask_to_budget in every final step, as METHOD has it;
    peft's own model instead freezes the pattern at step T − t_f, which gives the same masks)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4))
    ours = copy.deepcopy(base)
    loralib.inject(ours, "adalora", ["0", "1", "2"], r=4, lora_alpha=8)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=5, tfinal=8, deltaT=3, beta1=0.85, beta2=0.7, total_step=40, lora_alpha=8,
        target_modules=["0", "1", "2"],
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    peer_allocator = PeftAllocator(theirs.base_model.model, config, "default")
    ours_allocator = loralib.RankAllocator(ours, 4, 2, **SCHEDULE)
    with torch.no_grad():
        for name, layer in loralib.lora_layers(ours).items():
            peer = theirs.base_model.model.get_submodule(name)
            layer.lora_A[0].copy_(peer.lora_A["default"].normal_())
            layer.lora_B[0].copy_(peer.lora_B["default"].normal_())
            layer.lora_E.copy_(peer.lora_E["default"].normal_().squeeze(1))
    mine = [p for layer in loralib.lora_layers(ours).values() for p in layer.lora_parameters()]
    peers = [p for name, p in theirs.named_parameters() if "lora_" in name and "ranknum" not in name]
    optimizers = [torch.optim.AdamW(parameters, lr=0.02) for parameters in (mine, peers)]
    for t in range(1, 41):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        for model, optimizer in zip((ours, theirs.base_model.model), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        budget, _ = ours_allocator.update_and_mask(ours, t)
        peer_budget, pattern = peer_allocator.update_and_allocate(theirs.base_model.model, t)
        assert budget == peer_budget
        if pattern is not None:
            expected = {name.split(".lora_E")[0]: mask for name, mask in pattern.items()}
            assert ours_allocator.rank_pattern == expected, t
        for name, layer in loralib.lora_layers(ours).items():
            peer = theirs.base_model.model.get_submodule(name)
            torch.testing.assert_close(layer.lora_E, peer.lora_E["default"].squeeze(1), rtol=1e-3, atol=1e-4)


def test_scored_parameters_are_those_of_the_paper():
    model = blocks("lora2", 1, (768, 768), r=8, k=1)
    inner = loralib.RankAllocator(model, 8, 4, **SCHEDULE)
    full = loralib.RankAllocator(model, 8, 4, importance="full", **SCHEDULE)
    assert (inner.scored_parameters, full.scored_parameters) == (24, 1560)
    assert 1 - inner.scored_parameters / full.scored_parameters == pytest.approx(0.9846, abs=5e-5)
