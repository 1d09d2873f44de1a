"""Layers against the formulas of METHOD, written out densely, and against peft."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import loralib
from tests.loralib.small import randomise, refused

# "lora", or the widths of a multi-scale layer.
SCALES = ["lora", (), (1,), (3,), (8,), (4, 2), (5, 4, 3)]


def random_layer(scales, **options):
    if scales == "lora":
        return randomise(loralib.Linear(11, 7, 4, 12.0, **options))
    return randomise(loralib.MultiScaleLinear(11, 7, 4, 12.0, widths=scales, **options))


def dense_delta(layer):
    """s · B₀ … diag(e) … A₀, multiplied out from left to right in float64."""
    product = torch.eye(layer.out_features, dtype=torch.float64)
    for factor in layer.lora_B:
        product = product @ factor.double()
    if layer.lora_E is not None:
        product = product @ torch.diag(layer.lora_E.double())
    for factor in reversed(list(layer.lora_A)):
        product = product @ factor.double()
    return product * layer.lora_alpha / layer.r


@pytest.mark.parametrize("scales", SCALES)
def test_forward_and_gradients_equal_the_dense_formula(scales):
    """test_export.py and test_decoders.py have peft's layers with the same factors."""
    layer = random_layer(scales)
    x = torch.randn(2, 5, 11, requires_grad=True)
    weight = torch.randn(2, 5, 7)
    out = layer(x)
    (out * weight).sum().backward()
    got = [p.grad.clone() for p in layer.lora_parameters()] + [x.grad.clone()]

    layer.zero_grad()
    x64 = x.detach().double().requires_grad_()
    expected = x64 @ (layer.weight.double() + dense_delta(layer)).T + layer.bias.double()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(got, [p.grad for p in layer.lora_parameters()] + [x64.grad], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.delta_weight().double(), dense_delta(layer), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_initialisation(init):
    torch.manual_seed(0)
    layer = loralib.LoRA2Linear(500, 400, 8, 16, k=8, init=init)
    assert torch.equal(layer.delta_weight(), torch.zeros(400, 500))
    for factor in [*layer.lora_B, *layer.lora_A]:
        if init == "gaussian":
            if factor.numel() > 1000:
                assert abs(factor.std().item() - 0.02) < 0.001 and abs(factor.mean().item()) < 0.002
        else:
            tall = factor if factor.shape[0] >= factor.shape[1] else factor.T
            torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_explicit_idempotent_and_undone_exactly(scales, dtype):
    layer = random_layer(scales)
    layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)
    x = torch.randn(3, 11, dtype=dtype)
    before, out = layer.weight.clone(), layer(x)
    for switch in (layer.train, layer.eval):
        assert switch() is layer and not layer.merged and torch.equal(layer.weight, before)
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert layer.merged and torch.equal(layer.weight, once) and not torch.equal(once, before)
    error = (layer(x) - out).float().norm() / out.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)
    assert set(layer.state_dict()) >= {"weight"} and "_weight_before_merge" not in layer.state_dict()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.train()(x)
    layer.eval()
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before) and torch.equal(layer(x), out)


def test_a_square_weight_that_is_stored_the_other_way_round_is_told_by_its_module():
    stored = Conv1D(5, 5)
    nn.init.normal_(stored.bias)
    layer, x = loralib.LoRA2Linear.from_linear(stored, 4, 8, k=3), torch.randn(2, 5)
    nn.init.normal_(layer.lora_E)
    torch.testing.assert_close(layer(x), stored(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize("arguments", [
    {"r": 0}, {"r": 2.5}, {"k": 0}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.0}, {"init": "zeros"},
])  # fmt: skip
def test_values_out_of_range_are_refused(arguments):
    with refused():
        loralib.LoRA2Linear(4, 3, **({"r": 2, "lora_alpha": 4} | arguments))


def test_dropout_acts_on_the_update_only():
    torch.manual_seed(0)
    layer = random_layer((3,), lora_dropout=0.5)
    x = torch.randn(4000, 11)
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    update = layer(x) - frozen
    kept = nn.functional.linear(x, layer.delta_weight())
    assert not torch.allclose(update, kept, atol=1e-3)
    slope = (update * kept).sum() / (kept * kept).sum()  # dropout rescales: right on average
    assert abs(slope.item() - 1) < 0.05
    layer.eval()
    torch.testing.assert_close(layer(x) - frozen, kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", SCALES)
def test_selected_singular_values_make_up_the_update_and_go_back_to_their_places(scales):
    layer = random_layer(scales).double()  # in float32 the sum of the parts misses by rounding in some draws
    before = [p.detach().clone() for p in layer.lora_parameters()]
    kept, others = [1, 3], [0, 2]
    parts = []
    for indices in (kept, others):
        part = copy.deepcopy(layer)
        part.keep_singular_values(indices)
        assert all(torch.equal(p, t) for p, t in zip(part.lora_parameters(), layer.select(indices), strict=True))
        parts.append(part.delta_weight())
    torch.testing.assert_close(sum(parts), layer.delta_weight())
    selected = [t.clone() for t in layer.select(kept)]
    with torch.no_grad():
        for p, axis in zip(layer.lora_parameters(), layer.singular_axes(), strict=True):
            p.index_fill_(axis, torch.tensor(kept), 0) if axis is not None else p.zero_()
    layer.scatter(kept, selected)
    assert all(torch.equal(p, t) for p, t in zip(layer.lora_parameters(), before, strict=True))
    assert [t.shape[axis] for t, axis in zip(layer.select([]), layer.singular_axes(), strict=True) if axis is not None]


def test_a_merged_layer_that_moves_takes_its_own_weight_along():
    layer, x = random_layer((3,)), torch.randn(3, 11, dtype=torch.float64)
    before = layer.weight.double()
    layer.merge()
    layer.double().unmerge()
    assert torch.equal(layer.weight, before) and layer(x).dtype == torch.float64


def test_factors_without_values_are_not_computed_with():
    with torch.device("meta"):
        layer = loralib.LoRA2Linear(11, 7, 4, 12.0)
    layer.load_state_dict(nn.Linear(11, 7).state_dict(), strict=False, assign=True)
    with pytest.raises(RuntimeError, match="on the meta device and have no values"):
        layer(torch.ones(2, 11))
    assert layer.to("meta")(torch.ones(2, 11, device="meta")).shape == (2, 7)
