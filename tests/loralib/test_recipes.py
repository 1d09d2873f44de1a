"""Statistics of an update against the dense ΔW, and learning rates of parts."""

import pytest
import torch
from torch import nn

import loralib
from loralib.recipes.diagnostics import update_statistics
from loralib.recipes.learning_rates import parameter_groups
from tests.loralib.small import blocks, factors_of


@pytest.mark.parametrize(
    "kind, options", [("lora", {}), ("adalora", {}), ("lora2", {"k": 3, "share_outer": True}), ("lora2", {"k": 1})]
)
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
    grams = [f @ f.T if f.shape[0] <= f.shape[1] else f.T @ f for f in factors_of(model)]
    expected = max(float(torch.linalg.matrix_norm(g - torch.eye(len(g)))) for g in grams)
    assert found.deviation == pytest.approx(expected, rel=1e-4)


def one_layer(kind, features, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(*features), "head": nn.Linear(features[1], 2)})
    loralib.inject(model, kind, ["q"], lora_alpha=16, **options)
    loralib.mark_only_lora_as_trainable(model)
    return model


def rates(groups):
    return {id(p): group["lr"] for group in groups for p in group["params"]}


def test_every_trainable_parameter_once_with_its_rate():
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(6, 6)}) for i in range(3)} | {"head": nn.Linear(6, 2)})
    loralib.inject(model, "lora2", ["q"], r=2, k=3, share_outer=True)
    loralib.mark_only_lora_as_trainable(model)
    model["head"].requires_grad_(True)
    groups = parameter_groups(model, 1e-3, value_lr_ratio=4, head_lr=5e-4)
    listed = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    found = rates(groups)
    layer = model["0"]["q"]
    assert found[id(layer.lora_E)] == pytest.approx(4e-3)
    assert found[id(layer.lora_B[0])] == found[id(layer.lora_A[1])] == pytest.approx(1e-3)
    assert found[id(model["head"].weight)] == pytest.approx(5e-4)


def test_lora_plus():
    model = one_layer("lora", (6, 6))
    found = rates(parameter_groups(model, 1e-3, b_lr_ratio=16))
    assert found == {id(model["q"].lora_B[0]): pytest.approx(1.6e-2), id(model["q"].lora_A[0]): pytest.approx(1e-3)}


def test_a_rate_for_a_head_that_is_frozen_is_refused():
    with pytest.raises(ValueError, match="unfreeze the head"):
        parameter_groups(one_layer("lora", (6, 6)), 1e-3, head_lr=1e-3)
