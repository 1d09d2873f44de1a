"""Saving, loading, merging and warm starts of adapters: equal logits, exact sizes and live ranks."""

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import loralib
from loralib.interop.precision import cast_frozen
from loralib.recipes.checkpoint import load_model, save_checkpoint
from tests.loralib.small import INPUTS, KINDS, Net, adapted, encoder, gpt2, randomise, refused, trainable

# ---- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", KINDS)
def test_every_kind_reloads_with_bfloat16_frozen_weights_and_its_lora_alpha(tmp_path, kind, options):
    model, again = adapted(kind, **options), Net()
    for number, layer in enumerate(loralib.lora_layers(model).values()):
        layer.lora_alpha, layer.lora_dropout.p = -0.5 * layer.lora_alpha * (1 + number % 2), number % 3 / 10
        assert layer.scaling < 0  # subtracts the update
    cast_frozen(model, torch.bfloat16)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    cast_frozen(again, torch.bfloat16)
    assert torch.equal(again(INPUTS), model(INPUTS))
    assert str(again) == str(model)  # with the classes, alphas and dropouts
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for layer in loralib.lora_layers(again).values():  # a pruned singular value gets no gradient
        assert layer.lora_E is None or not layer.lora_B[-1][:, layer.lora_E == 0].any()
    loralib.save_adapter(again, tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    for _ in range(2):  # parameters() yields a shared parameter once, also that of a fully pruned layer
        assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
        assert loralib.compact(again) == loralib.compact(model)


@pytest.mark.parametrize("trained", ["bias", ""])
def test_model_without_low_rank_layers_saves_its_trainable_parameters(tmp_path, trained):
    model, base = Net(), Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name).data.add_(trained in name)
    config = loralib.load_adapter(base, loralib.save_adapter(model, tmp_path / "a"))
    assert config.kind == "parameters" and config.groups == []
    assert torch.equal(base(INPUTS), model(INPUTS)) and not torch.equal(base(INPUTS), Net()(INPUTS))
    with pytest.raises(ValueError, match=r"call inject\(\) first"):
        loralib.start_from_adapter(Net(), tmp_path / "a")
    for frozen in (Net(), adapted(k=2)):  # a frozen copy's head could not be told from its base
        with pytest.raises(ValueError, match="nothing to save"):
            loralib.save_adapter(frozen.requires_grad_(False), tmp_path / "b")


@pytest.mark.parametrize("norm_trains", [True, False])
def test_buffers_load_into_a_plain_and_into_an_injected_model(tmp_path, norm_trains):
    """Running statistics change in training even if the module's parameters are frozen. The injected model has other
    settings before, and loading keeps its parameter objects, so that an optimiser stays valid."""
    options = {"head": "1" if norm_trains else "0.classifier", "k": 2}
    model, plain, injected = (nn.Sequential(Net(), nn.BatchNorm1d(2)) for _ in range(3))
    adapted(model=model, **options).train()(torch.randn(16, 6))
    folder = shutil.move(loralib.save_adapter(model.eval(), tmp_path / "a"), tmp_path / "moved")
    before = list(adapted(model=injected, **options, lora_alpha=7, lora_dropout=0.5, init="orthogonal").parameters())
    for other in (plain, injected):
        loralib.load_adapter(other.eval(), folder)
        assert torch.equal(other(INPUTS), model(INPUTS)) and other[1].num_batches_tracked == 1
    assert all(one is other for one, other in zip(before, injected.parameters(), strict=True))
    configs = (loralib.read_adapter_config(each) for each in (folder, loralib.save_adapter(injected, tmp_path / "b")))
    assert next(configs).groups == next(configs).groups
    before = loralib.base_fingerprint(injected)
    injected[1].running_mean += 1
    assert loralib.base_fingerprint(injected) != before


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", KINDS[1:])
def test_compacted_layers_train_merge_save_and_load(kind, options, tmp_path):
    model, again = adapted(kind, **options), Net()
    model.layers[0]["q"].lora_E.requires_grad_(False)  # stays frozen
    outputs = model(INPUTS)
    expected = {name: int(layer.lora_E.count_nonzero()) for name, layer in loralib.lora_layers(model).items()}
    before = {n: (m.delta_weight(), m.scaling) for n, m in loralib.lora_layers(model).items()}
    assert list(expected.values())[:3] == [2, 0, 3] and loralib.compact(model) == expected
    assert not model.layers[0]["q"].lora_E.requires_grad
    torch.testing.assert_close(model(INPUTS), outputs, atol=1e-5, rtol=1e-5)
    for name, layer in loralib.lora_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), before[name][0], atol=1e-5, rtol=1e-5)
        assert layer.scaling == before[name][1] and (layer.lora_parameters() == []) == (expected[name] == 0)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(INPUTS), model(INPUTS))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    (model(INPUTS).square().mean() + loralib.compute_orth_regu(model)).backward()
    optimizer.step()
    trained, fingerprint = model(INPUTS), loralib.base_fingerprint(model)
    assert (trained - outputs).abs().max() > 1e-3
    for _ in range(2):  # the second merge changes nothing
        loralib.merge_adapter(model)
    torch.testing.assert_close(model(INPUTS), trained, atol=1e-4, rtol=1e-4)
    assert loralib.base_fingerprint(model) == fingerprint
    with pytest.raises(ValueError, match="merged"):
        loralib.load_adapter(model, tmp_path / "a")
    loralib.unmerge_adapter(model)
    assert torch.equal(model(INPUTS), trained)


