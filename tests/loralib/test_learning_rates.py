"""Learning rates of parts."""

import pytest
import torch
from torch import nn

import loralib
from loralib.recipes.learning_rates import parameter_groups


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
