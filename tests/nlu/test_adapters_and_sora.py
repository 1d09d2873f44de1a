"""Bottleneck adapters and SoRA's gates, checked against their formulas."""

import math

import numpy as np
import pytest
import torch

import loralib
from loralib.interop.precision import cast_frozen
from nlu.methods._bottleneck_layer import BottleneckAdapter
from nlu.methods.bottleneck import add_adapters
from nlu.methods.registry import METHODS, method_arguments
from tests.loralib import small
from tests.nlu.tiny import SHAPES, SIZES

INPUT = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 8, 3, 0]])


def test_adapter_starts_near_the_identity_and_computes_the_papers_formula():
    torch.manual_seed(1)
    adapter = BottleneckAdapter(64, 16, torch.nn.GELU)
    down, up = adapter.down, adapter.up
    assert max(layer.weight.abs().max() for layer in (down, up)) <= 0.02
    x = torch.randn(5, 64)
    assert 0 < (adapter(x) - x).abs().max() < 0.05
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = (x @ down.weight.T + down.bias).detach().double().numpy()
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = x.double().numpy() + gelu @ up.weight.detach().double().numpy().T + up.bias.detach().double().numpy()
    np.testing.assert_allclose(adapter(x).detach().numpy(), expected, atol=1e-5)
    # If the base weights are bfloat16, it computes in float32.
    half = x.bfloat16()
    expected = half + (adapter(half.float()) - half.float()).bfloat16()
    cast_frozen(torch.nn.Sequential(torch.nn.Linear(64, 64).requires_grad_(False), adapter), torch.bfloat16)
    assert torch.equal(adapter(half), expected)


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("kind, a_layer", [("hadapter", 2), ("padapter", 1)])
def test_adapters_are_placed_as_in_their_papers(model_type, kind, a_layer):
    model = small.encoder(model_type, SIZES | SHAPES[model_type])
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapters = add_adapters(model, kind, 4)
    assert len(adapters) == 2 * a_layer
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    # After the feed-forward network's projection: LN(x + adapter(projection)) with x of the attention block, or
    # LN(z + adapter(LN(z)) - LN(z)) with z = x + projection.
    block = model.base_model.encoder.layer[1].output

    def norm(z):
        return torch.nn.LayerNorm.forward(block.LayerNorm, z)

    seen = {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, output=output))
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up.weight, std=0.5)
    model(INPUT)
    hidden, residual = seen["inputs"]
    z = residual + block.dense(hidden)
    if kind == "hadapter":
        expected = norm(residual + adapters[-1](block.dense(hidden)))
    else:
        expected = norm(z + adapters[-1](norm(z)) - norm(z))
    torch.testing.assert_close(seen["output"], expected)


# ---- SoRA ----------------------------------------------------------------------------------------------------------


def apply_sora(model, modules, **flags):
    return METHODS["sora"].apply(model, method_arguments("sora", lora_module=modules, **flags), 0)


def test_sora_starts_at_the_base_with_random_gates():
    model = small.encoder()
    expected = model(INPUT).logits
    apply_sora(model, "query,value", lora_r=3, lora_alpha=6.0)
    assert torch.equal(model(INPUT).logits, expected)
    for layer in loralib.lora_layers(model).values():
        assert layer.lora_E.std() > 0.05 and not layer.lora_B[0].any() and layer.scaling == 2.0


def test_gates_that_a_warm_start_finds_pruned_can_grow_again(tmp_path):
    model, start = small.encoder(), small.encoder()
    apply_sora(model, "query", lora_r=4, lora_alpha=8.0)
    apply_sora(start, "query", lora_r=4)
    before = {name: layer.lora_E.detach().clone() for name, layer in loralib.lora_layers(start).items()}
    for layer in loralib.lora_layers(model).values():
        layer.lora_E.data[1:3] = 0
    loralib.start_from_adapter(start, loralib.save_adapter(model, tmp_path / "a"))
    for name, layer in loralib.lora_layers(start).items():
        assert torch.equal(layer.lora_E[1:3], before[name][1:3]) and not layer.lora_B[0][:, 1:3].any()
        torch.testing.assert_close(layer.delta_weight(), model.get_submodule(name).delta_weight())


def test_sora_gates_follow_a_proximal_gradient_reference():
    """SGD on ½‖g − c‖² with the proximal step equals a NumPy loop of the paper's update and reaches its limit T(c, λ).

    The threshold is λ times the gates' own learning rate; the other parameters have a different rate.
    """
    model = small.encoder()
    gates = apply_sora(model, "query", lora_r=4, lora_alpha=4.0, sora_lambda=0.5)
    layer = next(iter(loralib.lora_layers(model).values()))
    values = [each.lora_E for each in loralib.lora_layers(model).values()]
    others = [p for p in model.parameters() if all(p is not e for e in values)]
    optimizer = torch.optim.SGD([{"params": others, "lr": 9.0}, {"params": values, "lr": 0.1}])
    target = np.array([1.5, -0.3, 0.4, -2.0])
    reference = layer.lora_E.detach().double().numpy().copy()
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (layer.lora_E - torch.tensor(target)) ** 2).sum().backward()
        gates.step(optimizer)
        step = reference - 0.1 * (reference - target)
        reference = np.sign(step) * np.maximum(np.abs(step) - 0.05, 0)
        np.testing.assert_allclose(layer.lora_E.detach().numpy(), reference, atol=1e-5)
    np.testing.assert_allclose(reference, [1.0, 0, 0, -1.5], atol=1e-6)
    name = next(iter(gates.ranks.pattern))
    assert gates.ranks.pattern[name] == [True, False, False, True]
    assert gates.ranks.live == sum(int((x.lora_E != 0).sum()) for x in loralib.lora_layers(model).values())
