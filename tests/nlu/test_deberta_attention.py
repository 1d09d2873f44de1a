"""transformers' own DeBERTa-v2 is the judge: same logits, same gradients, whatever the configuration."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2ForSequenceClassification
from transformers.models.deberta_v2 import modeling_deberta_v2 as stock

from nlu.fast.deberta_attention import FastDisentangledSelfAttention, disable_fast_attention, enable_fast_attention

GLUE = Path(os.environ.get("GLUE_TEST_DIR", Path(__file__).resolve().parents[3] / "shared/data/glue"))


def build(dtype=torch.float64, seed=0, **changes) -> DebertaV2ForSequenceClassification:
    """A small DeBERTaV3-shaped classifier with random weights large enough for attention to be far from uniform."""
    settings_ = {
        "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "relative_attention": True, "position_buckets": 256, "max_position_embeddings": 512,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False, "type_vocab_size": 0,
        "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return DebertaV2ForSequenceClassification(DebertaV2Config(**settings_ | changes)).to(dtype).train()


def batch(lengths: list[int], longest: int | None = None, vocabulary: int = 200) -> dict[str, torch.Tensor]:
    longest = longest or max(lengths)
    generator = torch.Generator().manual_seed(longest)
    ids = torch.randint(1, vocabulary, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def states_and_grads(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All last hidden states (padding included) and the gradients of a loss in which every one of them counts."""
    model.zero_grad()
    states = model.deberta(**inputs).last_hidden_state
    weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states).to(states.dtype)
    (states.square() * weights).sum().backward()
    return states.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, rtol: float = 1e-9) -> None:
    """The stock model and its fast copy agree to `rtol` of the largest state and of the largest gradient."""
    fast = copy.deepcopy(model)
    assert enable_fast_attention(fast) == model.config.num_hidden_layers
    expected, expected_grads = states_and_grads(model, inputs)
    states, grads = states_and_grads(fast, inputs)
    assert (states - expected).abs().max() <= rtol * expected.abs().max()
    largest = max(grad.abs().max() for grad in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= rtol * largest, name


# The stock code rounds its scale to float32 whatever the model's dtype, hence not 1e-12 where it is not a square.
EXACT = 1e-6


@settings(max_examples=25, deadline=None)
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
    assert_same(model, batch(lengths, longest=max(lengths) + draw(st.integers(0, 3))), EXACT)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 130, 257, 300])
