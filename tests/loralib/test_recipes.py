"""Exact factors against float64 references, update statistics against the dense ΔW, and learning rates."""

import pytest
import torch
from torch import nn

import loralib
from loralib.recipes.diagnostics import update_statistics
from loralib.recipes.exact_factors import ExactFactors, deviations
from loralib.recipes.learning_rates import parameter_groups
from tests.loralib.small import KINDS, blocks, matrices_of, refused, trainable


def model_of(widths=(4,), share_outer=False, init="orthogonal", r=4):
    return blocks("multiscale", features=(12, 9), r=r, widths=widths, share_outer=share_outer, init=init)


def polar(x):
    u, _, v = torch.linalg.svd(x.detach().double(), full_matrices=False)
    return u @ v


SHAPES = [((), False, 4), ((4,), False, 4), ((1,), False, 4), ((6,), True, 4), ((6, 5), False, 3)]


def projected(x, g):
    """g − X sym(Xᵀg) for tall X, in float64."""
    if x.shape[0] < x.shape[1]:
        return projected(x.T, g.T).T
    x, g = x.detach().double(), g.double()
    return g - x @ (x.T @ g + g.T @ x) / 2


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_retractions_make_factors_orthonormal_after_any_drift(size):
    model = model_of()
    exact = ExactFactors(model)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)  # new parameters
    with torch.no_grad():
        for factor in matrices_of(model):
            factor.add_(size * torch.randn_like(factor))
    before = deviations(matrices_of(model)).max()
    for _ in range(12):
        exact.after_step()
        after = deviations(matrices_of(model)).max()
        assert after < max(float(before), 1e-6)
        before = after
    assert after < 1e-6


def test_initial_factors_are_made_orthonormal_and_a_trained_update_is_refused():
    model = model_of(init="gaussian")
    for layer in list(loralib.lora_layers(model).values())[1:]:
        nn.init.zeros_(layer.lora_B[1])
    ExactFactors(model)
    assert deviations(matrices_of(model)).max() < 1e-5
    trained = model_of(init="gaussian")
    for layer in loralib.lora_layers(trained).values():
        nn.init.ones_(layer.lora_E)
    with refused("not orthonormal", trained):
        ExactFactors(trained)
    with refused("singular values"):
        ExactFactors(blocks("lora", r=2))
    with refused("half precision"):  # they would stay further from orthonormal than 1e-3
        ExactFactors(model_of().to(torch.bfloat16))


def test_first_step_makes_factors_orthonormal_that_were_drawn_after_the_constraint_was_made():
    training = loralib.LowRankTraining(model := model_of(), constraint=ExactFactors)
    for factor in matrices_of(model):
        nn.init.normal_(factor)
    training.before_step(torch.optim.SGD(trainable(model), lr=0.1))
    assert deviations(matrices_of(model)).max() < 1e-5


@pytest.mark.parametrize("widths, share_outer, r", SHAPES)
def test_gradients_are_projected_and_factors_become_polar_factors_as_the_formulas_say(widths, share_outer, r):
    """Also under autocast, and if a factor has no gradient."""
    model = model_of(widths, share_outer, r=r)
    exact, factors = ExactFactors(model), list(dict.fromkeys(matrices_of(model)))
    optimizer = torch.optim.AdamW(factors, lr=0.2)
    for _ in range(2):
        for factor in factors[1:]:
            factor.grad = torch.randn_like(factor)
        expected = [projected(factor, factor.grad) for factor in factors[1:]]
        with torch.autocast("cpu", torch.bfloat16):
            exact.before_step()
        assert factors[0].grad is None
        torch.testing.assert_close([f.grad.double() for f in factors[1:]], expected, rtol=0, atol=1e-6)
        optimizer.step()
        expected = [polar(factor) for factor in factors]
        with torch.autocast("cpu", torch.bfloat16):
            exact.after_step()
        torch.testing.assert_close([f.detach().double() for f in factors], expected, rtol=0, atol=1e-5)
    assert deviations(factors).max() < 1e-6


@pytest.mark.parametrize("frozen", ["values", "factors"])
def test_exactly_the_trainable_factors_are_kept_orthonormal(frozen):
    """The singular values of a layer may be frozen while its factors train, and the other way round."""
    model = model_of()
    first, *_ = loralib.lora_layers(model).values()
    own = [*first.lora_B, *first.lora_A]
    if frozen == "values":
        nn.init.ones_(first.lora_E).requires_grad_(False)
    else:
        for factor in own:
            nn.init.normal_(factor).requires_grad_(False)
    before = [factor.clone() for factor in own]
    exact, x = ExactFactors(model), torch.randn(8, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    for _ in range(20):
        sum(layer(x).square().mean() for layer in loralib.lora_layers(model).values()).backward()
        exact.before_step()
        optimizer.step()
        exact.after_step()
        optimizer.zero_grad()
    trained = [factor for factor in matrices_of(model) if factor.requires_grad]
    assert deviations(trained).max() < 1e-5
    assert all(torch.equal(f, b) for f, b in zip(own, before, strict=True)) == (frozen == "factors")
    for factor in trained:
        factor.requires_grad_(False)
    with pytest.raises(ValueError, match="let their factors train"):
        ExactFactors(model)


@pytest.mark.parametrize("kind, options", KINDS)
def test_statistics_agree_with_the_dense_update(kind, options):
    model = blocks(kind, std=1.0, r=4, **options)
    layers = loralib.lora_layers(model)
    if kind != "lora":
        layers["layer.1.q"].lora_E.data[2:] = 0
    found = update_statistics(model)
    fresh = update_statistics(blocks(kind, r=4, **options))
    assert set(fresh.delta_norms.values()) == {0.0} and fresh.largest_value is None
    for name, layer in layers.items():
        dense = torch.linalg.matrix_norm(layer.delta_weight().detach().double())
        assert found.delta_norms[name] == pytest.approx(float(dense), rel=1e-5)
    if kind == "lora":
        assert found.largest_value is found.smallest_value is found.deviation is None
        return
    values = torch.cat([layer.lora_E.detach().abs() for layer in layers.values()])
    assert found.largest_value == float(values.max()) and found.smallest_value == float(values[values > 0].min())
    grams = [f @ f.T if f.shape[0] <= f.shape[1] else f.T @ f for f in matrices_of(model)]
    expected = max(float(torch.linalg.matrix_norm(g - torch.eye(len(g)))) for g in grams)
    assert found.deviation == pytest.approx(expected, rel=1e-4)


def test_every_trainable_parameter_has_one_learning_rate():
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(6, 6)}) for i in range(3)} | {"p": nn.Linear(6, 2)})
    loralib.inject(model, "lora2", ["q"], r=2, k=3, share_outer=True)
    loralib.inject(model, "lora", ["p"], r=2)
    with pytest.raises(ValueError, match="unfreeze the head"):
        parameter_groups(model, 1e-3, head_lr=1e-3)
    model["head"] = nn.Linear(2, 2)
    groups = parameter_groups(model, 1e-3, value_lr_ratio=4, b_lr_ratio=16, head_lr=5e-4)
    rates = [(p, group["lr"]) for group in groups for p in group["params"]]
    assert len(rates) == len({id(p) for p, _ in rates}) == sum(p.requires_grad for p in model.parameters())
    expected = {id(layer.lora_E): 4e-3 for layer in loralib.lora_layers(model).values() if layer.lora_E is not None}
    expected |= {id(model["p"].lora_B[0]): 1.6e-2} | {id(p): 5e-4 for p in model["head"].parameters()}
    assert all(rate == pytest.approx(expected.get(id(p), 1e-3)) for p, rate in rates)
