"""Statistics of an update against the dense ΔW."""

import pytest
import torch

import loralib
from loralib.recipes.diagnostics import update_statistics
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
