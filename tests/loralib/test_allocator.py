"""The allocator against the published loop written out entry by entry, against peft's, and by its properties."""

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

import loralib

SETTINGS = {"init_warmup": 5, "final_warmup": 8, "mask_interval": 3, "beta1": 0.85, "beta2": 0.7, "total_step": 40}


def model_of(widths=(3,), r=4, count=3, share_outer=False, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 5)}) for _ in range(count))})
    loralib.inject(model, "multiscale", ["q"], r=r, widths=widths, share_outer=share_outer)
    loralib.mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model


def random_step(model, generator, skip=()):
    """Stands for backward and optimiser: new gradients, and weights that move."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if any(s in name for s in skip) else gradient
            with torch.no_grad():
                p.sub_(0.05 * gradient)


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
    model = model_of(widths, share_outer=share)
    twin = copy.deepcopy(model)
    allocator = loralib.RankAllocator(model, 4, 2, importance=importance, **SETTINGS)
    loop = PublishedLoop(twin, 4, 6, importance, **SETTINGS)
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
    ours_allocator = loralib.RankAllocator(ours, 4, 2, **SETTINGS)
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
    model = nn.Sequential(nn.Linear(768, 768))
    loralib.inject(model, "lora2", ["0"], r=8, k=1)
    inner = loralib.RankAllocator(model, 8, 4, **SETTINGS)
    full = loralib.RankAllocator(model, 8, 4, importance="full", **SETTINGS)
    assert (inner.scored_parameters, full.scored_parameters) == (24, 1560)
    assert 1 - inner.scored_parameters / full.scored_parameters == pytest.approx(0.9846, abs=5e-5)


def test_budget_equal_to_the_initial_rank_prunes_nothing():
    model = model_of()
    allocator = loralib.RankAllocator(model, 4, 4, **SETTINGS)
    for t in range(1, 41):
        random_step(model, torch.Generator().manual_seed(t))
        assert allocator.update_and_mask(model, t) == (12, None)
    assert all(all(mask) for mask in allocator.rank_pattern.values())


def test_a_module_may_lose_its_whole_rank():
    model = model_of()
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS)
    for t in range(1, 41):
        random_step(model, torch.Generator().manual_seed(t), skip=("layer.0.",))
        allocator.update_and_mask(model, t)
    assert not any(allocator.rank_pattern["layer.0.q"])
    assert torch.equal(model["layer"][0]["q"].delta_weight(), torch.zeros(5, 6))


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


def test_a_pruned_value_may_come_back_before_the_final_phase():
    model = model_of(count=2)
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS | {"mask_interval": 1})
    revived, dead = 0, set()
    for t in range(1, 41):
        favoured = "layer.0." if t < 20 else "layer.1."
        random_step(model, torch.Generator().manual_seed(t))
        for name, p in model.named_parameters():
            if p.grad is not None and favoured not in name:
                p.grad *= 1e-4
        allocator.update_and_mask(model, t)
        now = {(n, i) for n, mask in allocator.rank_pattern.items() for i, live in enumerate(mask) if not live}
        revived += len(dead - now)
        if t > 33:
            assert now == dead  # held in the final phase
        dead = now
    assert revived > 0


@pytest.mark.parametrize("stop", [1, 6, 17, 32, 33, 39])
def test_resuming_from_the_state_is_exact(stop, tmp_path):
    def run(until, model, allocator, start=1):
        for t in range(start, until + 1):
            random_step(model, torch.Generator().manual_seed(t))
            allocator.update_and_mask(model, t)

    whole = model_of()
    whole_allocator = loralib.RankAllocator(whole, 4, 2, **SETTINGS)
    run(40, whole, whole_allocator)
    part = model_of()
    allocator = loralib.RankAllocator(part, 4, 2, **SETTINGS)
    run(stop, part, allocator)
    torch.save(allocator.state_dict(), tmp_path / "allocator.pt")
    fresh = loralib.RankAllocator(part, 4, 2, **SETTINGS | {"total_step": None})
    fresh.load_state_dict(torch.load(tmp_path / "allocator.pt", weights_only=True))
    assert fresh.rank_pattern == allocator.rank_pattern
    run(40, part, fresh, start=stop + 1)
    assert fresh.rank_pattern == whole_allocator.rank_pattern
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))
    assert torch.equal(fresh.importance_scores(), whole_allocator.importance_scores())


def test_an_allocator_that_scores_all_factors_knows_the_inner_scores_too():
    both = []
    for importance in ("inner", "full"):
        model = model_of()
        allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS | {"importance": importance})
        for t in range(1, 8):  # before anything is pruned: both see the same weights and gradients
            random_step(model, torch.Generator().manual_seed(t))
            allocator.update_and_mask(model, t) if t <= SETTINGS["init_warmup"] else None
        both.append(allocator)
    inner, full = both
    assert torch.equal(full.importance_scores("inner"), inner.importance_scores())
    assert torch.equal(full.importance_scores("full"), full.importance_scores())
    assert (full.importance_scores() > full.importance_scores("inner")).all()
    with pytest.raises(ValueError, match="not tracked"):
        inner.importance_scores("full")
    with pytest.raises(ValueError, match="not tracked"):
        full.importance_scores("outer")


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model = model_of()
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS)
    random_step(model, torch.Generator().manual_seed(1))
    allocator.update_and_mask(model, 1)
    before = allocator.importance_scores()
    good = allocator.state_dict()
    others = [
        loralib.RankAllocator(model_of(count=2), 4, 2, **SETTINGS).state_dict(),
        loralib.RankAllocator(model_of(widths=(2,)), 4, 2, **SETTINGS).state_dict(),
        loralib.RankAllocator(model, 4, 2, **SETTINGS | {"beta1": 0.5}).state_dict(),
        {k: v for k, v in good.items() if k != "mask"},
        good | {"extra": 1},
        good | {"mask": good["mask"][:1]},
        good | {"sensitivity": good["sensitivity"][:1]},
    ]
    for state in others:
        with pytest.raises(ValueError) as error:
            allocator.load_state_dict(state)
        assert "\n" not in str(error.value)
    assert torch.equal(allocator.importance_scores(), before)


def test_scores_stay_float32_for_bfloat16_parameters():
    model = model_of().to(torch.bfloat16)
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    allocator.update_and_mask(model, 1)
    assert allocator.importance_scores().dtype == torch.float32


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"target_rank": 5}, "larger than lora_r"),
        ({"target_rank": 0}, "target_rank"),
        ({"lora_r": 3}, "rank 4"),
        ({"mask_interval": 0}, "mask_interval"),
        ({"init_warmup": -1}, "init_warmup"),
        ({"init_warmup": 32}, "32 + 8 = 40"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": float("nan")}, "beta2"),
        ({"importance": "outer"}, "importance"),
        ({"target_total_rank": 13}, "12"),
        ({"target_total_rank": 0}, "target_total_rank"),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, words):
    with pytest.raises(ValueError) as error:
        loralib.RankAllocator(model_of(), **({"lora_r": 4, "target_rank": 2} | SETTINGS | changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_needs_layers_a_total_and_its_own_model():
    with pytest.raises(ValueError, match="inject"):
        loralib.RankAllocator(nn.Sequential(nn.Linear(2, 2)), 4, 2, **SETTINGS)
    model = model_of()
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS | {"total_step": None})
    with pytest.raises(RuntimeError, match="set_total_step"):
        allocator.update_and_mask(model, 1)
    with pytest.raises(ValueError, match="13 leaves"):
        allocator.set_total_step(13)
    allocator.set_total_step(40)
    with pytest.raises(ValueError, match="another model"):
        allocator.update_and_mask(model_of(), 1)
    wrapped = nn.Sequential(model)
    assert allocator.update_and_mask(wrapped, 1) == (12, None)


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 6), count=st.integers(1, 4), data=st.data(), every=st.integers(1, 5), seed=st.integers(0, 99))
def test_budget_falls_monotonically_to_the_target_and_is_what_is_live(r, count, data, every, seed):
    target = data.draw(st.integers(1, r * count))
    warm, final, extra = (data.draw(st.integers(0, 8)) for _ in range(3))
    total = warm + final + extra + 1
    model = model_of((2,), r=r, count=count, seed=seed)
    allocator = loralib.RankAllocator(
        model, r, 1, warm, final, every, 0.85, 0.85, total_step=total, target_total_rank=target
    )
    budgets = []
    for t in range(1, total + 1):
        random_step(model, torch.Generator().manual_seed(seed + t))
        budget, threshold = allocator.update_and_mask(model, t)
        budgets.append(budget)
        if threshold is not None:
            assert allocator.live_rank == budget and math.isfinite(threshold)
            zeros = sum(int((layer.lora_E == 0).sum()) for layer in loralib.lora_layers(model).values())
            assert zeros == r * count - budget
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == target
    assert all(budget == r * count for budget in budgets[:warm])
    if final:
        assert allocator.live_rank == target


@pytest.mark.parametrize("total_step, final_warmup", [(23, 0), (40, 0), (23, 5)])
def test_the_last_step_masks_and_the_ranks_are_those_of_the_weights(total_step, final_warmup):
    model = model_of()
    schedule = {"init_warmup": 2, "final_warmup": final_warmup, "total_step": total_step, "mask_interval": 10}
    allocator = loralib.RankAllocator(model, 4, 2, **SETTINGS | schedule)
    for t in range(1, total_step + 1):
        random_step(model, torch.Generator().manual_seed(t))
        with torch.no_grad():  # as AdamW moves a pruned value
            for layer in loralib.lora_layers(model).values():
                layer.lora_E += 1e-3
        budget, masked = allocator.update_and_mask(model, t)
        pattern = {name: (layer.lora_E != 0).tolist() for name, layer in loralib.lora_layers(model).items()}
        assert allocator.rank_pattern == pattern
        assert allocator.live_rank == sum(map(sum, pattern.values())) == (12 if masked is None else budget)
    assert allocator.live_rank == 6


@pytest.mark.parametrize("prune_by", ["importance", "value"])
def test_every_module_keeps_its_minimum_and_the_budget_holds(prune_by):
    model = model_of(count=4)
    layers = loralib.lora_layers(model)
    first = next(iter(layers.values()))
    options = {**SETTINGS, "min_rank_per_module": 1, "prune_by": prune_by}
    allocator = loralib.RankAllocator(model, 4, 2, target_total_rank=5, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, SETTINGS["total_step"] + 1):
        random_step(model, generator)
        with torch.no_grad():
            first.lora_E.mul_(1e-3)  # it would lose everything
        values = {name: layer.lora_E.detach().abs() for name, layer in layers.items()}
        budget, threshold = allocator.update_and_mask(model, step)
        if threshold is not None and step <= SETTINGS["total_step"] - SETTINGS["final_warmup"]:  # then it is held
            scores = dict(zip(allocator.rank_pattern, allocator.importance_scores(), strict=True))
            scores = values if prune_by == "value" else scores
            live = {name: layer.lora_E != 0 for name, layer in layers.items()}
            assert sum(int(mask.sum()) for mask in live.values()) == budget
            assert all(bool(mask[scores[name].argmax()]) for name, mask in live.items())
            # Apart from each module's largest, what is kept is at least as large as what is pruned.
            rest = {n: torch.arange(4) != s.argmax() for n, s in scores.items()}
            kept = [scores[n][live[n] & rest[n]] for n in layers]
            pruned = [scores[n][~live[n]] for n in layers]
            assert float(torch.cat(kept).min()) >= float(torch.cat(pruned).max())
    assert allocator.live_rank == 5


@pytest.mark.parametrize("changes, words", [
    ({"prune_by": "size"}, "prune_by must be"),
    ({"min_rank_per_module": -1}, "min_rank_per_module must be"),
    ({"min_rank_per_module": 3}, "more than the target"),
])  # fmt: skip
def test_bad_ways_to_prune_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        loralib.RankAllocator(model_of(), 4, 2, **SETTINGS, **changes)
