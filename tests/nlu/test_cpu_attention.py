"""The CPU attention against transformers' own `sdpa`, on the encoders that use the attention interface."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from nlu.fast import speed_up
from nlu.fast.cpu_attention import NAME, cpu_attention, disable_cpu_attention, enable_cpu_attention


def build(kind="bert", dropout=0.0, **extra):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
        **extra,
    )
    return AutoModelForSequenceClassification.from_config(config, **extra)


def batch(lengths=(11, 4, 7)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


def loss_and_grads(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [(11, 4, 7), (8, 8, 8)], ids=["padded", "whole"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta"])
def test_logits_and_gradients_equal_transformers_sdpa(kind, lengths):
    model, inputs = build(kind).train(), batch(lengths)
    expected_loss, expected = loss_and_grads(model, inputs)
    assert enable_cpu_attention(model) and model.config._attn_implementation == NAME
    loss, grads = loss_and_grads(model, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=float(1e-6 * largest), msg=name)


def test_bfloat16_is_as_near_to_float32_as_sdpa_is():
    """The reference works in float32 inside; what is kept in bfloat16 here may not cost more than its own rounding."""
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 3, 16, 8) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = False
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    half = [states.bfloat16() for states in (query, key, value)]
    ours = cpu_attention(module, *half, None)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 4 * 2**-8 * value.abs().max()


def test_dropout_keeps_the_expectation_and_follows_the_seed():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = False
    exact = cpu_attention(module, query, key, value, None)[0]
    torch.manual_seed(5)
    draws = [cpu_attention(module, query, key, value, None, dropout=0.3)[0] for _ in range(2000)]
    torch.manual_seed(5)
    assert torch.equal(draws[0], cpu_attention(module, query, key, value, None, dropout=0.3)[0])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=0, atol=0.08)


def test_what_is_not_covered_goes_to_sdpa(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "nlu.fast.cpu_attention.sdpa_attention_forward", lambda *a, **k: asked.append(a) or (a[1], None)
    )
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    causal, plain = torch.nn.Module(), torch.nn.Module()
    causal.is_causal, plain.is_causal = True, False
    cpu_attention(causal, query, key, value, None)
    cpu_attention(plain, query, key[:, :1], value[:, :1], None)
    cpu_attention(plain, query, key, value, torch.zeros(1, 1, 5, 5))
    cpu_attention(plain, query, key, value, None, position_bias=torch.zeros(1, 2, 5, 5))
    assert len(asked) == 4
    cpu_attention(plain, query, key, value, None, is_causal=False)
    assert len(asked) == 4


def test_enabling_is_undone_and_leaves_other_implementations_alone(tmp_path):
    model = build()
    speed_up(model, fast_attention=False, fast_dropout=False)
    assert model.config._attn_implementation == "sdpa"
    speed_up(model)
    assert model.config._attn_implementation == model.bert.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert disable_cpu_attention(model) and model.config._attn_implementation == "sdpa"
    assert not disable_cpu_attention(model)
    assert not enable_cpu_attention(build(attn_implementation="eager"))
    assert not enable_cpu_attention(torch.nn.Linear(2, 2))
