"""LoRA² as a method of peft: the numbers of ``loralib.inject``, with peft's own saving, loading and merging."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import loralib
from loralib.export import main
from loralib.interop.peft_method import LORA2, LoRA2Config
from tests.loralib.small import INPUTS, Net, encoder, gpt2, randomise, refused, trainable

SHAPE = {"r": 3, "k": 4, "lora_alpha": 6}


def net(modules=("q", "v"), base=None, **options):
    config = LoRA2Config(**{**SHAPE, "target_modules": list(modules), **options})
    return randomise(get_peft_model(Net() if base is None else base, config))


def injected(modules=("q", "v"), base=None, **options):
    model = Net() if base is None else base
    loralib.inject(model, "lora2", list(modules), **{**SHAPE, **options})
    return randomise(model)


@pytest.mark.parametrize("base, modules, training", [
    (Net, ["q", "v"], False), (lambda: gpt2(2), ["c_attn", "c_proj"], True),
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_inject(base, modules, training):
    ids = torch.arange(1, 13).view(2, 6)
    outputs, gradients = [], []
    for model in (net(modules, base(), lora_dropout=0.5), injected(modules, base(), lora_dropout=0.5)):
        torch.manual_seed(1)
        model.train(training)
        out = model(INPUTS) if base is Net else model(input_ids=ids).logits
        out.square().sum().backward()
        outputs.append(out)
        gradients.append([parameter.grad for parameter in trainable(model)])
    assert torch.equal(*outputs) and len(gradients[0]) == len(gradients[1]) >= 30
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_adapter_is_saved_and_loaded_under_another_name(tmp_path):
    model = net(modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in trainable(model))
    again = PeftModel.from_pretrained(Net(), tmp_path, adapter_name="other", low_cpu_mem_usage=True, is_trainable=True)
    assert again.peft_config["other"].peft_type is LORA2 and again.peft_config["other"].k == 4
    assert torch.equal(again(INPUTS), model(INPUTS)) and len(trainable(again)) == len(trainable(model))
    full = copy.deepcopy(again)
    randomise(full, seed=5)
    assert {n for n, _ in full.named_parameters()} <= full.state_dict().keys()
    assert torch.equal(torch.func.functional_call(full, again.state_dict(), INPUTS), model(INPUTS))
    full.load_state_dict(again.state_dict())
    assert torch.equal(full(INPUTS), model(INPUTS))


def test_merge_unmerge_and_unload_keep_the_outputs_and_the_saved_keys(tmp_path):
    model = net().eval()
    expected, before = model(INPUTS), {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(INPUTS), expected, atol=1e-3, rtol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged")]
    assert states[0].keys() == states[1].keys()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    layer = model.base_model.model.layers[0]["q"]
    delta = layer.get_delta_weight("default")
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(INPUTS), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(plain.layers[0]["q"].weight, Net().layers[0]["q"].weight + delta)
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())


def test_head_of_several_layers_stays_when_the_model_is_unloaded():
    model = net(["value"], encoder("roberta"), task_type="SEQ_CLS").eval()
    ids = torch.arange(2, 14).view(2, 6)
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_replica_of_data_parallel_has_the_factors():
    """There a layer's parameters are ordinary attributes (torch.nn.parallel.replicate)."""
    adapter, x = net().base_model.model.layers[0]["q"].lora2_adapters["default"], torch.randn(3, 6)
    replica = adapter._replicate_for_data_parallel()
    for name, factor in adapter.named_parameters(recurse=False):
        setattr(replica, name, factor.detach().clone())
    out = torch.zeros(3, adapter.out_features)
    assert not replica._parameters and torch.equal(replica(x, out), adapter(x, out))


def test_several_adapters_can_be_switched_disabled_combined_merged_and_deleted():
    model, base = net(), Net()
    model.add_adapter("second", LoRA2Config(r=2, k=3, target_modules=["q"]))
    assert not any("second" in n for n, p in model.named_parameters() if p.requires_grad)
    randomise(model, seed=1)
    first = model(INPUTS)
    model.set_adapter("second")
    second = model(INPUTS)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(model(INPUTS), base(INPUTS))
    model.base_model.set_adapter(["default", "second"])
    layer, x = model.base_model.model.layers[0]["q"], torch.eye(6)
    delta = sum(layer.get_delta_weight(name) for name in ("default", "second"))
    torch.testing.assert_close(layer(x), x @ (base.layers[0]["q"].weight + delta).T + base.layers[0]["q"].bias)
    both = model(INPUTS)
    model.merge_adapter()
    torch.testing.assert_close(model(INPUTS), both, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():  # peft unmerges for this
        assert torch.equal(model(INPUTS), base(INPUTS))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(INPUTS), first) and "second" not in layer.lora2_adapters


def prune(model, steps=6):
    low_rank = loralib.LowRankTraining(model, steps, target_rank=1, init_warmup=1, final_warmup=2, mask_interval=1)
    for _ in range(steps):
        (model(INPUTS).square().mean() + low_rank.penalty()).backward()
        with torch.no_grad():
            for parameter in trainable(model):
                parameter -= 1e-6 * parameter.grad
        low_rank.after_step()
        model.zero_grad()
    return low_rank.ranks.pattern


