"""The last layer for the first token alone against the whole one: transformers' own layers are the judge."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForTokenClassification

from nlu.fast import speed_up
from nlu.fast.deberta_attention import disable_fast_attention, enable_fast_attention
from nlu.fast.first_token import disable_first_token, enable_first_token
from tests.nlu.test_cpu_attention import batch, loss_and_grads

DEBERTA = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}


def build(kind="deberta-v2", implementation=None, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32,
        "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "cls_dropout": 0.0,
    }  # fmt: skip
    if kind == "deberta-v2":
        settings |= DEBERTA | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"]}
    config = AutoConfig.for_model(kind, **settings | changes)
    extra = {} if implementation is None else {"attn_implementation": implementation}
    return AutoModelForSequenceClassification.from_config(config, **extra).double().train()


def assert_same(model, inputs, rtol=1e-6):
    """Loss, logits and every gradient are the stock model's; only the fast copy's last layer sees one token."""
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    assert enable_first_token(fast)
    seen = []
    fast.base_model.encoder.layer[-1].intermediate.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    expected_loss, expected = loss_and_grads(model, inputs)
    loss, grads = loss_and_grads(fast, inputs)
    assert set(seen) == {1}
    assert torch.allclose(loss, expected_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=rtol, atol=rtol)
    assert grads.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= rtol * largest, name


@pytest.mark.parametrize("lengths", [(11, 4, 7), (8, 8, 8), (1, 1, 1)], ids=["padded", "whole", "one token"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("bert", {"implementation": "eager"}),
        ("roberta", {}),
        ("deberta-v2", {}),
        ("deberta-v2", {"share_att_key": False}),
        ("deberta-v2", {"pos_att_type": ["c2p"]}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"pos_att_type": []}),
        ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ],
)
def test_logits_and_gradients_equal_the_whole_layers(kind, changes, lengths):
    assert_same(build(kind, **changes), batch(lengths))


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_also_with_gradient_checkpointing(kind):
    model = build(kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, batch())


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_bfloat16_stays_near_the_whole_layer(kind):
    model = build(kind).bfloat16()
    fast = copy.deepcopy(model)
    speed_up(fast)
    reference = build(kind)(**batch()).logits
    error, stock_error = ((m(**batch()).logits - reference).abs().max() for m in (fast, model))
    assert error <= 2 * stock_error + 2**-8 * reference.abs().max()


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_who_asks_for_hidden_states_or_attention_gets_whole_ones(kind):
    model, inputs = build(kind, "eager" if kind != "deberta-v2" else None).eval(), batch()
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    enable_first_token(fast)
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}):
        expected, got = model(**inputs, **asked), fast(**inputs, **asked)
        for name in ("hidden_states", "attentions"):
            for a, b in zip(expected.get(name) or (), got.get(name) or (), strict=True):
                torch.testing.assert_close(b, a)
    seen = []
    fast.base_model.encoder.layer[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    fast(**inputs)
    first = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert first.shape[1] == 1  # and who does not ask is served fast again


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_whoever_calls_the_encoder_itself_gets_the_whole_sequence(kind):
    model, inputs = build(kind).eval(), batch()
    speed_up(model)
    assert model(**inputs).logits.shape == (3, 2)
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.base_model(**asked).last_hidden_state.shape[1] == 11
    with pytest.raises((AttributeError, TypeError)):
        model(input_ids="no tensor")  # a call that fails half way leaves nothing behind
    assert model.base_model(**asked).last_hidden_state.shape[1] == 11
    states = model.forward(**asked, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {11}


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_checkpointed_layers_repeat_what_they_did_whatever_is_asked_in_between(kind):
    model, inputs = build(kind), batch()
    expected = loss_and_grads(model, inputs)[1]
    speed_up(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs).loss
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    model.zero_grad()
    loss.backward()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_hooks_and_subclasses_of_the_attention_keep_their_say(kind):
    model, inputs = build(kind).eval(), batch()
    attention = model.base_model.encoder.layer[-1].attention

    def halve(module, args, output):
        return (output[0] / 2, *output[1:])

    attention.self.register_forward_hook(halve)
    expected = model(**inputs).logits
    assert enable_first_token(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    disable_first_token(model)
    attention.self.__class__ = type("Mine", (type(attention.self),), {})
    assert not enable_first_token(model)


def test_compiled_models_compute_the_same():
    model, inputs = build("bert").eval(), batch()
    expected = model(**inputs).logits
    speed_up(model)
    torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)


def test_it_is_undone_and_leaves_other_models_alone():
    for kind in ("bert", "roberta", "deberta-v2"):
        model = build(kind)
        kinds, hooks = [type(m) for m in model.modules()], len(model._forward_pre_hooks)
        enable_fast_attention(model)
        assert enable_first_token(model) and not enable_first_token(model)
        assert disable_first_token(model) and not disable_first_token(model)
        disable_fast_attention(model)
        assert [type(m) for m in model.modules()] == kinds and len(model._forward_pre_hooks) == hooks
    assert not enable_first_token(build())  # DeBERTa on stock attention
    assert not enable_first_token(build(num_hidden_layers=1, conv_kernel_size=3, conv_act="gelu"))
    assert not enable_first_token(build("electra"))
    assert not enable_first_token(BertForTokenClassification(build("bert").config))


def test_a_tokens_classifier_of_one_layer_works():
    assert_same(build(num_hidden_layers=1), batch())


def test_dropout_follows_the_seed():
    model = build(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2)
    speed_up(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**batch()).loss.item())
    assert losses[0] == losses[1] != losses[2]
