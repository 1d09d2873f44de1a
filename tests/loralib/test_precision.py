"""Frozen weights in bfloat16, all that trains in float32."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import loralib


def small_model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = AutoModelForSequenceClassification.from_config(config)
    loralib.inject(model, "lora2", ["query", "value", "intermediate"], r=4, k=2)
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    return model.eval()


def test_dtypes_gradients_and_closeness_to_float32():
    model = small_model()
    with torch.no_grad():
        for layer in loralib.lora_layers(model).values():
            layer.lora_E.normal_()
    half = copy.deepcopy(model)
    loralib.cast_frozen(half, torch.bfloat16)
    for name, p in half.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 1])
    outputs = [m(input_ids=ids, labels=labels) for m in (model, half)]
    assert outputs[1].logits.dtype == torch.float32
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=0.02)
    for m, output in zip((model, half), outputs, strict=True):
        output.loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in m.classifier.parameters())
    full = [p.grad for p in model.parameters() if p.requires_grad]
    cast = [p.grad for p in half.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 for g in cast)
    error = sum((a - b).square().sum() for a, b in zip(full, cast, strict=True)) / sum(a.square().sum() for a in full)
    assert error.sqrt() < 0.05


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="floating"):
        loralib.cast_frozen(small_model(), torch.int8)
