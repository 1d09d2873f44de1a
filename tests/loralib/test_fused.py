"""The fused layer in every mode that training may use; test_layers.py compares its values with the formula."""

import pytest
import torch
from torch import nn

import loralib
from loralib import fused
from loralib.fused import adapted_linear, product
from tests.loralib.small import randomise, trainable


@pytest.mark.parametrize("without", [{"dropped": None}, {"bias": None}])
def test_first_and_second_derivatives_equal_finite_differences(without):
    torch.manual_seed(0)
    shapes = {"x": (3, 4), "weight": (3, 4), "bias": (3,), "a": (2, 4), "b": (3, 2), "dropped": (3, 4)}
    names = [name for name in shapes if name not in without]
    leaves = [torch.randn(shapes[name], dtype=torch.float64, requires_grad=True) for name in names]

    def run(*leaves):
        return adapted_linear(**dict(zip(names, leaves, strict=True)), **without)

    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("shape", [(300, 200, 100), (64, 768, 8), (1, 1, 1)])
def test_float32_products_agree_with_float64(shape):
    n, k, m = shape
    x, weight, bias = torch.randn(n, k), torch.randn(m, k), torch.randn(m)
    with torch.no_grad():
        for left, right, offset in ((x, weight, bias), (x, weight, None), (x.T, torch.randn(n, m).T, None)):
            expected = left.double() @ right.double().T + (0 if offset is None else offset.double())
            torch.testing.assert_close(product(left, right, offset).double(), expected, rtol=1e-4, atol=1e-4)


def test_weight_that_is_a_part_of_a_wider_matrix_is_not_given_to_onednn(monkeypatch):
    monkeypatch.setattr(fused, "_ONEDNN", True)
    x, weight = torch.randn(300, 100), torch.randn(200, 150)
    with torch.no_grad():
        parts = (weight[:, :100], torch.randn(150, 200)[:100].T, weight[:, :100].contiguous())
        assert [fused.uses_onednn(x, part) for part in parts] == [False, True, True]


def test_products_are_not_given_to_onednn_by_a_processor_without_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not fused._onednn_is_faster()


def gradients(layer, run):
    layer.zero_grad()
    run(layer).float().square().sum().backward()
    return [p.grad for p in layer.lora_parameters()]


@pytest.mark.parametrize("widths", [(), (3,), (4, 2)])
def test_gradients_under_autocast_are_near_float32(widths):
    torch.manual_seed(1)
    layer = randomise(loralib.MultiScaleLinear(16, 24, 4, 8, widths=widths), 0.3)
    model, x = nn.Sequential(layer), torch.randn(6, 16)
    options = {"allow_unused": True, "materialize_grads": True}
    exact = gradients(layer, lambda m: m(x))
    regularised = torch.autograd.grad(loralib.compute_orth_regu(model), layer.lora_parameters(), **options)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):  # as the Trainer does it: losses inside, the backward pass outside
        value, loss = loralib.compute_orth_regu(model), layer(x).float().square().sum()
    loss.backward()
    cast = [p.grad for p in layer.lora_parameters()]
    torch.testing.assert_close(torch.autograd.grad(value, layer.lora_parameters(), **options), regularised)
    for mine, theirs in zip(cast, exact, strict=True):
        assert mine.dtype == torch.float32 and (mine - theirs).norm() < 0.03 * theirs.norm()


def test_loras_scaling_is_not_rounded_to_half_precision():
    """Each value is rounded, but together they keep the factor 16/6, whose bfloat16 is 0.2 % off."""
    torch.manual_seed(1)
    layer, x = randomise(loralib.Linear(64, 64, 6, 16)), torch.randn(512, 64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    exact = x @ layer.delta_weight().T
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x).float()
    assert abs((out * exact).sum() / exact.square().sum() - 1) < 5e-4


@pytest.mark.parametrize("widths", [(), (3,), (20,), (20, 3), (2, 20)])
def test_only_the_input_and_hidden_values_of_the_narrowest_width_are_saved_for_backward(widths):
    layer, x = randomise(loralib.MultiScaleLinear(16, 24, 4, 8, widths=widths)), torch.randn(50, 16)
    own = {id(p) for p in layer.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    of_tokens = {tuple(t.shape) for t in kept if id(t) not in own and len(t) == 50}
    assert of_tokens == {(50, 16), (50, min(4, *widths, 4))}


KINDS = [("lora", {}), ("adalora", {}), ("lora2", {"k": 2}), ("lora2", {"k": 6}), ("multiscale", {"widths": (5, 2)})]


@pytest.mark.parametrize("kind, options", KINDS)
def test_torch_func_gives_the_gradients_of_each_row(kind, options):
    torch.manual_seed(1)
    layer, x = randomise(loralib.injection.KINDS[kind](16, 24, 4, 8, **options), 0.3), torch.randn(6, 16)
    names = {p: name for name, p in layer.named_parameters()}
    factors = {names[p]: p.detach() for p in layer.lora_parameters()}

    def loss(factors, row):
        return torch.func.functional_call(layer, factors, row).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, x)
    for i, row in enumerate(x):
        expected = dict(zip(factors, gradients(layer, lambda m, row=row: m(row)), strict=True))
        torch.testing.assert_close({n: t[i] for n, t in found.items()}, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind, options", KINDS)
def test_the_compilers_default_backend_agrees_with_eager(kind, options, dynamic):
    """With α ≠ r and an input that requires a gradient, also for dynamic shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))
    loralib.inject(model, kind, ["0", "2"], r=3, lora_alpha=7.0, **options)
    randomise(model, 0.5)
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    for rows in (5, 9) if dynamic else (5,):
        x = torch.randn(rows, 3, 12, requires_grad=True)
        leaves = [x, *trainable(model)]
        results = []
        for run in (model, compiled):
            out = run(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
