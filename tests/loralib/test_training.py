"""LowRankTraining in a plain loop: its steps, its warnings and errors, and exact resumption."""

import re
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

import loralib
from loralib.model import factors_of
from loralib.recipes.exact_factors import ExactFactors
from nlu import ROOT
from tests.loralib.small import INPUTS, Net, adapted, blocks, model_to_prune, random_step, trainable


def stepped(training, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(trainable(training.model), lr=1e-5)
    for _ in range(steps):
        (training.model(INPUTS).square().sum() + training.penalty()).backward()
        training.step(optimizer)


def test_the_penalty_is_the_weighted_regulariser_which_a_constraint_replaces():
    model = model_to_prune()
    weighted = loralib.compute_orth_regu(model, 0.2, "uv", True)
    for weight in (0.2, torch.tensor(0.2)):
        training = loralib.LowRankTraining(model, regu_weight=weight, terms="uv", squared=True)
        assert torch.equal(training.penalty(), weighted)
    assert torch.equal(loralib.LowRankTraining(model).penalty(), loralib.compute_orth_regu(model, 0.1))
    assert loralib.LowRankTraining(model, regu_weight=0).penalty() == 0
    orthonormal = blocks("lora2", r=2, init="orthogonal")
    assert loralib.LowRankTraining(orthonormal, constraint=ExactFactors).penalty() == 0


def test_the_optimisers_own_step_after_step_changes_nothing():
    """It would undo the pruning."""
    training = loralib.LowRankTraining(adapted(), 2, target_rank=1, init_warmup=0)
    assert training.ranks.live == training.ranks.initial - 4 and training.ranks.target == 6
    optimizer = torch.optim.AdamW(trainable(training.model), lr=0.1)
    for _ in range(2):
        stepped(training, 1, optimizer)
        before = [parameter.clone() for parameter in trainable(training.model)]
        optimizer.step()
        assert all(map(torch.equal, before, trainable(training.model)))
    assert training.ranks.live == 6


def test_an_optimiser_without_all_trainable_parameters_is_refused():
    """Without the error, e of some layers would silently stay 0, and the head as it was drawn."""
    model = Net()
    loralib.inject(model, "lora2", ["q"], r=3)
    early = torch.optim.SGD(trainable(model), lr=0.1)
    loralib.inject(model, "lora2", ["v"], r=3)
    training = loralib.LowRankTraining(model, 9)
    with pytest.raises(ValueError, match=r"lacks layers\.0\.v\.lora_"):
        training.step(early)
    late = torch.optim.SGD([p for layer in model.layers for p in layer["v"].lora_parameters()], lr=0.1)
    training.before_step(early, late)
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks classifier\.weight"):
        training.before_step(early, late)


def test_accumulating_with_accelerate_equals_whole_batches():
    models = [adapted("lora2") for _ in range(2)]
    accumulating, whole = (loralib.LowRankTraining(m, 4, target_rank=1, init_warmup=0, mask_interval=1) for m in models)
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)  # there is no data loader here
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    optimizer = accelerator.prepare(torch.optim.SGD(trainable(models[0]), lr=1e-7))
    for _ in range(8):
        with accelerator.accumulate(models[0]):
            accelerator.backward(models[0](INPUTS).square().sum() + accumulating.penalty())
            accumulating.step(optimizer)
    stepped(whole, 4, torch.optim.SGD(trainable(models[1]), lr=1e-7))
    assert accumulating.steps_done == 4
    assert all(torch.equal(a, b) for a, b in zip(trainable(models[0]), trainable(models[1]), strict=True))


