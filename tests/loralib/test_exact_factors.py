"""Exact factors: projection and retraction against references in float64, and what long training leaves."""

import pytest
import torch
from torch import nn

import loralib
from loralib.exact_factors import deviations, inverse_root


def model_of(widths=(4,), share_outer=False, init="orthogonal", features=(12, 9), r=4, count=3):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(*features)}) for _ in range(count))})
    loralib.inject(model, "multiscale", ["q"], r=r, widths=widths, share_outer=share_outer, init=init)
    loralib.mark_only_lora_as_trainable(model)
    return model


def polar(x):
    u, _, v = torch.linalg.svd(x.detach().double(), full_matrices=False)
    return u @ v


def all_factors(model):
    return [f for layer in loralib.lora_layers(model).values() for f in [*layer.lora_B, *layer.lora_A]]


SHAPES = [
    ((), False, 4),
    ((4,), False, 4),
    ((1,), False, 4),
    ((6,), True, 4),
    ((40,), False, 4),  # wider than the layer itself
    ((6, 5), False, 3),
]


@pytest.mark.parametrize("widths, share_outer, r", SHAPES)
def test_retraction_is_the_polar_factor(widths, share_outer, r):
    model = model_of(widths, share_outer, r=r)
    exact = loralib.ExactFactors(model)
    with torch.no_grad():
        for p in {id(f): f for f in all_factors(model)}.values():
            p.add_(0.05 * torch.randn_like(p))
    expected = [polar(f) for f in all_factors(model)]
    exact.retract()
    for factor, reference in zip(all_factors(model), expected, strict=True):
        torch.testing.assert_close(factor.detach().double(), reference, atol=2e-6, rtol=0)
    assert deviations(model).max() < 1e-6


@pytest.mark.parametrize("widths, share_outer, r", SHAPES)
def test_projected_gradients_are_tangent_and_nearest(widths, share_outer, r):
    """g − X sym(Xᵀg) as written, for X tall; and XᵀG is skew afterwards, which is what tangent means."""
    model = model_of(widths, share_outer, r=r)
    exact = loralib.ExactFactors(model)
    expected = {}
    for factor in all_factors(model):
        factor.grad = torch.randn_like(factor)
    for factor in all_factors(model):
        x, g = factor.detach().double(), factor.grad.double()
        x, g = (x, g) if x.shape[0] >= x.shape[1] else (x.T, g.T)
        result = g - x @ (x.T @ g + g.T @ x) / 2
        expected[id(factor)] = result if factor.shape[0] >= factor.shape[1] else result.T
    exact.project_gradients()
    for factor in all_factors(model):
        torch.testing.assert_close(factor.grad.double(), expected[id(factor)], atol=1e-6, rtol=0)
        x, g = (t if t.shape[0] >= t.shape[1] else t.T for t in (factor.detach(), factor.grad))
        assert (x.T @ g + g.T @ x).abs().max() < 1e-5


def test_a_factor_without_a_gradient_keeps_none():
    model = model_of()
    exact = loralib.ExactFactors(model)
    first, *others = all_factors(model)
    for factor in others:
        factor.grad = torch.randn_like(factor)
    exact.project_gradients()
    assert first.grad is None and all(f.grad is not None for f in others)