def test_regulariser_and_allocator_work_and_do_not_change_other_adapters(tmp_path):
    model = net()
    model.add_adapter("frozen", LoRA2Config(r=2, k=3, target_modules=["q", "v"]))
    frozen = {n: p.clone() for n, p in model.named_parameters() if "frozen" in n}
    masks = prune(model)
    assert list(masks.values()) == list(prune(ours := injected()).values()) and sum(map(sum, masks.values())) == 6
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(ours), strict=True))
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())

    expected = model(INPUTS)
    ranks = model.base_model.compact()
    assert list(ranks.values()) == [sum(mask) for mask in masks.values()] and 0 in ranks.values()
    torch.testing.assert_close(model(INPUTS), expected)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(INPUTS), model(INPUTS)) and again.peft_config["default"].rank_pattern == ranks
    assert [layer.r for layer in loralib.lora_layers(again).values()] == list(ranks.values())


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' layer of that name: two 4-bit values per byte, shape (n / 2, 1)."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().max() / 7
        levels = ((linear.weight.detach() / scale).round() + 8).to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter(levels[:, :1] * 16 + levels[:, 1:], requires_grad=False)
        self.weight.quant_state, self.bias = (scale, linear.weight.shape), linear.bias

    def dequantised(self):
        scale, shape = self.weight.quant_state
        return scale * (torch.cat([self.weight // 16, self.weight % 16], 1).view(shape).float() - 8)

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised(), self.bias)


def test_quantised_or_hooked_base_layer_runs_its_own_forward_and_a_quantised_one_is_not_merged():
    bases = Net(), Net()
    for block, plain in zip(*(base.layers for base in bases), strict=True):
        block["q"] = Linear4bit(block["q"])
        plain["q"].weight.data = block["q"].dequantised()
    for pattern in ("q", ".*"):  # inject() would replace what it cannot compute, or adapt the others alone
        with refused("quantised by bitsandbytes: use LoRA² in peft", bases[0]):
            loralib.inject(bases[0], "lora2", [pattern])
    model, plain = (net(base=base) for base in bases)
    seen = []
    model.base_model.model.layers[0]["v"].base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(INPUTS), plain(INPUTS), atol=1e-4, rtol=1e-4)
    assert seen == [1]
    with pytest.raises(ValueError, match="the weight is quantised"):
        model.merge_adapter()


def test_functions_that_peft_replaces_are_refused(tmp_path):
    model, save = net(), partial(loralib.save_adapter, folder=tmp_path)
    for call in (save, loralib.compact, loralib.merge_adapter, loralib.unmerge_adapter):
        with refused("use the PeftModel's methods", model):
            call(model)
    with refused("would freeze peft's adapters", model):
        loralib.inject(model, "lora2", ["classifier"])


def test_adapter_names_per_row_and_a_projection_that_is_never_called_are_refused():
    model = net(base=gpt2(), modules=["c_attn"], task_type="CAUSAL_LM").eval()
    model.add_adapter("second", LoRA2Config(r=2, k=3, target_modules=["c_attn"]))
    for call in (model, model.generate):
        with refused("takes no adapter_names", model):
            call(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "second"])
    with refused("never calls it"):
        net(["out_proj"], nn.TransformerEncoderLayer(8, 2, 16))


def test_rank_pattern_is_read_as_in_pefts_lora():
    model = net(rank_pattern={"q": 1, "layers.1.v": 0, r"layers\.[02]\.v": 2})
    assert [layer.r for layer in loralib.lora_layers(model).values()] == [1, 2, 1, 0, 1, 2]


def test_transformers_loads_the_saved_folder(tmp_path):
    """The adapter has a rank pattern and a head. loralib exports it as a peft LoRA."""
    encoder().save_pretrained(tmp_path / "base")
    load = AutoModelForSequenceClassification.from_pretrained
    options = {"task_type": "SEQ_CLS", "rank_pattern": {"layer.0.attention.self.query": 2}}
    model = net(["query", "value"], load(tmp_path / "base"), **options).eval()
    model.save_pretrained(tmp_path / "a")
    ids = torch.arange(4, 16).view(2, 6)
    expected = model(ids).logits
    (loaded := load(tmp_path / "base")).load_adapter(tmp_path / "a")
    for again in (loaded, load(tmp_path / "a")):
        assert torch.equal(again.eval()(ids).logits, expected)
    with refused("load it with peft"):
        loralib.load_adapter(load(tmp_path / "base"), tmp_path / "a")
    assert main([str(tmp_path / "a"), "--to", "peft", str(tmp_path / "peft")]) == 0
    theirs = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_second_adapter_on_all_linear_layers_includes_those_of_the_first():
    base = gpt2(2)
    model = get_peft_model(base, LoRA2Config(r=2, k=2, target_modules=["c_attn"]))
    for name in ("second", "third"):
        model.add_adapter(name, LoRA2Config(r=2, k=2, target_modules="all-linear"))
        adapted = {n.partition(".lora2_adapters")[0] for n, _ in base.named_modules() if n.endswith(f"adapters.{name}")}
        assert {n.rpartition(".")[2] for n in adapted} == {"c_attn", "c_proj", "c_fc"} and len(adapted) == 8


def test_transformer_encoder_takes_a_padding_mask_in_evaluation():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    model = net(["linear1", "linear2"], encoder)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[~mask], expected[~mask])


def test_settings_that_peft_would_ignore_are_refused():
    with refused("layers_pattern needs layers_to_transform"):
        net(layers_pattern="layers")
    with refused("needs a list of target_modules"):
        LoRA2Config(target_modules="q", layers_to_transform=1)
