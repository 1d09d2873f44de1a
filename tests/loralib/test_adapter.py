"""Saved adapters: same logits on reload, exact sizes, ranks of the weights, and every damage refused."""

import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loralib
from loralib.interop.precision import cast_frozen
from loralib.merging import merge_into
from tests.loralib.small import INPUTS, Net, adapted, refused

KINDS = [
    ("lora", {}),
    ("adalora", {"init": "orthogonal"}),
    ("lora2", {"k": 1}),
    ("lora2", {"k": 2, "share_outer": True, "init": "orthogonal"}),
    ("multiscale", {"widths": (4, 2), "lora_dropout": 0.1}),
]
SINGULAR = KINDS[1:]


def ranks(model):
    return {name: layer.r for name, layer in loralib.lora_layers(model).items()}


def live_ranks(model):
    return {name: int(layer.lora_E.count_nonzero()) for name, layer in loralib.lora_layers(model).items()}


# ---- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lora2"])
def test_a_strength_that_was_changed_is_saved(tmp_path, kind):
    model = adapted(kind)
    deltas = {name: layer.delta_weight().detach() for name, layer in loralib.lora_layers(model).items()}
    for layer in loralib.lora_layers(model).values():
        layer.lora_alpha /= 2
        with pytest.raises(AttributeError):
            layer.scaling = 1.0
    again = Net()
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(INPUTS), model(INPUTS))
    for name, layer in loralib.lora_layers(again).items():
        torch.testing.assert_close(layer.delta_weight(), deltas[name] / 2)


def test_a_trained_adapter_reloads_with_the_same_bits(pretrained, lora2, tmp_path):
    model, pattern, folder = lora2
    base, small, whole = pretrained.base(), pretrained.base(), pretrained.base()
    untouched, logits = pretrained.logits(base), pretrained.logits(model)
    config = loralib.load_adapter(base, folder)
    assert torch.equal(pretrained.logits(base), logits) and (logits - untouched).abs().max() > 0.05
    assert config.kind == "lora2" and config.base_model == "all-MiniLM-L6-v2" and config.card == {"task": "stsb"}
    assert config.ranks == {name: sum(flags) for name, flags in pattern.items()} == live_ranks(model)
    assert len(set(config.ranks.values())) > 2 and sum(config.ranks.values()) == 36 * 2
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        *loralib.lora_state_dict(base), "classifier.weight", "classifier.bias"
    }  # fmt: skip
    loralib.load_adapter(small, folder, compact=True)
    torch.testing.assert_close(pretrained.logits(small), logits, atol=1e-6, rtol=1e-6)
    assert ranks(small) == config.ranks
    loralib.load_adapter(whole, loralib.save_adapter(model, tmp_path / "whole", compact=False))
    assert torch.equal(pretrained.logits(whole), logits) and set(ranks(whole).values()) == {8}
    card = (folder / "README.md").read_text()
    assert "stsb" in card and "all-MiniLM-L6-v2" in card and "load_adapter" in card

    expected = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
    for name, rank in config.ranks.items():
        out, width = model.get_submodule(name).weight.shape
        expected += (8 * (out + width) + rank * (8 + 8 + 1)) * (rank > 0)
    assert sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values()) == expected
    assert 0 < (folder / "adapter_model.safetensors").stat().st_size - 4 * expected < 30_000


@pytest.mark.parametrize("kind, options", KINDS)
def test_every_kind_on_bfloat16_frozen_weights(tmp_path, kind, options):
    model, again, small = adapted(kind, **options), Net(), Net()
    cast_frozen(model, torch.bfloat16)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    cast_frozen(again, torch.bfloat16)
    assert torch.equal(again(INPUTS), model(INPUTS))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    loralib.load_adapter(small, tmp_path / "a", compact=True)
    loralib.compact(model)
    # shared parameters come once in both
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
    loralib.save_adapter(again, tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("trained", ["bias", ""])
def test_methods_without_layers_save_the_trained_parameters(tmp_path, trained):
    model, base = Net(), Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name).data.add_(trained in name)
    config = loralib.load_adapter(base, loralib.save_adapter(model, tmp_path / "a"))
    assert config.kind == "parameters" and config.groups == []
    assert torch.equal(base(INPUTS), model(INPUTS)) and not torch.equal(base(INPUTS), Net()(INPUTS))
    with pytest.raises(ValueError, match="nothing to save"):
        loralib.save_adapter(Net().requires_grad_(False), tmp_path / "b")


def test_an_injected_model_takes_the_adapter_and_buffers_travel(tmp_path):
    def build():
        return nn.Sequential(Net(), nn.BatchNorm1d(2))

    model, plain, injected = (build() for _ in range(3))
    adapted(model=model, head="1", k=2).train()(torch.randn(16, 6))
    folder = shutil.move(loralib.save_adapter(model.eval(), tmp_path / "a"), tmp_path / "moved")
    for other in (plain, adapted(model=injected, head="1", k=2)):
        loralib.load_adapter(other.eval(), folder)
        assert torch.equal(other(INPUTS), model(INPUTS))


