"""Preconditioned gradients against formulas on whole matrices, layer by layer."""

import pytest
import torch
from torch import nn

import loralib


def model_of(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(7, 6, dtype=dtype)}) for i in range(3)})
    loralib.inject(model, kind, ["q"], r=3, **options)
    for p in {id(p): p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()}.values():
        nn.init.normal_(p)
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
    expected = {p: g.clone() for p, g in expected.items()}
    loralib.Preconditioner(model, "riemannian").apply()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-9)  # k > r: damped singular Grams


@pytest.mark.parametrize("kind, options", [c for c in CHAINS if c[0] != "adalora"])
@pytest.mark.parametrize("form", ["balanced", "balanced_scalar"])
def test_balanced_is_the_step_of_the_balanced_pair(kind, options, form):
    """With M M^T = S, X M and M^-1 Y have equal Grams (in the scalar form: equal norms)."""
    model = model_of(kind, **options)
    before = {p: p.grad.clone() for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()}
    loralib.Preconditioner(model, form).apply()
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
                if form == "balanced":
                    torch.testing.assert_close(s @ (x.T @ x) @ s, y @ y.T, rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(s, s.T, rtol=1e-6, atol=1e-8)
                else:
                    ratio = (y.norm() / x.norm()).item()
                    torch.testing.assert_close(s, torch.eye(len(s), dtype=s.dtype) * ratio, rtol=1e-4, atol=1e-6)
                if last is not None:
                    torch.testing.assert_close(last.grad, s @ before[last], rtol=1e-6, atol=1e-8)
        if layer.lora_E is not None:
            assert torch.equal(layer.lora_E.grad, before[layer.lora_E])


@pytest.mark.parametrize("form", ["balanced", "balanced_scalar", "riemannian"])
def test_a_balanced_step_does_not_depend_on_the_split(form):
    """dΔW = g_B' A + B g_A' is the same for (B, A) and (B M, M⁻¹ A), M scalar for the scalar form."""
    torch.manual_seed(1)
    model = model_of("lora")
    matrix = torch.eye(3, dtype=torch.float64) * 2
    if form != "balanced_scalar":
        matrix = matrix + 0.3 * torch.randn(3, 3, dtype=torch.float64)
    layer = model["0"]["q"]
    weight_gradient = torch.randn(6, 7, dtype=torch.float64)
    steps = []
    for split in (torch.eye(3, dtype=torch.float64), matrix):
        with torch.no_grad():
            layer.lora_B[0].copy_(layer.lora_B[0] @ split)
            layer.lora_A[0].copy_(torch.linalg.inv(split) @ layer.lora_A[0])
        b, a = layer.lora_B[0].detach(), layer.lora_A[0].detach()
        layer.lora_B[0].grad, layer.lora_A[0].grad = weight_gradient @ a.T, b.T @ weight_gradient
        loralib.Preconditioner(model, form, damping=1e-12).apply()
        steps.append(layer.lora_B[0].grad @ a + b @ layer.lora_A[0].grad)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["balanced", "balanced_scalar", "riemannian"])
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
    elif form == "balanced_scalar":
        mean = (sum(layer.lora_B[1].square().sum() for layer in layers) / 3).sqrt()
        torch.testing.assert_close(outer.grad, before * (outer.norm() / mean), rtol=1e-4, atol=1e-6)
    else:
        s = torch.linalg.inv(torch.linalg.lstsq(before, outer.grad)[0])
        mean = sum(layer.lora_B[1] @ layer.lora_B[1].T for layer in layers) / 3
        torch.testing.assert_close(s @ (outer.T @ outer) @ s, mean, rtol=1e-3, atol=1e-4)


def test_a_factor_without_a_gradient_keeps_none():
    model = model_of("lora2", k=4)
    layer = model["1"]["q"]
    for p in layer.lora_parameters():
        p.grad = None
    loralib.Preconditioner(model, "riemannian").apply()
    assert all(p.grad is None for p in layer.lora_parameters())


@pytest.mark.parametrize("kind, form, message", [
    ("adalora", "balanced", "e lies between"),
    ("lora", "natural", "kind must be"),
])  # fmt: skip
def test_what_means_nothing_is_refused(kind, form, message):
    with pytest.raises(ValueError, match=message):
        loralib.Preconditioner(model_of(kind), form)
