"""Preconditioned gradients against formulas on whole matrices, layer by layer."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import loralib
from tests.loralib.small import blocks, refused


def model_of(kind, **options):
    model = blocks(kind, features=(7, 6), std=1.0, dtype=torch.float64, r=3, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def product(matrices, rows):
    result = torch.eye(rows, dtype=torch.float64)
    for matrix in matrices:
        result = result @ matrix
    return result


def damped_inverse(gram):
    return torch.linalg.inv(gram + 1e-6 * torch.eye(len(gram), dtype=gram.dtype))


def chain(layer):
    middle = [] if layer.lora_E is None else [layer.lora_E.detach().diag()]
    return [*(b.detach() for b in layer.lora_B), *middle, *(a.detach() for a in reversed(layer.lora_A))]


CHAINS = [("lora", {}), ("adalora", {}), ("lora2", {"k": 4}), ("lora2", {"k": 2}), ("multiscale", {"widths": (5, 4)})]


@pytest.mark.parametrize("kind, options", CHAINS)
def test_riemannian(kind, options):
    model = model_of(kind, **options)
    layers = loralib.lora_layers(model).values()
    expected = {}
    for layer in layers:
        matrices = chain(layer)
        places = [*layer.lora_B, *([] if layer.lora_E is None else [layer.lora_E]), *reversed(layer.lora_A)]
        for i, parameter in enumerate(places):
            left, right = product(matrices[:i], 6), product(matrices[i + 1 :], matrices[i].shape[1])
            g = parameter.grad
            if parameter is layer.lora_E:
                expected[parameter] = damped_inverse((left.T @ left) * (right @ right.T)) @ g
                continue
            g = g if i == 0 else damped_inverse(left.T @ left) @ g
            expected[parameter] = g if i == len(places) - 1 else g @ damped_inverse(right @ right.T)
    without, *_ = expected
    expected[without], without.grad = None, None
    expected = {p: g if g is None else g.clone() for p, g in expected.items()}
    loralib.Preconditioner(model, "riemannian").apply()
    for parameter, gradient in expected.items():
        if gradient is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-9)  # k > r: damped singular Grams


@pytest.mark.parametrize("kind, options", [c for c in CHAINS if c[0] != "adalora"])
def test_balanced_is_the_step_of_the_balanced_pair(kind, options):
    """With M M^T = S, X M and M^-1 Y have equal Grams."""
    model = model_of(kind, **options)
    before = {p: p.grad.clone() for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()}
    loralib.Preconditioner(model, "balanced").apply()
    for layer in loralib.lora_layers(model).values():
        if kind == "multiscale":  # the outermost factor has one neighbour
            pairs = [(layer.lora_B[0], None, layer.lora_B[1])]
        elif kind == "lora":
            pairs = [(layer.lora_B[0], layer.lora_A[0], layer.lora_A[0])]
        else:
            pairs = [
                (layer.lora_B[0], layer.lora_B[1], layer.lora_B[1]),
                (layer.lora_A[1], layer.lora_A[0], layer.lora_A[0]),
            ]
        for x, last, y in pairs:
            inverse = torch.linalg.lstsq(before[x], x.grad)[0]  # g_X S^-1 = what came out
            if min(before[x].shape) == before[x].shape[1]:
                s = torch.linalg.inv(inverse)
                torch.testing.assert_close(s @ (x.T @ x) @ s, y @ y.T, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(s, s.T, rtol=1e-6, atol=1e-8)
                if last is not None:
                    torch.testing.assert_close(last.grad, s @ before[last], rtol=1e-6, atol=1e-8)
        if layer.lora_E is not None:
            assert torch.equal(layer.lora_E.grad, before[layer.lora_E])


@pytest.mark.parametrize("form", ["balanced", "riemannian"])
def test_a_shared_factor_is_changed_once_with_averaged_grams(form):
    model = model_of("lora2", k=4, share_outer=True)
    layers = list(loralib.lora_layers(model).values())
    outer = layers[0].lora_B[0]
    before = outer.grad.clone()
    loralib.Preconditioner(model, form).apply()
    if form == "riemannian":
        grams = []
        for layer in layers:
            _, *rest = chain(layer)
            right = product(rest, 4)
            grams.append(right @ right.T)
        expected = before @ damped_inverse(sum(grams) / 3)
        torch.testing.assert_close(outer.grad, expected, rtol=1e-5, atol=1e-7)
    else:
        s = torch.linalg.inv(torch.linalg.lstsq(before, outer.grad)[0])
        mean = sum(layer.lora_B[1] @ layer.lora_B[1].T for layer in layers) / 3
        torch.testing.assert_close(s @ (outer.T @ outer) @ s, mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["balanced", "riemannian"])
def test_bfloat16_factors_and_those_below_autocast_are_computed_with_in_float32(form):
    half, full = model_of("lora2", k=4).bfloat16(), model_of("lora2", k=4)
    for p, q in zip(half.parameters(), full.float().parameters(), strict=True):
        p.grad = p.grad.bfloat16()
        q.data, q.grad = p.data.float(), p.grad.float()
    loralib.Preconditioner(full, form).apply()
    with torch.autocast("cpu", torch.bfloat16):
        loralib.Preconditioner(half, form).apply()
    for p, q in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.bfloat16())


def test_a_factor_that_layers_of_different_ranks_share_is_refused():
    model = model_of("lora2", k=4, share_outer=True)
    loralib.lora_layers(model)["layer.0.q"].keep_singular_values([0, 2])
    with refused("layers of different ranks share a factor", model):
        loralib.Preconditioner(model, "riemannian")


@pytest.mark.parametrize("kind, form, message", [
    ("adalora", "balanced", "e lies between"),
    ("lora", "natural", "kind must be"),
])  # fmt: skip
def test_what_means_nothing_is_refused(kind, form, message):
    with pytest.raises(ValueError, match=message):
        loralib.Preconditioner(model_of(kind), form)


def balancing(x, y):
    """S with S x S = y for the damped x and y, by another formula: x⁻¹ (x y)^½."""
    x, y = (gram.detach().numpy() + 1e-6 * np.eye(len(gram)) for gram in (x, y))
    return torch.from_numpy(np.linalg.solve(x, sqrtm(x @ y).real))


def test_balancing_shares_a_factor_on_the_right_too():
    model = model_of("lora2", k=2, share_outer=True)
    layers = list(loralib.lora_layers(model).values())
    outer, inners = layers[0].lora_A[0], [layer.lora_A[1] for layer in layers]
    before = {p: p.grad.clone() for p in (outer, *inners)}
    loralib.Preconditioner(model, "balanced").apply()
    s = balancing(sum(a.T @ a for a in inners) / 3, outer @ outer.T)
    torch.testing.assert_close(outer.grad, s @ before[outer], rtol=1e-4, atol=1e-6)
    for inner in inners:
        torch.testing.assert_close(inner.grad, before[inner] @ s.inverse(), rtol=1e-4, atol=1e-6)


def test_balancing_several_scales_changes_every_factor():
    model = model_of("multiscale", widths=(3, 3))
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    loralib.Preconditioner(model, "balanced").apply()
    for layer in loralib.lora_layers(model).values():
        for side in (list(layer.lora_B), list(reversed(layer.lora_A))):
            links = [balancing(x.T @ x, y @ y.T) for x, y in itertools.pairwise(side)]
            for i, factor in enumerate(side):
                expected = before[factor] if i == 0 else links[i - 1] @ before[factor]
                expected = expected if i == len(links) else expected @ links[i].inverse()
                torch.testing.assert_close(factor.grad, expected, rtol=1e-4, atol=1e-6)
