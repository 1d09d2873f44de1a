"""Frozen weights in bfloat16, trainable parameters in float32."""

import copy

import pytest
import torch
from torch import nn

import loralib
from loralib.interop.precision import cast_frozen
from tests.loralib.small import adapted, encoder, randomise, refused

IDS = torch.arange(24).reshape(4, 6) % 20


def test_cast_before_inject_keeps_the_head_and_the_later_factors_in_float32():
    """The documented order is cast, quantise, inject. Before inject nothing is frozen, except what the model's own code
    freezes, such as Whisper's positions."""
    model = encoder()
    model.bert.embeddings.requires_grad_(False)
    expected = model(IDS).logits
    cast_frozen(model, torch.bfloat16, head=model.classifier)
    loralib.inject(model, "lora2", ["query", "intermediate"], r=4)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if ".lora_" in name or name.startswith("classifier")}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    logits = model(IDS).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    logits.sum().backward()


# ---- other trainable parameters ------------------------------------------------------------------------------------


def trained(kind="lora2", modules=("query", "intermediate"), also=("classifier",)):
    """An encoder whose factors train, and every parameter that has an entry of ``also`` in its name."""
    model = encoder()
    loralib.inject(model, kind, list(modules), r=4)
    randomise(model, 0.3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in also):
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("options", [
    {"kind": "lora", "also": ("bias",)}, {"kind": "adalora"}, {"also": ("query.bias",), "modules": ("all-linear",)},
    {"also": ("embeddings",)}, {"also": ("classifier", "1.attention", "Norm")}, {"also": ("query.weight", "Norm.bias")},
])  # fmt: skip
def test_any_module_may_be_adapted_and_any_parameter_may_train(options):
    """Gradients are float32, finite and within 5 % of the float32 model's."""
    model = trained(**options)
    half = copy.deepcopy(model)
    cast_frozen(half, torch.bfloat16, head=half.classifier)
    outputs = [m(IDS).logits for m in (model, half)]
    assert outputs[1].dtype == torch.float32
    torch.testing.assert_close(*outputs, rtol=0, atol=0.05)
    for output in outputs:
        output.square().sum().backward()
    pairs = [(name, p, half.get_parameter(name)) for name, p in model.named_parameters() if p.requires_grad]
    for name, full, cast in pairs:
        assert cast.dtype == cast.grad.dtype == torch.float32 and cast.grad.isfinite().all(), name
        assert not (full.grad.abs() > 1e-3).any() or cast.grad.any(), name
    assert all(half.get_parameter(name).grad is None for name, p in model.named_parameters() if not p.requires_grad)
    error = sum((full.grad - cast.grad).square().sum() for _, full, cast in pairs)
    assert error.sqrt() < 0.05 * sum(full.grad.square().sum() for _, full, _ in pairs).sqrt()
    for name, module in half.named_modules():
        if isinstance(module, loralib.LoRALayer) and not module.weight.requires_grad:
            assert module.weight.dtype == torch.bfloat16, name  # the large weight is cast even if its bias trains


def test_repeated_cast_changes_only_what_was_frozen_or_unfrozen_since():
    once, twice = (trained(also=("classifier", "Norm")) for _ in range(2))
    cast_frozen(once, torch.bfloat16, once.classifier)
    for _ in range(3):
        cast_frozen(twice, torch.bfloat16, twice.classifier)
    assert torch.equal(once(IDS).logits, twice(IDS).logits)
    assert [len(m._forward_hooks) for m in once.modules()] == [len(m._forward_hooks) for m in twice.modules()]
    twice.bert.encoder.requires_grad_(False)
    twice.bert.embeddings.requires_grad_(True)
    cast_frozen(twice, torch.bfloat16, twice.classifier)
    assert twice.bert.encoder.layer[0].output.LayerNorm.weight.dtype == torch.bfloat16
    twice(IDS).logits.sum().backward()
    assert twice.bert.embeddings.LayerNorm.weight.grad.dtype == torch.float32


class ByKeyword(nn.Sequential):
    """Calls its modules with a keyword argument, as XLM-R calls its head."""

    def forward(self, x):
        for module in self:
            x = module(input=x)
        return x


@pytest.mark.parametrize(
    "stem", [nn.Linear(16, 16), nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 1, 1), nn.Flatten())]
)
def test_inputs_of_the_model_may_be_floating_point(stem):
    model = ByKeyword(copy.deepcopy(stem), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    loralib.inject(model, "lora2", ["1"], r=2, k=2)
    model[3].requires_grad_(True)
    x = torch.randn(5, 16)
    expected = model(x)
    cast_frozen(model, torch.bfloat16, model[3])
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)
    model(x).sum().backward()
    assert model[1].lora_E.grad.dtype == torch.float32


def test_merge_works_beside_a_float32_bias_and_a_merged_model_is_not_cast():
    model = trained(also=("classifier", "bias"))
    cast_frozen(model, torch.bfloat16, model.classifier)
    with torch.no_grad():
        before = model(IDS).logits
        loralib.merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0.05)
    with refused("unmerge before the cast", model):
        cast_frozen(model, torch.bfloat16, model.classifier)


def test_pooler_inside_the_encoder_may_be_part_of_the_head():
    """BERT's trained pooler is inside the encoder. Its output reaches the classifier without rounding to bfloat16."""
    model = adapted("lora2", ["query", "value"], 4, encoder(), "bert.pooler", k=2)
    cast_frozen(model, torch.bfloat16, [model.bert.pooler, model.classifier])
    seen = []
    model.bert.pooler.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert model(IDS).logits.dtype == torch.float32 and seen == [torch.float32]
