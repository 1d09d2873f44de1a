"""A layer whose weight another module uses too: GPT-2's output layer and its embedding."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import loralib
from loralib.export import merge_into


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def randomise(model):
    with torch.no_grad():
        for layer in loralib.lora_layers(model).values():
            for parameter in layer.lora_parameters():
                parameter.normal_(std=0.3)


def test_a_merge_that_would_change_the_embedding_is_refused_whole(model, tmp_path):
    tokens, base = torch.arange(8)[None], copy.deepcopy(model)
    loralib.inject(model, "lora2", ["c_attn", "lm_head"], r=4, k=3)
    randomise(model)
    before = model(tokens).logits
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        loralib.merge_adapter(model)
    assert torch.equal(model(tokens).logits, before)
    plain = base(tokens).logits
    with pytest.raises(ValueError, match="tied"):
        merge_into(base, loralib.save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(base(tokens).logits, plain)


def test_a_merge_beside_tied_weights_is_none_of_their_business(model):
    tokens = torch.arange(8)[None]
    loralib.inject(model, "lora2", ["c_attn"], r=4, k=3)
    randomise(model)
    before = model(tokens).logits
    loralib.merge_adapter(model)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_a_lone_layer_merges():
    layer = loralib.LoRA2Linear(6, 5, 4, 16, k=3).eval()
    randomise(layer)
    x = torch.randn(2, 6)
    before = layer(x)
    loralib.merge_adapter(layer)
    torch.testing.assert_close(layer(x), before)