@pytest.mark.parametrize("smallest, largest", [(0.3, 1.6), (0.9, 1.1), (0.6, 1.2)])
def test_inverse_root_over_the_range_it_is_made_for(smallest, largest):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 8, 8, dtype=torch.float64))[0]
    values = torch.linspace(smallest, largest, 8, dtype=torch.float64)
    gram = basis * values @ basis.mT
    expected = basis * values.rsqrt() @ basis.mT
    torch.testing.assert_close(inverse_root(gram), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(inverse_root(gram.float()).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_whatever_the_drift_retractions_bring_factors_back(size):
    model = model_of()
    exact = loralib.ExactFactors(model)
    with torch.no_grad():
        for factor in all_factors(model):
            factor.add_(size * torch.randn_like(factor))
    before = deviations(model).max()
    for _ in range(12):
        exact.retract()
        after = deviations(model).max()
        assert after < max(float(before), 1e-6)
        before = after
    assert after < 1e-6


@pytest.mark.parametrize(
    "widths, share_outer, lr",
    [((), False, 4e-3), ((4,), False, 4e-3), ((1,), False, 4e-3), ((6,), True, 4e-3), ((4,), False, 5e-4)],
)
def test_a_thousand_steps_leave_factors_orthonormal(widths, share_outer, lr):
    model = model_of(widths, share_outer, features=(24, 16), count=2)
    loralib.cast_frozen(model, torch.bfloat16)
    exact = loralib.ExactFactors(model)
    optimizer = torch.optim.AdamW(loralib.parameter_groups(model, lr, value_lr_ratio=4), weight_decay=0.01)
    x = torch.randn(64, 24)
    target = [torch.randn(64, 16) for _ in range(2)]
    layers = list(loralib.lora_layers(model).values())
    worst = 0.0
    for step in range(1000):
        loss = sum((layer(x).float() - t).square().mean() for layer, t in zip(layers, target, strict=True))
        loss.backward()
        exact.project_gradients()
        optimizer.step()
        exact.retract()
        optimizer.zero_grad()
        if step % 50 == 49:
            worst = max(worst, float(deviations(model).max()))
    assert worst < 1e-5
    if widths == (1,):
        return
    for layer in layers:
        p, q = (layer.lora_B[0], layer.lora_A[0]) if not widths else (
            layer.lora_B[0] @ layer.lora_B[1], layer.lora_A[1] @ layer.lora_A[0])  # fmt: skip
        for gram in (p.T @ p, q @ q.T):
            assert torch.linalg.matrix_norm(gram.double() - torch.eye(4)) < 1e-5
        values = torch.linalg.svdvals(layer.delta_weight().double())[:4]
        expected = (layer.lora_E.detach().abs() * layer.scaling).sort(descending=True).values.double()
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_pruning_costs_exactly_the_pruned_values():
    model = model_of(count=1)
    loralib.ExactFactors(model)
    (layer,) = loralib.lora_layers(model).values()
    with torch.no_grad():
        layer.lora_E.copy_(torch.tensor([3.0, 0.5, 2.0, 0.25]))
        before = layer.delta_weight()
        layer.lora_E[[1, 3]] = 0
        lost = torch.linalg.matrix_norm(before - layer.delta_weight())
    assert float(lost) == pytest.approx(layer.scaling * (0.5**2 + 0.25**2) ** 0.5, rel=1e-5)


def test_any_start_is_made_orthonormal_and_an_update_is_never_changed():
    model = model_of(init="gaussian")
    loralib.ExactFactors(model)
    assert deviations(model).max() < 1e-5
    trained = model_of(init="gaussian")
    for layer in loralib.lora_layers(trained).values():
        nn.init.ones_(layer.lora_E)
    before = [f.clone() for f in all_factors(trained)]
    with pytest.raises(ValueError, match="not orthonormal"):
        loralib.ExactFactors(trained)
    assert all(torch.equal(f, b) for f, b in zip(all_factors(trained), before, strict=True))


def test_plain_lora_has_no_exact_factors():
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    loralib.inject(model, "lora", ["q"], r=2)
    with pytest.raises(ValueError, match="singular values"):
        loralib.ExactFactors(model)


@pytest.mark.parametrize("fused", [False, True])
def test_retraction_keeps_what_the_optimiser_did(fused):
    """A fused optimiser writes to parameters without leaving a trace in their version."""
    model = model_of()
    exact, factors = loralib.ExactFactors(model), all_factors(model)
    optimizer = torch.optim.AdamW(factors, lr=0.01, fused=fused)
    for step in range(3):
        for number, factor in enumerate(factors):
            factor.grad = torch.randn(factor.shape, generator=torch.Generator().manual_seed(10 * step + number))
        exact.project_gradients()
        optimizer.step()
        expected = [polar(factor) for factor in factors]
        exact.retract()
        for factor, wanted in zip(factors, expected, strict=True):
            torch.testing.assert_close(factor.detach().double(), wanted, rtol=0, atol=1e-5)
