"""Injection: module names, sharing, and what trains."""

import pytest
import torch
import transformers
from torch import nn

import loralib
from tests.loralib import small
from tests.loralib.small import encoder, refused

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]


def build(model_type, **config):
    with torch.device("meta"):
        return encoder(model_type, **config)


@pytest.mark.parametrize("model_type", ["deberta-v2", "roberta", "bert", "electra"])
def test_the_six_published_names_select_the_same_layers_on_every_encoder(model_type):
    model = build(model_type)
    for pattern in SIX:  # no pattern selects another's modules
        assert len(loralib.match_modules(model, pattern)) == 2
    names = loralib.inject(model, "lora2", SIX, r=2, k=2)
    assert len(names) == len(set(names)) == 12
    for layer in range(2):
        of_layer = [n.split(f"layer.{layer}.")[1] for n in names if f"layer.{layer}." in n]
        attention = [n.removesuffix("_proj") for n in of_layer[:3]]
        assert attention == ["attention.self.query", "attention.self.key", "attention.self.value"]
        assert of_layer[3:] == ["attention.output.dense", "intermediate.dense", "output.dense"]


def test_suffix_and_regular_expression_patterns():
    model = build("bert")
    assert loralib.match_modules(model, ["self.query"]) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    assert loralib.match_modules(model, r".*layer\.1\..*\.(key|value)") == [
        f"bert.encoder.layer.1.attention.self.{n}" for n in ("key", "value")
    ]
    for bad in ("LayerNorm", []):
        with refused():
            loralib.match_modules(model, bad)
    model.pooler = type("FalconLinear", (nn.Linear,), {})(2, 2)  # a subclass may compute something else
    with refused("'pooler' matches no linear layer"):
        loralib.match_modules(model, "pooler")


def test_published_name_selects_every_layer_whose_name_ends_with_it():
    def attention(**more):
        return nn.ModuleDict({"self": nn.ModuleDict({"query": nn.Linear(2, 2)}), **more})

    vision = nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(2, 2)})})
    model = nn.ModuleDict({"attention": attention(), "crossattention": attention(), "vision": vision})
    names = ["attention.self.query", "crossattention.self.query", "vision.attention.query"]
    assert loralib.match_modules(model, "query") == names


def test_a_refused_injection_changes_nothing():
    model = encoder()
    for kind, options in [("nope", {}), ("adalora", {"share_outer": True}), ("lora2", {"r": 0})]:
        with refused(model=model):
            loralib.inject(model, kind, ["query"], **options)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        loralib.inject(model, "lora", ["query"], k=2)
    loralib.inject(model, "lora2", ["query"])
    with refused("already", model):
        loralib.inject(model, "lora2", ["query", "key"])


def test_all_linear_selects_all_but_the_head_and_auto_prefers_the_published_names():
    bert, mpnet = build("bert"), build("mpnet")
    dense = {n for n, m in bert.named_modules() if type(m) is nn.Linear and n != "classifier"}
    assert set(loralib.match_modules(bert, "all-linear")) == dense
    assert loralib.match_modules(bert, "auto") == loralib.match_modules(bert, SIX)
    found = loralib.inject(mpnet, "lora2", "all-linear", k=2)
    assert {n.rpartition("attn.")[2] for n in found if "attn." in n} == {"q", "k", "v", "o"} and len(found) == 12
    assert loralib.match_modules(mpnet, "auto") == found
    decoder = small.gpt2()
    assert loralib.match_modules(decoder, "all-linear") == loralib.match_modules(decoder, r".*(c_attn|c_proj|c_fc)")
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    t5 = transformers.T5ForQuestionAnswering(config)  # it has no base model inside
    assert {n.split(".")[0] for n in loralib.match_modules(t5, "all-linear")} == {"encoder", "decoder"}
    t5.add_module("projection", nn.Linear(8, 8))  # as in BLIP-2, which has a head inside and none of its own
    t5.get_output_embeddings = lambda: t5.qa_outputs
    assert {n.split(".")[0] for n in loralib.match_modules(t5, "all-linear")} == {"encoder", "decoder", "projection"}
    with refused("name the modules"):
        loralib.inject(nn.Sequential(nn.Linear(2, 2)), "lora2", "all-linear")


def test_inject_freezes_all_but_the_factors_and_only_mark_only_lora_as_trainable_unfreezes_some():
    model = encoder()
    loralib.inject(model, "lora2", ["query"])
    first = loralib.lora_layers(model)["bert.encoder.layer.0.attention.self.query"]
    first.lora_B[0].requires_grad_(False)
    loralib.inject(model, "lora", ["value"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 5 + 2 * 2 - 1 and all(".lora_" in name for name in trained)
    loralib.mark_only_lora_as_trainable(model.requires_grad_(True))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert list(loralib.lora_state_dict(model)) == trained and len(trained) == 2 * 5 + 2 * 2
    assert set(loralib.compact(model).values()) == {8}  # no singular value counts as pruned before it is trained


@pytest.mark.parametrize("names, sizes", [(("block1", "block2"), (5, 5)), (("1", "2"), (5, 7))])
def test_inject_warns_if_share_outer_shares_nothing(names, sizes):
    """Layers of other names or other shapes do not share."""
    model = nn.ModuleDict({n: nn.ModuleDict({"q": nn.Linear(6, out)}) for n, out in zip(names, sizes, strict=True)})
    with pytest.warns(UserWarning, match="share_outer shares nothing"):
        loralib.inject(model, "lora2", ["q"], r=2, share_outer=True)
