"""The contract of whatever makes a step faster: transformers' own layers are the judge."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BertForTokenClassification

import loralib
from nlu.fast import speed_up
from nlu.fast.cpu_attention import NAME, cpu_attention, enable_cpu_attention
from nlu.fast.deberta_attention import enable_fast_attention
from nlu.fast.first_token import enable_first_token
from tests.nlu.fast_models import assert_same, batch, build, outcome
from tests.nlu.tiny import REPOSITORY


def first_token_on(model):
    enable_fast_attention(model)  # which DeBERTa needs for it
    return enable_first_token(model)


# Technique → how it is switched on, and the encoders that it is for.
TECHNIQUES = {
    "deberta attention": (enable_fast_attention, ["deberta-v2"]),
    "cpu attention": (enable_cpu_attention, ["bert", "roberta", "electra", "xlm-roberta"]),
    "first token": (first_token_on, ["bert", "roberta", "deberta-v2"]),
}
every_case = pytest.mark.parametrize(
    ("technique", "kind"), [(name, kind) for name, (*_, kinds) in TECHNIQUES.items() for kind in kinds]
)


def fast_copy(model, technique):
    fast = copy.deepcopy(model)
    assert TECHNIQUES[technique][0](fast)
    return fast


@every_case
@pytest.mark.parametrize("lengths", [(11, 4, 7), (8, 8, 8), (1, 1, 1)], ids=["padded", "whole", "one token"])
def test_results_and_gradients_are_those_of_transformers(technique, kind, lengths):
    """Also with low-rank layers, whose updates count, in place of the projections."""
    model, inputs, states = build(kind), batch(lengths), technique != "first token"
    for modules in ([], ["query", "value", "layer.output"]):
        if modules:
            loralib.inject(model, "lora2", modules, r=4, k=4)
            for layer in loralib.lora_layers(model).values():
                nn.init.normal_(layer.lora_E)
        fast = fast_copy(model, technique)
        assert_same(outcome(fast, inputs, states), outcome(model, inputs, states))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@every_case
def test_narrower_types_are_as_near_to_the_truth_as_stock(technique, kind, dtype):
    model, inputs, states = build(kind, dtype, initializer_range=0.1), batch(), technique != "first token"
    truth = outcome(copy.deepcopy(model).double(), inputs, states)
    fast, stock = (outcome(m, inputs, states) for m in (fast_copy(model, technique), model))

    def errors(found):
        grads = sum((found[1][name] - grad).norm() ** 2 for name, grad in truth[1].items())
        return (found[0] - truth[0]).norm(), grads**0.5

    for ours, theirs in zip(errors(fast), errors(stock), strict=True):
        assert ours <= 1.5 * theirs


@every_case
def test_dropout_follows_the_seed_and_its_gradient_is_that_of_what_was_computed(technique, kind):
    """Also where checkpointing computes the layers again."""
    dropout = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
    model, inputs = fast_copy(build(kind, **dropout), technique), batch((5, 3))
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def run(embeddings, seed=1):
        torch.manual_seed(seed)
        return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits

    assert torch.equal(run(embeddings), run(embeddings)) and not torch.equal(run(embeddings), run(embeddings, 2))
    assert torch.autograd.gradcheck(run, (embeddings,), fast_mode=True)
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        runs.append(outcome(model, inputs))
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize(
    ("technique", "kind"),
    [("deberta attention", "deberta-v2"), *(("first token", kind) for kind in ("bert", "roberta", "deberta-v2"))],
)
def test_who_asks_for_hidden_states_or_attention_gets_whole_ones(technique, kind):
    model, inputs = build(kind, implementation=None if kind == "deberta-v2" else "eager"), batch()
    fast = fast_copy(model, technique)
    expected, found = (m(**inputs, output_hidden_states=True, output_attentions=True) for m in (model, fast))
    for name in ("logits", "hidden_states", "attentions"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(o.attentions[-1].square().sum(), m.get_input_embeddings().weight)[0]
             for m, o in ((model, expected), (fast, found))]  # fmt: skip
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


@every_case
def test_the_state_dict_and_the_saved_configuration_never_change(technique, kind, tmp_path):
    model = build(kind)
    fast = fast_copy(model, technique)
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("switch_on", "model"),
    [
        (enable_fast_attention, lambda: build("bert")),
        (enable_first_token, build),  # DeBERTa on stock attention
        (first_token_on, lambda: build(num_hidden_layers=1, conv_kernel_size=3, conv_act="gelu")),
        (enable_first_token, lambda: build("electra")),
        (enable_first_token, lambda: BertForTokenClassification(build("bert").config)),
        (enable_cpu_attention, lambda: build("bert", implementation="eager")),
        (first_token_on, lambda: build("bert", is_decoder=True)),
    ],
)
def test_other_models_are_left_alone(switch_on, model):
    assert not switch_on(model())


# ---- all of them together --------------------------------------------------------------------------------------------


def test_speed_up_replaces_the_attention_that_it_covers():
    model = build()
    speed_up(model, fast_attention=False)
    speed_up(whole := copy.deepcopy(model))
    assert enable_fast_attention(model) == 2 and enable_first_token(model)
    assert not enable_fast_attention(whole) and not enable_first_token(whole)  # done already
    bert = build("bert")
    speed_up(bert, fast_attention=False)
    assert bert.config._attn_implementation == "sdpa"
    speed_up(bert)
    assert bert.config._attn_implementation == bert.bert.config._attn_implementation == NAME


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "compiled"), [(None, 0), ("8", 1100)])
def test_kernels_are_compiled_once_unless_the_user_keeps_fewer(asked, compiled):
    """More shapes than oneDNN keeps by default, each used twice; oneDNN's own log says what was compiled."""
    code = (
        "import torch; from nlu.fast.process import keep_kernels; keep_kernels(); weight = torch.ones(2, 2)\n"
        "for turn in range(2):\n"
        "    print('turn', turn, flush=True)\n"
        "    for rows in range(1, 1101):\n"
        "        torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 2), weight, None, 'none', [], '')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment |= {"ONEDNN_VERBOSE": "2"} | ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": asked} if asked else {})
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split("turn")[1:]
    assert first.count("create:cache_miss") == 1100 and second.count("create:cache_miss") == compiled


def test_cpu_attention_scales_as_it_is_asked_to():
    query, key, value = torch.randn(3, 2, 2, 5, 4)
    context, _ = cpu_attention(torch.nn.Module(), query, key, value, torch.ones(2, 1, 5, 5, dtype=torch.bool), 0.0, 0.3)
    expected = (0.3 * query @ key.mT).softmax(-1) @ value
    torch.testing.assert_close(context, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_nothing_is_dropped_in_evaluation(kind):
    model = build(kind, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3).eval()
    speed_up(fast := copy.deepcopy(model))
    torch.testing.assert_close(fast(**batch()).logits, model(**batch()).logits, rtol=1e-5, atol=1e-5)