# ---- the base -------------------------------------------------------------------------------------------------------


def test_another_revision_of_the_base_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("loralib.fingerprint._CHUNK", 7)
    model, base = adapted(k=2), Net()
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1")
    with torch.no_grad():
        base.layers[2]["q"].weight[3, 5] *= 1.02
    start = copy.deepcopy(base)
    loralib.inject(start, "lora2", ["q", "v"], r=3, k=2)
    for other, load in ((base, loralib.load_adapter), (start, loralib.start_from_adapter)):
        with refused(r"weights are not those .* a Net \(net, revision r1\) \(a new head", other):
            load(other, folder)
    loralib.load_adapter(base, folder, allow_other_base=True)
    loralib.start_from_adapter(start, folder, allow_other_base=True)
    for other in (base, start):  # the head of `base` is the adapter's
        ours, theirs = (loralib.lora_layers(each).values() for each in (model, other))
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.delta_weight(), two.delta_weight())
    torch.testing.assert_close(base(INPUTS), model(INPUTS), atol=0.1, rtol=0)


# ---- warm start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", KINDS)
def test_warm_start_keeps_the_update_under_another_lora_alpha(tmp_path, kind, options):
    model, start = adapted(kind, **options, lora_alpha=4), Net(labels=5)
    folder = loralib.save_adapter(model, tmp_path / "a")
    loralib.inject(start, kind, ["q", "v"], r=3, **options, lora_alpha=7)
    randomise(start, 0.5)  # as in a model that was trained before
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


@pytest.mark.parametrize("model, layers, says", [
    (Net(labels=1), {"k": 2, "target_modules": ["q"]}, "other modules than the model"),
    (Net(labels=1), {"k": 2, "r": 4}, r"rank 3 in the adapter, 4 .* lora2 \(r=3"),
    (Net(labels=1), {"k": 3}, r"the model needs .* lora2 \(r=3, widths=\[2\]\)"),
    (Net(labels=1), {"kind": "adalora"}, "the model needs"),
    (Net(labels=1), {"k": 2, "share_outer": True}, "leave share_outer out"),
    (nn.Sequential(nn.Linear(6, 2)), None, r"no linear layer layers.0.q: the adapter was made for a Net"),
    (Net(width=8), None, "the model needs"),
    (Net(), None, r"classifier.bias: the adapter holds \(1,\), the model needs \(2,\)"),
])  # fmt: skip
def test_adapter_is_refused_by_a_model_with_other_layers_or_another_base(tmp_path, model, layers, says):
    """copy_() would broadcast a head of one row into a head of two rows."""
    folder = loralib.save_adapter(adapted(k=2, model=Net(labels=1)), tmp_path / "a")
    if layers is not None:
        loralib.inject(model, **{"kind": "lora2", "target_modules": ["q", "v"], "r": 3} | layers)
    for use in (loralib.load_adapter, *([] if layers is None else [loralib.start_from_adapter])):
        with refused(says, model):
            use(model, folder, allow_other_base=True)


# ---- wrapped models --------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager")


def held_as(name, model):  # as accelerate's compile_regions and Lightning Fabric do it
    wrapped = nn.Module()
    vars(wrapped)[name] = model
    wrapped.forward = model.forward
    return wrapped


def averaged(model):
    wrapped = AveragedModel(model)
    wrapped.module = model  # not a copy
    return wrapped


