"""Low-rank layers on quantised weights: torchao's on the CPU, and a stand-in for bitsandbytes' 4-bit layer."""

import pickle

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_execution_device_hook, remove_hook_from_module
from torch import nn

import loralib
from loralib.interop.multi_adapter import MultiAdapter
from loralib.interop.precision import cast_frozen
from tests.loralib.small import Linear4bit, randomise, refused


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32)).requires_grad_(False)


def quantise(model, form):
    """Quantise in place; return a plain copy with the dequantised weights."""
    if form == "4bit":
        model[0], model[2] = Linear4bit(model[0]), Linear4bit(model[2])
    else:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    plain = network()
    for own, other in ((plain[0], model[0]), (plain[2], model[2])):
        own.weight.copy_(other.dequantised() if form == "4bit" else other.weight.dequantize())
    return plain


def adapt(model, kind, **options):
    loralib.inject(model, kind, ["0", "2"], r=4, **options)
    return randomise(model, 0.2, seed=1)


FORMS = pytest.mark.parametrize("form", ["int8", "4bit"])


@FORMS
def test_a_dispatched_model_keeps_its_hooks(form, tmp_path):
    bases = [network() for _ in range(3)]
    for base in bases:
        quantise(base, form)
    plain = adapt(bases[0], "lora2")
    folder = loralib.save_adapter(plain, tmp_path / "adapter")
    for base in bases[1:]:  # transformers adds these hooks to a bitsandbytes model as well
        attach_execution_device_hook(base, "cpu")
    adapt(bases[1], "lora2")
    loralib.load_adapter(bases[2], folder)
    x = torch.randn(5, 64)
    for model in bases[1:]:
        moved = []
        model[0]._hf_hook.pre_forward = lambda _, *args, moved=moved, **kwargs: (moved.append(args) or args, kwargs)
        assert torch.equal(model(x), plain(x)) and len(moved) == 1
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(x), plain(x)) and len(moved) == 1


def test_offloaded_model_is_refused(tmp_path):
    folder = loralib.save_adapter(adapt(network(), "lora2"), tmp_path)
    model = cpu_offload(network(), "cpu")
    for call in (
        lambda: loralib.inject(model, "lora2", ["0", "2"]),
        lambda: loralib.load_adapter(model, folder),
        lambda: MultiAdapter(model).load("a", folder, allow_other_base=True),
    ):
        with refused("accelerate has offloaded 0", model):
            call()


@FORMS
@pytest.mark.parametrize("kind", ["lora", "lora2"])
def test_values_and_gradients_are_those_of_the_dequantised_weight(form, kind):
    """No float32 copy of the weight is kept for the backward pass."""
    model = network()
    plain = adapt(quantise(model, form), kind, lora_dropout=0.5)
    weight = adapt(model, kind, lora_dropout=0.5)[0].weight
    x, kept = torch.randn(5, 3, 64), []
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.manual_seed(1)  # for the dropout
        outputs = [model(inputs[0])]
    torch.manual_seed(1)
    outputs.append(plain(inputs[1]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    assert model[0].weight is weight and weight.grad is None
    if form == "int8":  # torchao's product keeps the int8 values
        assert not any(t.shape == weight.shape and t.dtype == torch.float32 and type(t) is torch.Tensor for t in kept)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-3 * gradient.abs().max().item())


@FORMS
def test_adapter_loads_on_the_same_quantised_base_and_on_no_other(form, tmp_path):
    model, again, plain = network(), network(), network()
    for each in (model, again):
        quantise(each, form)
    adapt(model, "lora2")
    loralib.save_adapter(model, tmp_path / "a")
    for _ in range(2):  # the second time onto its own layers
        loralib.load_adapter(again, tmp_path / "a")
    x = torch.randn(5, 64)
    assert torch.equal(model(x), again(x))
    with pytest.raises(ValueError, match="not those the adapter was trained on"):
        loralib.load_adapter(plain, tmp_path / "a")
    loralib.load_adapter(plain, tmp_path / "a", allow_other_base=True)  # the way to load it on a base in full precision
    loralib.merge_adapter(plain)


def test_a_state_of_microsofts_loralib_loads_beside_a_quantised_weight_and_a_pickled_copy_computes_the_same():
    model = network()
    quantise(model, "4bit")
    loralib.inject(model, "lora", ["0"], r=4, lora_alpha=8)
    b, a = torch.randn(128, 4), torch.randn(4, 64)
    assert not model.load_state_dict({"0.lora_B": b, "0.lora_A": a}, strict=False).unexpected_keys
    torch.testing.assert_close(model[0].delta_weight(), 2 * b @ a)
    copied, x = pickle.loads(pickle.dumps(model)), torch.randn(5, 64)
    assert type(copied[0]) is type(model[0]) and torch.equal(copied(x), model(x))


@FORMS
def test_merge_and_cast_are_refused_and_a_fully_pruned_layer_equals_its_base(form):
    model = network()
    quantise(model, form)
    x = torch.randn(5, 64)
    expected, names = model(x), list(model.state_dict())
    adapt(model, "lora2")
    model.load_state_dict(model.state_dict())
    before = model[0].lora_E.clone()
    with pytest.raises(ValueError, match="0 cannot be merged: the weight is quantised"):
        loralib.merge_adapter(model)
    with pytest.raises(ValueError, match=r"0\.weight is quantised: cast the plain model"):
        cast_frozen(model, torch.bfloat16)
    assert torch.equal(model[0].lora_E, before) and not model[0].merged
    for layer in loralib.lora_layers(model).values():
        layer.keep_singular_values([])
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
