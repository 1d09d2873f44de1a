"""Injection: names, sharing, and the exact parameter counts of METHOD at real size."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import loralib
from loralib import injection
from loralib.interop.multi_adapter import MultiAdapter
from tests.loralib import small
from tests.loralib.small import adapted, encoder, refused

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]
DEBERTA = small.DEBERTA | {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "vocab_size": 128100, "position_buckets": 256,
}  # fmt: skip
ROBERTA_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def build(model_type, **config):
    with torch.device("meta"):
        return encoder(model_type, **config)


def adapter_size(model):
    return sum(p.numel() for p in loralib.lora_state_dict(model).values())


@pytest.mark.parametrize(
    "encoder, kind, options, modules, expected",
    [
        (("deberta-v2", DEBERTA), "lora2", {"k": 1}, SIX, 167_616),
        (("deberta-v2", DEBERTA), "lora2", {"k": 1}, ["query", "key"], 37_440),
        (("deberta-v2", DEBERTA), "lora2", {"k": 8}, SIX, 1_336_896),
        (("deberta-v2", DEBERTA), "lora", {}, SIX, 1_327_104),
        (("roberta", ROBERTA_LARGE), "lora2", {"k": 1}, SIX, 445_824),
    ],
)
def test_counts_on_encoders_of_the_paper(encoder, kind, options, modules, expected):
    model = build(encoder[0], **encoder[1])
    layers = encoder[1]["num_hidden_layers"]
    assert len(loralib.inject(model, kind, modules, r=8, **options)) == layers * len(modules)
    assert adapter_size(model) == expected


@pytest.mark.parametrize("model_type", ["deberta-v2", "roberta", "bert", "electra"])
def test_the_six_published_names_mean_the_same_on_every_encoder(model_type):
    model = build(model_type)
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
    for bad in ("nothing", "LayerNorm", "((", []):
        with refused():
            loralib.match_modules(model, bad)
    model.pooler = type("FalconLinear", (nn.Linear,), {})(2, 2)
    with refused("pooler is a FalconLinear, and only nn.Linear itself can be replaced"):
        loralib.match_modules(model, "pooler")


def test_a_published_name_means_every_layer_that_ends_so():
    def attention(**more):
        return nn.ModuleDict({"self": nn.ModuleDict({"query": nn.Linear(2, 2)}), **more})

    vision = nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(2, 2)})})
    model = nn.ModuleDict({"attention": attention(), "crossattention": attention(), "vision": vision})
    names = ["attention.self.query", "crossattention.self.query", "vision.attention.query"]
    assert loralib.match_modules(model, "query") == names


def test_a_refused_injection_changes_nothing():
    model = encoder()
    for kind, options in [
        ("nope", {}), ("lora", {"k": 2}), ("adalora", {"widths": (2,)}), ("lora", {"init": "orthogonal"}),
        ("adalora", {"share_outer": True}), ("multiscale", {"widths": (), "share_outer": True}), ("lora2", {"r": 0}),
        ("lora2", {"k": -1}),
    ]:  # fmt: skip
        with refused(model=model):
            loralib.inject(model, kind, ["query"], **options)
    loralib.inject(model, "lora2", ["query"])
    with refused("already", model):
        loralib.inject(model, "lora2", ["query", "key"])


def test_a_layer_that_was_compiled_on_its_own_is_refused(tmp_path):
    """What torch has compiled of it would go on to compute without the update."""
    folder = loralib.save_adapter(adapted(), tmp_path / "adapter")
    model = small.Net()
    model.layers[1]["q"].compile(backend="eager")
    with refused("layers.1.q was compiled on its own", model):
        loralib.inject(model, "lora", ["q"])
    model = small.Net()
    model.compile(backend="eager")
    loralib.load_adapter(model, folder)
    torch.testing.assert_close(model(small.INPUTS), adapted()(small.INPUTS))
    for use in (lambda m: MultiAdapter(m).load("a", folder), lambda m: loralib.merge_into(m, folder)):
        model = small.Net()
        model.layers[1]["q"].compile(backend="eager")
        use(model)  # which replaces no layer


def test_a_layer_that_was_replaced_in_another_model_is_replaced_in_this_one(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    loralib.inject(model, "lora2", ["0"], r=2, k=2)
    other, folder = nn.Sequential(model[0]), loralib.save_adapter(model, tmp_path / "a")
    for each in (model, other):
        loralib.load_adapter(each, folder)
        loralib.LowRankTraining(each, 10).penalty().backward()


def test_the_checks_draw_no_random_numbers():
    injection._own_names.cache_clear()
    module, before = nn.Linear(2, 2), torch.get_rng_state()
    injection.check_replaceable("module", module)
    assert torch.equal(torch.get_rng_state(), before)


def test_share_outer_holds_one_pair_per_module_type_and_counts_it_once():
    model = build("deberta-v2", **DEBERTA)
    loralib.inject(model, "lora2", SIX, r=8, k=5, share_outer=True)
    layers = loralib.lora_layers(model)
    outer = 4 * (768 + 768) * 5 + 2 * (768 + 3072) * 5
    inner = 72 * (2 * 5 * 8 + 8)
    assert adapter_size(model) == outer + inner
    assert len({id(layer.lora_B[0]) for layer in layers.values()}) == 6
    queries = [layer for name, layer in layers.items() if name.endswith("query_proj")]
    assert len({id(layer.lora_A[0]) for layer in queries}) == 1 and len({id(q.lora_A[1]) for q in queries}) == 12


def test_biases_go_by_several_names_and_layers_without_a_name_are_told():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "l": nn.LSTM(4, 4), "q": nn.Linear(4, 4)})
    loralib.inject(model, "lora2", ["q"])
    loralib.mark_only_lora_as_trainable(model, "all")
    names = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert names == {"a.in_proj_bias", "a.out_proj.bias", "l.bias_ih_l0", "l.bias_hh_l0", "q.bias"}
    assert names <= set(loralib.lora_state_dict(model, "all"))
    for other, says in ((nn.Sequential(nn.Linear(2, 2)), "the model has: 0"), (nn.Linear(2, 2), "none below its root")):
        with pytest.raises(ValueError, match=says):
            loralib.inject(other, "lora2", ["q"])


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_mark_only_lora_as_trainable(bias):
    model = build("bert")
    with pytest.raises(ValueError, match="inject"):
        loralib.mark_only_lora_as_trainable(model)
    loralib.inject(model, "lora2", ["query", "value"], r=2, k=2)
    loralib.mark_only_lora_as_trainable(model, bias)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {n for n in trainable if "lora_" in n}
    assert len(factors) == 4 * 5
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    lora_biases = {n for n in biases if "self.query" in n or "self.value" in n}
    assert trainable - factors == {"none": set(), "all": biases, "lora_only": lora_biases}[bias]
    assert set(loralib.lora_state_dict(model, bias)) == trainable
    with pytest.raises(ValueError, match="bias"):
        loralib.lora_state_dict(model, "some")


def test_what_a_pattern_cannot_take_is_named(recwarn):
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(2, 2)}), "b": nn.ModuleDict({"q": Own(2, 2)})})
    with pytest.warns(
        UserWarning, match=r"b\.q is a Own, and only nn\.Linear itself can be replaced.*it stays as before"
    ):
        assert loralib.inject(model, "lora2", ["q"]) == ["a.q"]
    with pytest.raises(ValueError, match=r"b\.q is a Own.*LoRA2Config of loralib\.interop\.peft_method"):
        loralib.match_modules(model, r"b\.q")
    with pytest.raises(ValueError, match="target_modules is empty"):
        loralib.match_modules(model, [""])
    loralib.match_modules(nn.TransformerEncoderLayer(4, 2), ".*")  # its attention's projection is never called
    assert not recwarn.list


def test_experts_in_one_tensor_are_named_and_stay_as_they_are():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen2_moe", **sizes, num_key_value_heads=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        num_experts=4, num_experts_per_tok=2,
    ))  # fmt: skip
    with pytest.warns(UserWarning, match=r"mlp\.experts\.down_proj is one tensor of shape \(4, 16, 8\).*it stays as"):
        assert loralib.inject(model, "lora2", ["down_proj"]) == ["model.layers.0.mlp.shared_expert.down_proj"]
    with refused(r"mlp\.experts\.gate_up_proj is one tensor.*not a linear layer", model):
        loralib.inject(model, "lora2", ["gate_up_proj"])
    with pytest.warns(UserWarning, match=r"gate_up_proj is one tensor.*it and 1 more stay as before"):
        loralib.match_modules(model, ".*")


def test_what_is_like_no_linear_layer_is_passed_by():
    class Causal(nn.Conv1d):
        pass

    model = nn.Sequential(
        nn.Linear(2, 2), nn.Conv1d(2, 2, 1), Causal(2, 2, 1), nn.LazyConv1d(2, 1), nn.Bilinear(2, 2, 2)
    )
    model.positions = nn.Parameter(torch.zeros(1, 4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loralib.match_modules(model, ".*") == ["0"]


def test_factors_that_are_shared_no_more_are_refused():
    """``assign=True`` makes a parameter for each name, over one memory, which a step would change twice."""
    model, other = (adapted(k=2, share_outer=True) for _ in range(2))
    other.load_state_dict(model.state_dict())
    loralib.LowRankTraining(other, 4)
    other.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"shares its memory.*load the state dict without assign=True"):
        loralib.LowRankTraining(other, 4)


def test_a_sharing_that_shares_nothing_is_said():
    def net(*names):
        return nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(6, 5)}) for name in names})

    with pytest.warns(UserWarning, match="share_outer shares nothing"):
        loralib.inject(net("block1", "block2"), "lora2", ["q"], r=2, share_outer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loralib.inject(net("1", "2"), "lora2", ["q"], r=2, share_outer=True)
        loralib.inject(net("block1"), "lora2", ["q"], r=2, share_outer=True)


def test_complex_weights_and_patterns_that_are_no_names_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    for modules, says in (("01", "the weight of 1 is complex"), ([0], "must be names, got 0"), (None, "is empty")):
        with refused(says, model):
            loralib.inject(model, "lora2", modules and list(modules))