def test_running_statistics_of_a_frozen_module_travel(tmp_path):
    base = nn.Sequential(Net(), nn.BatchNorm1d(2))
    model = copy.deepcopy(base)
    adapted(model=model, head="0.classifier", k=2).train()(torch.randn(16, 6))
    loralib.load_adapter(base.eval(), loralib.save_adapter(model.eval(), tmp_path / "a"))
    assert torch.equal(base(INPUTS), model(INPUTS)) and base[1].num_batches_tracked == 1


def test_optimiser_and_helper_go_on_with_an_adapter_that_was_loaded_into_the_layers(tmp_path):
    folder = loralib.save_adapter(adapted(k=2), tmp_path / "a")
    outputs = []
    for late in (False, True):
        model = adapted(k=2)
        model.layers[1]["q"].lora_E.data.add_(1)
        made = [loralib.load_adapter(model, folder)] if late else []
        made += [torch.optim.SGD(model.parameters(), lr=1e-4), loralib.LowRankTraining(model, 4, target_rank=1)]
        if not late:
            loralib.load_adapter(model, folder)
        optimizer, low_rank = made[-2:]
        for _ in range(4):
            (model(INPUTS).square().mean() + low_rank.penalty()).backward()
            optimizer.step()
            low_rank.after_step()
            optimizer.zero_grad()
        outputs.append(model(INPUTS))
    assert torch.equal(*outputs) and not torch.allclose(outputs[0], adapted(k=2)(INPUTS), atol=1e-3)


@pytest.mark.parametrize("labels, says", [({1: "a", 2: "b"}, "base_config cannot be"), ({0: 0, 1: 1}, None)])
def test_what_could_not_be_read_again_is_not_saved(tmp_path, labels, says):
    model = adapted(k=2)
    model.config = SimpleNamespace(id2label=labels)
    if says is None:
        loralib.save_adapter(model, tmp_path / "a")
        assert loralib.read_adapter_config(tmp_path / "a").head_options()["id2label"] == {0: "0", 1: "1"}
        return
    with refused(says, model):
        loralib.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_leaves_the_last_good_adapter(tmp_path, value):
    model, base = adapted(k=2), Net()
    before = model(INPUTS)
    loralib.save_adapter(model, tmp_path / "a")
    model.layers[0]["q"].lora_E.data[0] = value
    with refused("holds NaN or infinity: the training has failed"):
        loralib.save_adapter(model, tmp_path / "a")
    loralib.load_adapter(base, tmp_path / "a")
    assert torch.equal(base(INPUTS), before)


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", SINGULAR)
def test_compacted_layers_of_differing_rank_do_everything(kind, options, tmp_path):
    model, again = adapted(kind, **options), Net()
    outputs, expected = model(INPUTS), live_ranks(model)
    early = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {n: (m.delta_weight(), m.scaling) for n, m in loralib.lora_layers(model).items()}
    assert list(expected.values())[:3] == [2, 0, 3] and loralib.compact(model) == expected
    torch.testing.assert_close(model(INPUTS), outputs, atol=1e-5, rtol=1e-5)
    for name, layer in loralib.lora_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), before[name][0], atol=1e-5, rtol=1e-5)
        assert layer.scaling == before[name][1] and (layer.lora_parameters() == []) == (expected[name] == 0)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(INPUTS), model(INPUTS))
    with pytest.raises(ValueError, match="must have rank"):
        loralib.RankAllocator(model, 3, 1, 1, 1, 1, 0.85, 0.85)
    with pytest.raises(ValueError, match="lacks low-rank factors"):
        loralib.LowRankTraining(model).step(early)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (model(INPUTS).square().mean() + loralib.compute_orth_regu(model)).backward()
    optimizer.step()
    trained = model(INPUTS)
    assert (trained - outputs).abs().max() > 1e-3
    fingerprint = loralib.base_fingerprint(model)
    for _ in range(2):  # twice merged is once merged
        loralib.merge_adapter(model)
    torch.testing.assert_close(model(INPUTS), trained, atol=1e-4, rtol=1e-4)
    assert loralib.base_fingerprint(model) == fingerprint
    with pytest.raises(ValueError, match="merged"):
        loralib.load_adapter(model, tmp_path / "a")
    loralib.unmerge_adapter(model)
    assert torch.equal(model(INPUTS), trained)


def test_an_untrained_adapter_keeps_its_ranks():
    fresh = Net()
    loralib.inject(fresh, "lora2", ["q", "v"], r=3, k=2)
    assert set(loralib.compact(fresh).values()) == {3}


def test_a_wholly_pruned_layer_still_shares_its_outer_factors(tmp_path):
    model, again, small = adapted(k=2, share_outer=True), Net(), Net()
    folder = loralib.save_adapter(model, tmp_path / "a")
    loralib.load_adapter(again, folder)
    loralib.load_adapter(small, folder, compact=True)
    assert again.layers[0]["v"].lora_B[0] is again.layers[1]["v"].lora_B[0] and live_ranks(again)["layers.0.v"] == 0
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    assert small.layers[0]["v"].lora_parameters() == []
    torch.testing.assert_close(small(INPUTS), again(INPUTS))


