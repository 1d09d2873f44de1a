"""An update in the weight: what a merge gives, what it refuses, and what it leaves as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import loralib
from loralib.merging import merge_into
from tests.loralib.small import INPUTS, Net, adapted, encoder, gpt2, refused


def test_a_merge_that_cannot_be_whole_merges_nothing():
    model = adapted(k=2)
    prune.identity(model.layers[2]["v"], "weight")
    with refused("layers.2.v.weight is computed by a hook", model):
        loralib.merge_adapter(model)
    assert not any(layer.merged for layer in loralib.lora_layers(model).values())


@pytest.mark.parametrize("modules", [["c_attn", "lm_head"], ["c_attn", "mlp.c_proj"]])
def test_only_a_merge_that_would_change_the_embedding_is_refused(tmp_path, modules):
    tokens, base, again = torch.arange(8)[None], gpt2(), gpt2()
    model = adapted(modules=modules, r=4, k=3, model=gpt2(), head="transformer.ln_f")
    before = model(tokens).logits
    folder = loralib.save_adapter(model, tmp_path / "a")
    loralib.load_adapter(again, folder)
    assert torch.equal(again(tokens).logits, before)
    if "lm_head" in modules:
        model(tokens, labels=tokens).loss.backward()
        assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.grad is None
        assert model.lm_head.lora_E.grad.abs().sum() > 0
        with refused(r"lm_head\.weight is tied to transformer\.wte\.weight", model):
            loralib.merge_adapter(model)
        with pytest.raises(ValueError, match="tied"):
            merge_into(base, folder)
    else:  # GPT-2's Conv1D stores its weight as (in, out)
        loralib.merge_adapter(model)
        merge_into(base, folder)
        for merged in (model, base):
            torch.testing.assert_close(merged(tokens).logits, before, rtol=1e-4, atol=1e-4)
        assert type(base.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_a_trained_weight_beside_its_update_counts_once_and_extra_state_stays_behind(tmp_path):
    class Head(nn.Linear):
        get_extra_state = dict

    base = Net()
    base.classifier.__class__ = Head
    model, merged = copy.deepcopy(base), copy.deepcopy(base)
    adapted(k=2, model=model).layers[2]["v"].weight.requires_grad_(True).data.add_(0.2)
    outputs = model(INPUTS)
    merge_into(merged, loralib.save_adapter(model, tmp_path / "a"))
    loralib.merge_adapter(model)
    loralib.load_adapter(base, loralib.save_adapter(model, tmp_path / "merged"))
    for other in (merged, base):
        torch.testing.assert_close(other(INPUTS), outputs, rtol=1e-4, atol=1e-4)


def test_a_head_trains_on_a_merged_adapter():
    model = adapted(k=2)
    loralib.merge_adapter(model.train())
    with pytest.raises(RuntimeError, match="call unmerge"):
        model(INPUTS)
    model.requires_grad_(False).classifier.requires_grad_(True)
    model(INPUTS).sum().backward()
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("build, modules", [(gpt2, ["c_attn", "mlp.c_proj"]), (encoder, ["query", "layer.output"])])
def test_an_unloaded_model_is_one_that_transformers_saves_and_loads(tmp_path, build, modules):
    """The state dict of a model that is only merged holds the base's weights, so that what is loaded is the base."""
    ids = torch.arange(2, 10)[None]
    model = adapted(
        modules=modules, r=4, k=3, model=build(), head="transformer.ln_f" if build is gpt2 else "classifier"
    )
    expected, classes = model(ids).logits, [type(module) for module in build().modules()]
    plain = loralib.merge_and_unload(torch.compile(model, backend="eager"))
    assert plain is model and [type(module) for module in plain.modules()] == classes
    plain.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m").eval()
    for merged in (plain, loaded):
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain.requires_grad_(True)(ids).logits.sum().backward()  # and it trains as any other
    assert all(parameter.grad is not None for name, parameter in plain.named_parameters() if "attn.c_attn" in name)
