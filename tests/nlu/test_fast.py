"""Whatever makes a training step faster must give the results of transformers' own layers."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForTokenClassification

import loralib
from nlu.fast import ATTENTION, speed_up
from nlu.fast.cpu_attention import NAME, cpu_attention, enable_cpu_attention
from nlu.fast.deberta_attention import enable_deberta_attention
from nlu.fast.dropout import FastDropout, drop_mask
from nlu.fast.first_token import enable_first_token
from tests.nlu.tiny import DEBERTA


def build(kind="deberta-v2", implementation=None, **changes):
    """A classifier without dropout whose weights are large enough for attention to be far from uniform."""
    settings = {
        "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "cls_dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings | (DEBERTA if kind == "deberta-v2" else {}) | changes)
    extra = {} if implementation is None else {"attn_implementation": implementation}
    return AutoModelForSequenceClassification.from_config(config, **extra).double().train()


def batch(lengths=(11, 4, 7)):
    longest = max(lengths)
    generator = torch.Generator().manual_seed(longest)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 200, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 2}


def outcome(model, inputs, states=False):
    """(logits, gradients of the loss); with ``states``, all last hidden states and gradients that depend on all."""
    model.zero_grad()
    if states:
        found = model.base_model(**{n: v for n, v in inputs.items() if n != "labels"}).last_hidden_state
        weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found).to(found.dtype)
        loss = (found.square() * weights).sum()
    else:
        result = model(**inputs)
        found, loss = result.logits, result.loss
    loss.backward()
    return found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-6):
    """Two outcomes agree to ``rtol`` of the largest number and of the largest gradient.

    transformers rounds DeBERTa's scale to float32 whatever the model's type, hence not 1e-12.
    """
    assert (found[0] - expected[0]).abs().max() <= rtol * expected[0].abs().max()
    assert found[1].keys() == expected[1].keys()
    largest = max(grad.abs().max() for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= rtol * largest, name


# Technique → the function that enables it, and the encoders that it supports.
TECHNIQUES = {
    "deberta attention": (enable_deberta_attention, ["deberta-v2"]),
    "cpu attention": (enable_cpu_attention, ["bert", "roberta", "electra", "xlm-roberta"]),
    "first token": (enable_first_token, ["bert", "roberta", "deberta-v2", "mpnet"]),
}
CASES = [(name, kind) for name, (*_, kinds) in TECHNIQUES.items() for kind in kinds]
every_case = pytest.mark.parametrize(("technique", "kind"), CASES)
every_kind = pytest.mark.parametrize("kind", TECHNIQUES["first token"][1])


def fast_copy(model, technique):
    fast = copy.deepcopy(model)
    assert TECHNIQUES[technique][0](fast) and list(fast.state_dict()) == list(model.state_dict())
    return fast


@every_case
@pytest.mark.parametrize("lengths", [(11, 4, 7), (8, 8, 8), (1, 1, 1)], ids=["padded", "whole", "one token"])
def test_results_and_gradients_are_those_of_transformers(technique, kind, lengths):
    """Also if low-rank layers with nonzero updates replace the projections."""
    model, inputs, states = build(kind), batch(lengths), technique != "first token"
    for modules in ([], "all-linear"):
        if modules:
            loralib.inject(model, "lora2", modules, r=4, k=4)
            for layer in loralib.lora_layers(model).values():
                nn.init.normal_(layer.lora_E)
        fast = fast_copy(model, technique)
        assert_same(outcome(fast, inputs, states), outcome(model, inputs, states))


@every_case
def test_dropout_follows_the_seed_and_has_the_right_gradient(technique, kind):
    """Also if activation checkpointing computes the layers again."""
    dropout = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
    model, inputs = fast_copy(build(kind, **dropout), technique), batch((5, 3))
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def run(embeddings, seed=1):
        torch.manual_seed(seed)
        return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits

    assert torch.equal(run(embeddings), run(embeddings)) and not torch.equal(run(embeddings), run(embeddings, 2))
    assert torch.autograd.gradcheck(run, (embeddings,), fast_mode=True)
    runs = []
    for checkpointing in (False, model.supports_gradient_checkpointing):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        runs.append(outcome(model, inputs))
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize(("technique", "kind"), [case for case in CASES if case[0] != "cpu attention"])
def test_requested_hidden_states_and_attentions_are_complete(technique, kind):
    model, inputs = build(kind, implementation=None if kind == "deberta-v2" else "eager"), batch()
    fast = fast_copy(model, technique)
    expected, found = (m(**inputs, output_hidden_states=True, output_attentions=True) for m in (model, fast))
    for name in ("logits", "hidden_states", "attentions"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    fast.config.output_hidden_states = True  # as from_pretrained(output_hidden_states=True) sets it
    assert fast(**inputs).hidden_states[-1].shape == expected.hidden_states[-1].shape
    grads = [torch.autograd.grad(o.attentions[-1].square().sum(), m.get_input_embeddings().weight)[0]
             for m, o in ((model, expected), (fast, found))]  # fmt: skip
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("switch_on", "model"),
    [
        (enable_deberta_attention, lambda: build("bert")),
        (enable_first_token, lambda: build(num_hidden_layers=1, conv_kernel_size=3, conv_act="gelu")),
        (enable_first_token, lambda: build("electra")),
        (enable_first_token, lambda: BertForTokenClassification(build("bert").config)),
        (enable_cpu_attention, lambda: build("bert", implementation="eager")),
        (enable_first_token, lambda: build("bert", chunk_size_feed_forward=4)),
    ],
)
def test_unsupported_models_are_not_changed(switch_on, model):
    assert not switch_on(model())


# ---- DeBERTa's attention --------------------------------------------------------------------------------------------


BEYOND = {"max_position_embeddings": 60}  # the texts are longer than the largest relative position


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        *(({}, length) for length in (1, 128, 129, 300)),  # crosses the log buckets and the blocks
        (BEYOND | {"max_relative_positions": 60, "position_buckets": 16}, 150),
        (BEYOND | {"position_buckets": -1}, 150),
        ({"position_buckets": 152, "max_relative_positions": 80}, 150),  # buckets spread wider than the distances
        ({"pos_att_type": ["c2p"], "position_buckets": 4}, 40),
        ({"pos_att_type": ["p2c"], "num_attention_heads": 1}, 40),
        ({"pos_att_type": [], "conv_kernel_size": 3}, 40),
        ({"share_att_key": False, "position_buckets": 8}, 40),
        ({"relative_attention": False}, 40),
    ],
)
def test_deberta_attention_equals_stock_for_any_length_and_configuration(changes, length):
    model, inputs = build(num_hidden_layers=1, **changes), batch([length, max(1, length // 2)])
    assert_same(outcome(fast_copy(model, "deberta attention"), inputs, True), outcome(model, inputs, True))


@pytest.mark.parametrize("own", [False, True], ids=["the encoder's positions", "a caller's positions"])
def test_deberta_attention_equals_stock_for_any_mask_and_fully_masked_rows(own):
    model = build()
    mask = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1, 4] = False
    states, weights = torch.randn(2, 3, 12, 32, dtype=torch.float64)
    positions, results = torch.randint(-5, 5, (1, 12, 12)) if own else None, []
    for encoder in (model.deberta.encoder, fast_copy(model, "deberta attention").deberta.encoder):
        leaf = states.clone().requires_grad_()
        out = encoder(leaf, mask, relative_pos=positions).last_hidden_state
        (out * weights).sum().backward()
        results.append((out, leaf.grad, encoder.rel_embeddings.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


# ---- the first token alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "changes"), [
    ("bert", {"implementation": "eager"}), ("roberta", {}), ("deberta-v2", {"num_hidden_layers": 1}),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
])  # fmt: skip
def test_one_token_is_enough_for_the_classifier(kind, changes):
    """The results are the stock model's, although the fast copy's last layer computes one token only."""
    model, inputs, seen = build(kind, **changes), batch(), set()
    fast = fast_copy(model, "first token")
    fast.base_model.encoder.layer[-1].intermediate.register_forward_hook(lambda m, args, out: seen.add(out.shape[1]))
    assert_same(outcome(fast, inputs), outcome(model, inputs))
    assert seen == {1}


@every_kind
def test_direct_call_of_the_encoder_gives_the_whole_sequence(kind):
    model, inputs = build(kind).eval(), batch()
    speed_up(model)
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    with pytest.raises((AttributeError, TypeError)):
        model(input_ids="no tensor")  # a failed call must not affect the next one
    assert model.base_model(**asked).last_hidden_state.shape[1] == 11


@every_kind
def test_first_token_copies_no_weights_of_frozen_layers(kind):
    """As torch does if the input of a frozen linear layer is a view."""
    model = fast_copy(build(kind, intermediate_size=40), "first token").requires_grad_(False)
    embeddings = model.get_input_embeddings()(batch()["input_ids"]).requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        model(inputs_embeds=embeddings).logits.sum().backward()
    products = [shapes for event in profile.events() if event.name == "aten::bmm" for shapes in event.input_shapes]
    assert not [shape for shape in products if 40 in shape]


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 3 / 2**16])
def test_dropped_share_is_p(p):
    count = 2_000_000
    share = drop_mask(torch.empty(count), p).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count) + 2**-17


def test_dropout_masks_of_neighbours_and_draws_are_independent():
    first, second = (drop_mask(torch.empty(1_000_000), 0.3).double() for _ in range(2))
    limit = 5 / math.sqrt(first.numel())
    for other in (second, *(first.roll(shift) for shift in (1, 2, 3, 4, 7, 64))):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < limit


@pytest.mark.parametrize("dtype, shape", [(torch.float32, ()), (torch.float64, (0, 4)), (torch.bfloat16, (64, 33))])
def test_fast_dropout_output_and_gradient(dtype, shape):
    x = torch.rand(shape, dtype=dtype).add_(1).requires_grad_()
    y = FastDropout(0.25)(x)
    y.sum().backward()
    kept = y != 0
    scale = torch.tensor(1 / 0.75, dtype=dtype)
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0))
    torch.testing.assert_close(x.grad, kept * scale)


def test_fast_dropout_is_called_as_stock_dropout_and_takes_p_0_and_1():
    x = torch.rand(100)
    assert (FastDropout(0.5)(input=x) == 0).any() and torch.equal(FastDropout(0.5).eval()(input=x), x)
    assert torch.equal(FastDropout(0.0)(x), x) and torch.equal(FastDropout(1.0)(x), torch.zeros(100))


# ---- all of them together ------------------------------------------------------------------------------------------


def test_speed_up_replaces_the_attention_that_it_supports():
    model = build()
    speed_up(model, ATTENTION)
    speed_up(whole := copy.deepcopy(model))
    assert enable_deberta_attention(model) == 2 and enable_first_token(model)
    assert not enable_deberta_attention(whole) and not enable_first_token(whole)  # already enabled
    bert = build("bert")
    speed_up(bert, ATTENTION)
    assert bert.config._attn_implementation == "sdpa"
    speed_up(bert)
    assert bert.config._attn_implementation == bert.bert.config._attn_implementation == NAME
    assert NAME not in bert.config.to_json_string()


def test_cpu_attention_uses_the_given_scale():
    query, key, value = torch.randn(3, 2, 2, 5, 4)
    everywhere = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    for mask, allowed in ((everywhere, everywhere), (None, everywhere.tril())):  # a decoder may give no mask
        context, _ = cpu_attention(torch.nn.Module(), query, key, value, mask, 0.0, 0.3)
        expected = (0.3 * query @ key.mT).where(allowed, -math.inf).softmax(-1) @ value
        torch.testing.assert_close(context, expected.transpose(1, 2))


@every_kind
def test_nothing_is_dropped_in_evaluation(kind):
    model = build(kind, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3).eval()
    speed_up(fast := copy.deepcopy(model))
    torch.testing.assert_close(fast(**batch()).logits, model(**batch()).logits, rtol=1e-5, atol=1e-5)