@pytest.mark.parametrize("wrap", [
    averaged, compiled, partial(held_as, "_orig_mod"), partial(held_as, "_forward_module"),
])  # fmt: skip
def test_wrapped_model_is_saved_under_the_names_of_the_inner_model(tmp_path, wrap):
    model, base = adapted(k=2), Net()
    wrapped = wrap(model)
    config = loralib.load_adapter(base, loralib.save_adapter(wrapped, tmp_path / "a"))
    assert torch.equal(base(INPUTS), model(INPUTS)) and config.architecture == "Net"
    assert loralib.lora_layers(wrapped).keys() == loralib.lora_layers(model).keys()
    loralib.start_from_adapter(wrapped, tmp_path / "a")
    loralib.load_adapter(again := wrap(Net()), tmp_path / "a")
    torch.testing.assert_close(loralib.merge_and_unload(again)(INPUTS), model(INPUTS))
    fresh = adapted(k=2)
    randomise(fresh)
    save_checkpoint(wrapped, loralib.LowRankTraining(model), tmp_path / "checkpoint")
    load_model(wrap(fresh), tmp_path / "checkpoint")
    assert torch.equal(fresh(INPUTS), model(INPUTS))
    loralib.merge_adapter(wrapped)
    assert all(layer.merged for layer in loralib.lora_layers(wrapped).values())


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_wrapped_parts_leave_no_trace_in_the_saved_names(tmp_path, wrap):
    model, ids = adapted(modules=["query"], k=2, model=encoder()), torch.arange(4, 16).view(2, 6)
    layers, expected = model.bert.encoder.layer, model(ids).logits  # before the compiler, which would take seconds
    for i, layer in enumerate(layers):
        layers[i] = wrap(layer)
    loralib.load_adapter(base := encoder(), loralib.save_adapter(model, tmp_path / "a"))
    assert torch.equal(base(ids).logits, expected) and type(layers[0]) is type(wrap(nn.Linear(1, 1)))


# ---- merging --------------------------------------------------------------------------------------------------------


def test_merge_changes_nothing_if_one_layer_cannot_be_merged():
    model = adapted(k=2)
    prune.identity(model.layers[2]["v"], "weight")
    with refused("layers.2.v cannot be merged: the weight is computed by a hook", model):
        loralib.merge_adapter(model)
    assert not any(layer.merged for layer in loralib.lora_layers(model).values())


def test_merge_that_would_change_the_embedding_is_refused(tmp_path):
    tokens, again = torch.arange(8)[None], gpt2()
    model = adapted(modules=["c_attn", "lm_head"], r=4, k=3, model=gpt2(), head="transformer.ln_f")
    before = model(tokens).logits
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(tokens).logits, before)
    model(tokens, labels=tokens).loss.backward()
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.grad is None
    assert model.lm_head.lora_E.grad.abs().sum() > 0
    with refused(r"lm_head\.weight is tied to transformer\.wte\.weight", model):
        loralib.merge_adapter(model)


def test_trained_weight_of_an_adapted_layer_counts_once_and_extra_state_is_not_saved(tmp_path):
    class Head(nn.Linear):
        get_extra_state = dict

    base = Net()
    base.classifier.__class__ = Head
    model, merged = copy.deepcopy(base), copy.deepcopy(base)
    adapted(k=2, model=model).layers[2]["v"].weight.requires_grad_(True).data.add_(0.2)
    outputs = model(INPUTS)
    loralib.load_adapter(merged, loralib.save_adapter(model, tmp_path / "a"))
    loralib.merge_and_unload(merged)
    loralib.merge_adapter(model)
    loralib.load_adapter(base, loralib.save_adapter(model, tmp_path / "merged"))
    for other in (merged, base):
        torch.testing.assert_close(other(INPUTS), outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build, modules", [(gpt2, ["c_proj", "c_fc"]), (encoder, ["query", "layer.output"])])
def test_merged_and_unloaded_model_can_be_saved_and_loaded_by_transformers(tmp_path, build, modules):
    """merge_adapter is not enough for this: its model's state dict holds the base's weights."""
    ids = torch.arange(2, 10)[None]
    head = "transformer.ln_f" if build is gpt2 else "classifier"
    model = adapted(modules=modules, r=4, k=3, model=build(), head=head)
    expected, classes = model(ids).logits, [type(module) for module in build().modules()]
    plain = loralib.merge_and_unload(torch.compile(model, backend="eager"))
    assert plain is model and [type(module) for module in plain.modules()] == classes
    plain.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m").eval()
    for merged in (plain, loaded):
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain.requires_grad_(True)(ids).logits.sum().backward()  # and it can be trained
    assert all(parameter.grad is not None for parameter in plain.parameters())