class Wrapper:
    """An optimiser around another, which unscaling must not reach twice."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


@pytest.mark.parametrize("constraint", [False, True])
@pytest.mark.parametrize("kind", ["plain", "fused", "prepared", "wrapped"])
def test_importance_is_of_the_gradients_that_the_optimiser_sees_whatever_their_scale(constraint, kind):
    """In a step that the scaler skips, entries that are not finite count as 0. A fused optimiser does not unscale the
    others, and a wrapper must not do it twice."""

    def scores(scale):
        model = blocks("lora2", 2, (12, 9), r=4, k=4, init="orthogonal")
        for layer in loralib.lora_layers(model).values():
            nn.init.ones_(layer.lora_E)
        exact = ExactFactors if constraint else None
        training = loralib.LowRankTraining(model, 8, target_rank=2, mask_interval=1, regu_weight=0, constraint=exact)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3, fused=scale != 1 and kind in ("fused", "prepared"))
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            x, skipped = torch.randn(16, 12, generator=generator), step == 1
            optimizer.param_groups[0]["lr"] = 0.0 if skipped and scale == 1 else 1e-3
            if skipped and constraint:  # the projection spreads an entry that is not finite
                x = x * (0 if scale == 1 else torch.inf)
            outputs = [layer(x) for layer in loralib.lora_layers(model).values()]
            scaler.scale(sum(out.square().sum() for out in outputs)).backward()
            if skipped:
                trainable(model)[0].grad.view(-1)[0] = 0 if scale == 1 else torch.inf
            if kind == "prepared":
                Accelerator(cpu=True)  # sets the state that its optimisers read
                training.step(AcceleratedOptimizer(optimizer, False, scaler))
            else:
                training.step(Wrapper(optimizer) if kind == "wrapped" else optimizer, scaler)
                scaler.update()
        return training.ranks.pattern, training.allocator.importance_scores()

    (pattern, values), (expected, wanted) = scores(1024.0), scores(1)
    assert pattern == expected and values.isfinite().all()
    torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resume_in_a_plain_loop_as_documented(stop, tmp_path, monkeypatch):
    """Stopping and resuming a training with the code in docs/library.md does not change a bit of it. From step 5 on
    the mask is fixed. Factors that do not train are random ones, and belong to the state too."""
    text = (ROOT / "docs/library.md").read_text()
    blocks_of_code = re.findall(r"```python\n(.*?)```", text, re.S)
    imports, save, load = next(block for block in blocks_of_code if "torch.load(" in block).split("\n\n")
    monkeypatch.chdir(tmp_path)

    def parts():
        model = adapted("lora2", r=4, k=3)
        next(iter(loralib.lora_layers(model).values())).lora_A.requires_grad_(False)
        training = loralib.LowRankTraining(model, 8, target_rank=1, mask_interval=1)
        return model, training, torch.optim.AdamW(trainable(model), lr=0.05)

    model, training, optimizer = parts()
    stepped(training, stop, optimizer)
    names = {"loralib": loralib, "torch": torch}
    exec(imports, names)
    exec(save, names | {"model": model, "low_rank": training, "optimizer": optimizer})
    stepped(training, 8 - stop, optimizer)
    again, low_rank, other = parts()
    for parameter in [*trainable(again), *factors_of(again)]:
        nn.init.zeros_(parameter)
    exec(load, names | {"model": again, "low_rank": low_rank, "optimizer": other})
    stepped(low_rank, 8 - stop, other)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert low_rank.steps_done == 8 and low_rank.ranks.live == training.ranks.live == 6


def test_pruning_needs_the_number_of_steps_and_goes_no_further():
    with pytest.raises(RuntimeError, match="give total_steps"):
        stepped(loralib.LowRankTraining(adapted(r=4), target_rank=2), 1)
    with pytest.warns(UserWarning, match="more steps than total_steps"):
        stepped(loralib.LowRankTraining(adapted(), 1), 2)


@pytest.mark.parametrize("options, error", [
    ({"mask_intervall": 5}, TypeError), ({"mask_interval": 0}, ValueError), ({"target_rank": 9}, ValueError),
    ({"beta1": 2}, ValueError), ({"beta2": 1.0}, ValueError), ({"init_warmup": 40, "total_steps": 40}, ValueError),
    ({"terms": "vu"}, ValueError), ({"regu_weight": -0.1}, ValueError),
    ({"constraint": object()}, TypeError),
])  # fmt: skip
def test_a_wrong_option_is_refused_by_name(options, error):
    with pytest.raises(error, match=next(iter(options))):
        loralib.LowRankTraining(model_to_prune(), **{"target_rank": 4} | options)


def test_a_state_from_before_the_start_resumes_a_training_that_has_not_started():
    new, again, started = (loralib.LowRankTraining(model_to_prune(), n, target_rank=2) for n in (None, None, 12))
    again.load_state_dict(new.state_dict())
    assert (again.total_steps, again.steps_done, again.ranks) == (None, 0, None)
    for one, other in ((new, started), (started, new)):
        with pytest.raises(ValueError, match="same target_rank and total_steps"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("total, options", [(1, {}), (10, {"final_warmup": 9, "mask_interval": 1})])
def test_very_short_training_prunes_by_scores(total, options):
    """Without scores, singular values would be pruned in the order of the layers' names."""
    training = loralib.LowRankTraining(model_to_prune(), total, target_rank=1, init_warmup=0, **options)
    layers = loralib.lora_layers(training.model)
    for step in range(1, total + 1):
        random_step(training.model, torch.Generator().manual_seed(step))
        for layer in layers.values():
            nn.init.ones_(layer.lora_E)
            layer.lora_E.grad.fill_(1e-3)
        for factor in layers["layer.0.q"].lora_parameters():
            factor.grad.fill_(10.0)
        training.after_step()
    assert sum(training.ranks.pattern["layer.0.q"]) == training.ranks.live == 3