def test_equals_stock_across_the_log_buckets_and_blocks(length):
    assert_same(build(num_hidden_layers=1), batch([length, max(1, length // 2)]), EXACT)


@pytest.mark.parametrize("changes", [{"max_relative_positions": 60, "position_buckets": 16}, {"position_buckets": -1}])
def test_equals_stock_beyond_the_largest_relative_position(changes):
    changes = {"max_position_embeddings": 60} | changes
    assert_same(build(num_hidden_layers=1, **changes), batch([150, 149]), EXACT)


def test_buckets_more_spread_than_distances():
    assert_same(build(num_hidden_layers=1, position_buckets=152, max_relative_positions=80), batch([150, 3]), EXACT)


def test_logits_and_gradients_in_float32_at_base_width():
    model = build(torch.float32, hidden_size=768, num_attention_heads=12, intermediate_size=256, initializer_range=0.05)
    assert_same(model, batch([64, 64, 33, 9]), 1e-5)


def test_bfloat16_is_as_near_to_the_truth_as_stock():
    model, inputs = build(torch.bfloat16, initializer_range=0.1), batch([40, 40, 21])
    truth, true_grads = states_and_grads(copy.deepcopy(model).double(), inputs)
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    expected, expected_grads = states_and_grads(model, inputs)
    states, grads = states_and_grads(fast, inputs)
    assert (states - truth).norm() <= 1.2 * (expected - truth).norm()

    def error(found):
        return sum((found[name] - grad).norm() ** 2 for name, grad in true_grads.items()) ** 0.5

    assert error(grads) <= 1.2 * error(expected_grads)


def test_real_token_lengths():
    path = GLUE / "mrpc" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"no GLUE data at {GLUE} (set GLUE_TEST_DIR)")
    rows = [json.loads(line) for _, line in zip(range(6), path.open(encoding="utf-8"), strict=False)]
    texts = [[str(v) for v in row.values() if isinstance(v, str)] for row in rows]
    assert_same(build(), batch([sum(len(t.split()) for t in text) + 3 for text in texts]), EXACT)


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
    torch.testing.assert_close(results[1], results[0], rtol=EXACT, atol=EXACT)


def test_gradient_checkpointing_with_dropout_changes_nothing():
    model = build(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
    enable_fast_attention(model)
    inputs, runs = batch([20, 13]), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        runs.append(states_and_grads(model, inputs))
    torch.testing.assert_close(runs[0], runs[1])


def test_dropout_is_the_gradient_of_what_the_forward_computed():
    model = build(num_hidden_layers=1, attention_probs_dropout_prob=0.4)
    enable_fast_attention(model)
    inputs = batch([9, 6])
    embeddings = model.deberta.embeddings(inputs["input_ids"]).detach().requires_grad_()

    def run(states):
        torch.manual_seed(5)
        return model.deberta.encoder(states, inputs["attention_mask"], return_dict=False)[0]

    assert torch.autograd.gradcheck(run, (embeddings,), fast_mode=True)
    assert not torch.equal(run(embeddings), model.eval().deberta.encoder(embeddings, inputs["attention_mask"])[0])


def test_attention_dropout_keeps_the_mean_and_drops_the_right_share():
    model = build(num_hidden_layers=1, attention_probs_dropout_prob=0.25)
    enable_fast_attention(model)
    attention, heads = model.deberta.encoder.layer[0].attention.self, 4
    nn.init.zeros_(attention.value_proj.weight)  # values are all one: a context is the kept probability over 0.75
    nn.init.ones_(attention.value_proj.bias)
    x = torch.randn(40, 50, 32, dtype=torch.float64)
    context, _ = attention(x, torch.ones(40, 1, 50, 50), rel_embeddings=model.deberta.encoder.get_rel_embedding())
    kept = context.view(40, 50, heads, -1)[..., 0]
    assert abs(kept.mean().item() - 1) < 5 * kept.std().item() / kept.numel() ** 0.5
    assert kept.std() > 0.05


def test_output_attentions_are_stocks_and_carry_a_gradient():
    model = build()
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    inputs = batch([11, 7])
    expected, found = (m(**inputs, output_attentions=True) for m in (model, fast))
    torch.testing.assert_close(found.attentions, expected.attentions, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.logits, expected.logits, rtol=EXACT, atol=EXACT)
    grads = [torch.autograd.grad(o.attentions[1].square().sum(), m.deberta.encoder.rel_embeddings.weight)[0]
             for m, o in ((model, expected), (fast, found))]  # fmt: skip
    torch.testing.assert_close(grads[1], grads[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("length", [1, 10])
def test_traces_whole_under_torch_compile(length):
    model = build(num_hidden_layers=1)
    expected = states_and_grads(model, batch([length, 1]))
    enable_fast_attention(model)
    attention = torch.compile(model.deberta.encoder, backend="aot_eager", fullgraph=True)
    inputs = batch([length, 1])
    model.zero_grad()
    states = attention(model.deberta.embeddings(inputs["input_ids"], mask=inputs["attention_mask"]),
                       inputs["attention_mask"]).last_hidden_state  # fmt: skip
    torch.testing.assert_close(states.detach(), expected[0], rtol=EXACT, atol=EXACT)
    weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64).view_as(states)
    (states.square() * weights).sum().backward()
    for name, grad in expected[1].items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=EXACT, atol=1e-5)


def test_autocast_stays_near_float32():
    model = build(torch.float32, initializer_range=0.1)
    inputs = batch([20, 8])
    expected = states_and_grads(model, inputs)[0]
    enable_fast_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        states = model.deberta(**inputs).last_hidden_state
    states.float().square().sum().backward()
    assert (states - expected).norm() < 0.03 * expected.norm()


def test_projections_are_called_as_modules():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x) + x.sum(-1, keepdim=True)

    model = build(num_hidden_layers=1)
    attention = model.deberta.encoder.layer[0].attention.self
    for name in ("query_proj", "key_proj", "value_proj"):
        getattr(attention, name).__class__ = Counting
    assert_same(model, batch([9, 4]), EXACT)
    assert Counting.calls == 2 * 5  # content three times, positions through query and key, in each of the two models


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


def test_disable_restores_everything_and_the_state_dict_never_changes():
    model, inputs = build(torch.float32), batch([9, 5])
    before, keys = states_and_grads(model, inputs), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    assert enable_fast_attention(model) == 2
    assert enable_fast_attention(model) == 0  # nothing left to do
    assert isinstance(pickle.loads(pickle.dumps(model)).deberta.encoder.layer[0].attention.self,
                      FastDisentangledSelfAttention)  # fmt: skip
    assert list(model.state_dict()) == keys
    assert disable_fast_attention(model) == 2
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(states_and_grads(model, inputs), before, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["subclass", "own forward", "buckets"])
def test_what_is_not_covered_stays_stock_and_is_logged(what, monkeypatch):
    class Custom(stock.DisentangledSelfAttention):
        pass

    model = build(**({"position_buckets": 100, "max_relative_positions": 40} if what == "buckets" else {}))
    attention = model.deberta.encoder.layer[1].attention.self
    if what == "subclass":
        attention.__class__ = Custom
    elif what == "own forward":
        attention.forward = attention.forward
    lines = []
    monkeypatch.setattr("nlu.fast.deberta_attention.logger.warning", lines.append)
    assert enable_fast_attention(model) == 0
    assert len(lines) == 1 and "fast attention left out of deberta.encoder" in lines[0]
    assert type(model.deberta.encoder) is stock.DebertaV2Encoder


def test_other_models_are_left_alone():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)
    assert enable_fast_attention(BertModel(config)) == 0


def test_a_callers_own_relative_positions_take_the_stock_path():
    model = build()
    fast = copy.deepcopy(model)
    enable_fast_attention(fast)
    states, mask = torch.randn(2, 8, 32, dtype=torch.float64), torch.ones(2, 8)
    positions = torch.randint(-5, 5, (1, 8, 8))
    expected, found = (m.deberta.encoder(states, mask, relative_pos=positions)[0] for m in (model, fast))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
