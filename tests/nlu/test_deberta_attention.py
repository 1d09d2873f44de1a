"""DeBERTa's fast attention over its configurations and lengths; test_fast.py has the contract of all techniques."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

from nlu.fast.deberta_attention import enable_fast_attention
from tests.nlu.fast_models import assert_same, batch, build, outcome


def check(model, inputs):
    fast = copy.deepcopy(model)
    assert enable_fast_attention(fast) == model.config.num_hidden_layers
    assert_same(outcome(fast, inputs, states=True), outcome(model, inputs, states=True))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_equals_stock_for_any_configuration(data):
    draw = data.draw
    buckets = draw(st.sampled_from([-1, 4, 8, 32, 256]))
    model = build(
        position_buckets=buckets,
        max_relative_positions=draw(st.sampled_from([-1, 40] if buckets < 64 else [-1, 200])),
        relative_attention=draw(st.sampled_from([True, True, True, False])),
        pos_att_type=draw(st.sampled_from([[], ["c2p"], ["p2c"], ["p2c", "c2p"], ["c2p", "p2c"]])),
        share_att_key=draw(st.booleans()),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        conv_kernel_size=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 100)),
    )
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    check(model, batch(lengths, longest=max(lengths) + draw(st.integers(0, 3))))


BEYOND = {"max_position_embeddings": 60}  # the largest relative position is nearer than the other end of the text


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        *(({}, length) for length in (1, 128, 129, 300)),  # across the log buckets and the blocks
        (BEYOND | {"max_relative_positions": 60, "position_buckets": 16}, 150),
        (BEYOND | {"position_buckets": -1}, 150),
        ({"position_buckets": 152, "max_relative_positions": 80}, 150),  # more spread than the distances
    ],
)
def test_equals_stock_for_long_texts(changes, length):
    check(build(num_hidden_layers=1, **changes), batch([length, max(1, length // 2)]))


def test_any_mask_and_rows_that_attend_to_nothing():
    model = build()
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    mask = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1, 4] = False
    states, weights = torch.randn(2, 3, 12, 32, dtype=torch.float64)
    results = []
    for encoder in (model.deberta.encoder, fast.deberta.encoder):
        leaf = states.clone().requires_grad_()
        out = encoder(leaf, mask).last_hidden_state
        (out * weights).sum().backward()
        results.append((out, leaf.grad, encoder.rel_embeddings.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_traces_whole_under_torch_compile():
    model, inputs = build(num_hidden_layers=1), batch([10, 1])
    expected = outcome(model, inputs, states=True)
    enable_fast_attention(model)
    encoder = model.deberta.encoder
    encoder.forward = torch.compile(encoder.forward, backend="aot_eager", fullgraph=True)
    assert_same(outcome(model, inputs, states=True), expected)


def test_autocast_stays_near_float32():
    model = build(dtype=torch.float32, initializer_range=0.1)
    inputs = batch([20, 8])
    expected = outcome(model, inputs)[0]
    enable_fast_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = outcome(model, inputs)[0]
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_only_occurring_positions_are_projected():
    seen = []
    model = build(num_hidden_layers=1, share_att_key=False)
    enable_fast_attention(model)
    attention = model.deberta.encoder.layer[0].attention.self
    attention.pos_key_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[-2]))
    for length in (1, 17, 128, 300):
        model(**batch([length, length]))
    assert seen[:3] == [1, 33, 255]
    distances = torch.arange(-299, 300)
    distinct = stock.make_log_bucket_position(distances, 256, 512).unique().numel()
    assert distinct <= seen[3] <= distinct + 2


def test_a_subclass_stays_stock():
    model = build()
    attention = model.deberta.encoder.layer[1].attention.self
    attention.__class__ = type("Custom", (stock.DisentangledSelfAttention,), {})
    assert enable_fast_attention(model) == 0 and type(model.deberta.encoder) is stock.DebertaV2Encoder


def test_a_callers_own_relative_positions_take_the_stock_path():
    model = build()
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    states, mask = torch.randn(2, 8, 32, dtype=torch.float64), torch.ones(2, 8)
    positions = torch.randint(-5, 5, (1, 8, 8))
    expected, found = (m.deberta.encoder(states, mask, relative_pos=positions)[0] for m in (model, fast))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