# ---- the base -------------------------------------------------------------------------------------------------------


def test_another_revision_of_the_base_is_refused(tmp_path):
    model, base = adapted(k=2), Net()
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1")
    with torch.no_grad():
        base.layers[2]["q"].weight[3, 5] *= 1.02
    start = copy.deepcopy(base)
    loralib.inject(start, "lora2", ["q", "v"], r=3, k=2)
    for other, load in ((base, loralib.load_adapter), (base, merge_into), (start, loralib.start_from_adapter)):
        with refused(r"weights are not those .*net, revision r1\)", other):
            load(other, folder)
    loralib.load_adapter(base, folder, allow_other_base=True)
    torch.testing.assert_close(base(INPUTS), model(INPUTS), atol=0.1, rtol=0)


class OtherNet(nn.Module):
    pass


@pytest.mark.parametrize(
    "base, says",
    [
        (OtherNet, "no linear layer layers.0.q: the adapter was made for a Net, this is a OtherNet"),
        (lambda: Net(blocks=2), "no linear layer layers.2"),
        (lambda: Net(width=8), "shape"),
        (lambda: Net(labels=3), "classifier.bias has shape"),
        (lambda: adapted(modules=["q"]), "adapts other modules than the model"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, base, says):
    folder, model = loralib.save_adapter(adapted(k=2), tmp_path / "a"), base()
    with refused(says, model):
        loralib.load_adapter(model, folder)


# ---- warm start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", KINDS)
def test_a_training_starts_from_the_update_whatever_its_alpha(tmp_path, kind, options):
    model, start = adapted(kind, **options, lora_alpha=4), Net(labels=5)
    folder = loralib.save_adapter(model, tmp_path / "a")
    loralib.inject(start, kind, ["q", "v"], r=3, **options, lora_alpha=7)
    flags = [p.requires_grad for p in start.parameters()]
    head = start.classifier.weight.clone()
    config = loralib.start_from_adapter(start, folder)
    for name, layer in loralib.lora_layers(start).items():
        theirs = model.get_submodule(name).delta_weight()
        torch.testing.assert_close(layer.delta_weight(), theirs, atol=1e-5, rtol=1e-5)
        assert layer.scaling == 7 / 3 and all(p.abs().max() > 0 for p in [*layer.lora_B, *layer.lora_A])
        if layer.lora_E is not None:
            assert int(layer.lora_E.count_nonzero()) == config.ranks[name]
            assert layer.lora_B[-1].abs().min() > 0  # pruned values can grow again
    assert torch.equal(start.classifier.weight, head) and [p.requires_grad for p in start.parameters()] == flags


@pytest.mark.parametrize(
    "kind, modules, options, says",
    [
        ("lora2", ["q"], {"r": 3, "k": 2}, "other modules than the model"),
        ("lora2", ["q", "v"], {"r": 4, "k": 2}, "rank 4"),
        ("lora2", ["q", "v"], {"r": 3, "k": 3}, r"widths \[3\]"),
        ("lora", ["q", "v"], {"r": 3}, "LoRA of rank 3"),
        ("adalora", ["q", "v"], {"r": 3}, "singular values of rank 3"),
        ("lora2", ["q", "v"], {"r": 3, "k": 2, "share_outer": True}, "leave share_outer out"),
        (None, [], {}, "other modules than the model"),
    ],
)
def test_a_start_from_other_layers_is_refused(tmp_path, kind, modules, options, says):
    folder, model = loralib.save_adapter(adapted(k=2), tmp_path / "a"), Net()
    if kind is not None:
        loralib.inject(model, kind, modules, **options)
    with refused(says, model):
        loralib.start_from_adapter(model, folder)


# ---- wrapped models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(nn.DataParallel(torch.compile(m)))])
def test_a_wrapped_model_is_saved_by_the_names_inside(tmp_path, wrap):
    model, base = adapted(k=2), Net()
    wrapped = wrap(model)
    config = loralib.load_adapter(base, loralib.save_adapter(wrapped, tmp_path / "a"))
    assert torch.equal(base(INPUTS), model(INPUTS)) and config.architecture == "Net"
    assert loralib.lora_layers(wrapped).keys() == loralib.lora_layers(model).keys()
    loralib.start_from_adapter(wrapped, tmp_path / "a")
    other, merged = Net(), Net()
    loralib.load_adapter(wrap(other), tmp_path / "a")
    merge_into(wrap(merged), tmp_path / "a")
    torch.testing.assert_close((other(INPUTS), merged(INPUTS)), (model(INPUTS),) * 2)
    outputs = model(INPUTS)
    loralib.merge_adapter(wrapped)
    assert all(layer.merged for layer in loralib.lora_layers(model).values())
    torch.testing.assert_close(model(INPUTS), outputs)
