"""The last layer for the first token alone; test_fast.py has the contract of all techniques."""

import copy

import pytest
import torch

from nlu.fast import speed_up
from nlu.fast.first_token import enable_first_token
from tests.nlu.fast_models import assert_same, batch, build, outcome
from tests.nlu.test_fast import first_token_on

every_kind = pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])


def check(model, inputs):
    """As the stock model; only the fast copy's last layer sees one token."""
    fast = copy.deepcopy(model)
    assert first_token_on(fast)
    seen = []
    fast.base_model.encoder.layer[-1].intermediate.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    assert_same(outcome(fast, inputs), outcome(model, inputs))
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"implementation": "eager"}),
        ("roberta", {}),
        ("deberta-v2", {"num_hidden_layers": 1}),
        ("deberta-v2", {"share_att_key": False}),
        ("deberta-v2", {"pos_att_type": ["c2p"]}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ],
)
def test_one_token_is_enough_for_the_classifier(kind, changes):
    check(build(kind, **changes), batch())


@every_kind
def test_whoever_calls_the_encoder_itself_gets_the_whole_sequence(kind):
    model, inputs = build(kind).eval(), batch()
    speed_up(model)
    assert model(**inputs).logits.shape == (3, 2)
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.base_model(**asked).last_hidden_state.shape[1] == 11
    with pytest.raises((AttributeError, TypeError)):
        model(input_ids="no tensor")  # a call that fails half way leaves nothing behind
    assert model.base_model(**asked).last_hidden_state.shape[1] == 11


@every_kind
def test_checkpointed_layers_repeat_what_they_did_whatever_is_asked_in_between(kind):
    model, inputs = build(kind), batch()
    expected = outcome(model, inputs)
    speed_up(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = model(**inputs)
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    model.zero_grad()
    result.loss.backward()
    assert_same((result.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


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
    model = build(kind)
    attention = model.base_model.encoder.layer[-1].attention
    attention.self.__class__ = type("Mine", (type(attention.self),), {})
    assert not enable_first_token(model)


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    model, inputs = build("bert").eval(), batch()
    expected = model(**inputs).logits
    speed_up(model)
    torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)
