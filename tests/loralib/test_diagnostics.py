"""Statistics of an update against the dense ΔW."""

import pytest
import torch
from torch import nn

import loralib


@pytest.mark.parametrize(
    "kind, options", [("lora", {}), ("adalora", {}), ("lora2", {"k": 3, "share_outer": True}), ("lora2", {"k": 1})]
)
def test_statistics_agree_with_the_dense_update(kind, options):
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(7, 5 + i // 2)}) for i in range(4)})
    loralib.inject(model, kind, ["q"], r=4, **options)
    layers = loralib.lora_layers(model)
    with torch.no_grad():
        for p in {id(p): p for layer in layers.values() for p in layer.lora_parameters()}.values():
            p.normal_()
        if kind != "lora":
            layers["1.q"].lora_E[2:] = 0
    found = loralib.update_statistics(model)
    for name, layer in layers.items():
        dense = torch.linalg.matrix_norm(layer.delta_weight().detach().double())
        assert found.delta_norms[name] == pytest.approx(float(dense), rel=1e-5)
    if kind == "lora":
        assert found.largest_value is found.smallest_value is found.deviation is None
        return
    values = torch.cat([layer.lora_E.detach().abs() for layer in layers.values()])
    assert found.largest_value == float(values.max()) and found.smallest_value == float(values[values > 0].min())
    factors = [f.detach() for layer in layers.values() for f in [*layer.lora_B, *layer.lora_A]]
    grams = [f @ f.T if f.shape[0] <= f.shape[1] else f.T @ f for f in factors]
    expected = max(float(torch.linalg.matrix_norm(g - torch.eye(len(g)))) for g in grams)
    assert found.deviation == pytest.approx(expected, rel=1e-4)


def test_at_the_start_nothing_is_live():
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    loralib.inject(model, "lora2", ["q"], r=2, init="orthogonal")
    found = loralib.update_statistics(model)
    assert found.delta_norms == {"q": 0.0} and found.largest_value is None and found.deviation < 1e-5
