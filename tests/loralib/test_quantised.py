"""Low-rank layers on weights that torchao has quantised, and on layers that accelerate has offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

import loralib
from loralib.interop.peft_method import LoRA2Config
from loralib.interop.precision import cast_frozen
from tests.loralib.small import randomise, refused

X = torch.linspace(-2, 2, 5 * 64).view(5, 64).sin()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32)).requires_grad_(False)


def quantised():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model := network(), torchao.Int8WeightOnlyConfig())
    return model


def adapt(model, kind="lora2", **options):
    loralib.inject(model, kind, ["0", "2"], r=4, **options)
    return randomise(model, 0.2, seed=1)


def test_offloaded_model_is_refused(tmp_path):
    """Its layers have no values: accelerate's replaced forward method loads them at each call."""
    folder = loralib.save_adapter(adapt(network()), tmp_path)
    model = cpu_offload(network(), "cpu")
    for call in (lambda: adapt(model), lambda: loralib.load_adapter(model, folder)):
        with refused("the forward method of 0 was replaced", model):
            call()
    in_peft = get_peft_model(model, LoRA2Config(target_modules=["0", "2"]))
    with pytest.raises(RuntimeError, match="without offloading"):
        in_peft(X)


@pytest.mark.parametrize("kind", ["lora", "lora2"])
def test_values_and_gradients_are_those_of_the_dequantised_weight(kind):
    """No float32 copy of the weight is kept for the backward pass."""
    model, plain = quantised(), network()
    for own, other in ((plain[0], model[0]), (plain[2], model[2])):
        own.weight.copy_(other.weight.dequantize())
    weight = adapt(model, kind, lora_dropout=0.5)[0].weight
    adapt(plain, kind, lora_dropout=0.5)
    kept, inputs = [], [X.clone().requires_grad_(), X.clone().requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(1)  # for the dropout
        outputs = [model(inputs[0])]
    torch.manual_seed(1)
    outputs.append(plain(inputs[1]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    assert model[0].weight is weight and weight.grad is None
    # torchao's product keeps the int8 values
    assert not any(t.shape == weight.shape and t.dtype == torch.float32 and type(t) is torch.Tensor for t in kept)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-3 * gradient.abs().max().item())


def test_adapter_loads_on_the_same_quantised_base_and_on_no_other(tmp_path):
    model, again, plain = adapt(quantised()), quantised(), network()
    loralib.save_adapter(model, tmp_path / "a")
    for _ in range(2):  # the second time onto its own layers
        loralib.load_adapter(again, tmp_path / "a")
    assert torch.equal(model(X), again(X)) and torch.equal(copy.deepcopy(again)(X), again(X))
    with pytest.raises(ValueError, match="not those the adapter was trained on"):
        loralib.load_adapter(plain, tmp_path / "a")
    loralib.load_adapter(plain, tmp_path / "a", allow_other_base=True)  # the way to load it on a base in full precision
    loralib.merge_adapter(plain)


def test_merge_and_cast_are_refused_and_a_fully_pruned_layer_equals_its_base():
    model = quantised()
    expected, names = model(X), list(model.state_dict())
    adapt(model)
    model.load_state_dict(model.state_dict())
    before = model[0].lora_E.clone()
    with refused("0 cannot be merged: the weight is quantised"):
        loralib.merge_adapter(model)
    with refused(r"0\.weight is quantised: cast the plain model"):
        cast_frozen(model, torch.bfloat16)
    assert torch.equal(model[0].lora_E, before) and not model[0].merged
    for layer in loralib.lora_layers(model).values():
        layer.keep_singular_values([])
    assert torch.equal(model(X), expected) and list(model.state_dict()) == names