@pytest.mark.parametrize("count, at", [(1, 1), (1, 4), (3, 2)])
def test_layers_frozen_before_or_during_pruning_keep_their_singular_values(count, at):
    """One layer of three, or all: then nothing more is pruned."""
    model = model_to_prune()
    layers = list(loralib.lora_layers(model).values())
    frozen, others = layers[:count], layers[count:]
    for step in range(1, 13):
        if step == at:
            for parameter in (p for layer in frozen for p in layer.lora_parameters()):
                parameter.requires_grad_(False)
                parameter.grad = None
            kept = [layer.lora_E.detach().clone() for layer in frozen]
        if step == 1:
            training = loralib.LowRankTraining(model, 12, target_rank=2, init_warmup=0, final_warmup=2, mask_interval=1)
        random_step(model, torch.Generator().manual_seed(step))
        training.after_step()
    assert all(map(torch.equal, kept, [layer.lora_E for layer in frozen])) and (at > 1 or all(map(torch.all, kept)))
    assert sum(int(layer.lora_E.count_nonzero()) for layer in others) == 2 * len(others)
    assert training.ranks.live <= training.ranks.budget == training.ranks.target
    assert len(training.ranks.values) == (len(others) if at == 1 else 3)  # those that trained at the start
    if others:  # there is no penalty without them
        with torch.no_grad():
            before = training.penalty()
            frozen[0].lora_B[1].mul_(2)
            assert torch.equal(training.penalty(), before)


def test_layer_keeps_its_scores_while_it_is_frozen():
    """If the scores decayed, the whole layer would be pruned once it trains again."""
    model = model_to_prune()
    first = next(iter(loralib.lora_layers(model).values()))
    training = loralib.LowRankTraining(model, 100, target_rank=2)
    for step in range(6):
        if step == 3:
            first.requires_grad_(False).zero_grad()
            frozen, trained, _ = training.allocator.importance_scores()
        random_step(model, torch.Generator().manual_seed(step))
        training.after_step()
    scores = training.allocator.importance_scores()
    assert torch.equal(scores[0], frozen) and not torch.equal(scores[1], trained)


def test_a_state_that_is_kept_in_memory_does_not_change_with_the_training():
    training = loralib.LowRankTraining(model_to_prune(), 100, target_rank=2)
    for step in range(2):
        random_step(training.model, torch.Generator().manual_seed(step))
        training.after_step()
    saved, scores = training.state_dict(), training.allocator.importance_scores()
    for _ in range(2):
        training.after_step()
        assert not torch.equal(training.allocator.importance_scores(), scores)
        training.load_state_dict(saved)
        assert torch.equal(training.allocator.importance_scores(), scores)


class Reader(nn.Module):
    """Reads the weight of one of its layers itself, as WavLM's attention does."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize("kind", ["lora", "lora2"])
def test_warning_about_layers_that_the_model_does_not_call_comes_once(kind):
    model = Reader()
    loralib.inject(model, kind, ["called", "read"], r=2)
    training = loralib.LowRankTraining(model, 9, regu_weight=0.0 if kind == "lora" else 0.1)
    with pytest.warns(UserWarning, match="no gradient reached 1 of 2 low-rank layers, read among them") as seen:
        stepped(training, 1)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(training, 1)


def test_pruning_without_gradients_is_refused():
    """All scores would be 0, so singular values would be pruned in the order of the layers' names."""
    model = adapted(r=4)
    training = loralib.LowRankTraining(model, 9, target_rank=2, mask_interval=1)
    with (
        pytest.warns(UserWarning, match="cleared"),
        pytest.raises(ValueError, match="it was cleared"),
    ):
        training.after_step()
    assert training.ranks.pattern["layers.2.q"] == [True] * 4
