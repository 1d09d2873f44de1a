"""Saved adapters: same logits on reload, exact sizes, and every damage refused with the model as it was."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import loralib

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]


def snapshot(model):
    return [(n, type(m)) for n, m in model.named_modules()], {n: t.clone() for n, t in model.state_dict().items()}, [
        p.requires_grad for p in model.parameters()
    ]  # fmt: skip


def assert_unchanged(model, before):
    modules, state, flags = snapshot(model)
    assert modules == before[0] and flags == before[2] and state.keys() == before[1].keys()
    assert all(torch.equal(state[n], t) for n, t in before[1].items())


# ---- real weights ---------------------------------------------------------------------------------------------------


def test_a_trained_adapter_reloads_with_the_same_bits(pretrained, lora2):
    model, pattern, folder = lora2
    base = pretrained.base()
    untouched = pretrained.logits(base)
    config = loralib.load_adapter(base, folder)
    assert torch.equal(pretrained.logits(base), pretrained.logits(model))
    assert (pretrained.logits(base) - untouched).abs().max() > 0.05
    assert config.kind == "lora2" and config.base_model == "all-MiniLM-L6-v2" and config.card == {"task": "stsb"}
    assert config.ranks == {name: sum(flags) for name, flags in pattern.items()}
    assert len(set(config.ranks.values())) > 2 and sum(config.ranks.values()) == 36 * 2
    assert sorted(n for n, p in base.named_parameters() if p.requires_grad) == sorted(
        {*loralib.lora_state_dict(base), "classifier.weight", "classifier.bias"}
    )
    small = pretrained.base()
    loralib.load_adapter(small, folder, compact=True)
    torch.testing.assert_close(pretrained.logits(small), pretrained.logits(model), atol=1e-6, rtol=1e-6)
    assert {name: layer.r for name, layer in loralib.lora_layers(small).items()} == config.ranks
    card = (folder / "README.md").read_text()
    assert "stsb" in card and "all-MiniLM-L6-v2" in card and "load_adapter" in card


def test_saved_whole_it_reloads_bit_for_bit(pretrained, lora2, tmp_path):
    model = lora2[0]
    loralib.save_adapter(model, tmp_path / "whole", compact=False)
    base = pretrained.base()
    loralib.load_adapter(base, tmp_path / "whole")
    assert torch.equal(pretrained.logits(base), pretrained.logits(model))
    assert all(layer.r == 8 for layer in loralib.lora_layers(base).values())


def test_stored_size_is_what_the_rank_pattern_says(lora2):
    model, pattern, folder = lora2
    expected = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier"))
    for name, flags in pattern.items():
        out, width = model.get_submodule(name).weight.shape
        if any(flags):
            expected += 8 * (out + width) + sum(flags) * (8 + 8 + 1)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == expected
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert 4 * expected < size < 4 * expected + 30_000


@pytest.mark.parametrize(
    "kind, options",
    [
        ("lora", {}),
        ("adalora", {"init": "orthogonal"}),
        ("lora2", {"k": 1}),
        ("lora2", {"k": 4, "share_outer": True, "init": "orthogonal"}),
        ("multiscale", {"widths": (6, 4), "lora_dropout": 0.1}),
    ],
)
def test_every_kind_on_bfloat16_frozen_weights(pretrained, tmp_path, kind, options):
    model = pretrained.base()
    loralib.inject(model, kind, ["query", "layer.output"], r=4, **options)
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    loralib.cast_frozen(model, torch.bfloat16)
    pattern = pretrained.train(model, steps=6)
    loralib.save_adapter(model, tmp_path / "a", rank_pattern=pattern)
    again = pretrained.base()
    loralib.load_adapter(again, tmp_path / "a")
    assert torch.isfinite(pretrained.logits(again)).all()
    loralib.cast_frozen(again, torch.bfloat16)
    assert torch.equal(pretrained.logits(again), pretrained.logits(model))
    assert {n: type(m) for n, m in loralib.lora_layers(again).items()} == {
        n: type(m) for n, m in loralib.lora_layers(model).items()
    }
    small = pretrained.base()
    loralib.load_adapter(small, tmp_path / "a", compact=True)
    if pattern:
        loralib.compact(model, pattern)
    ours, theirs = list(small.parameters()), list(model.parameters())  # shared parameters come once in both
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    # saving what was loaded gives the same file
    loralib.save_adapter(again, tmp_path / "b")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("trained", ["bias", "."])
def test_methods_without_layers_save_the_trained_parameters(pretrained, tmp_path, trained):
    model = pretrained.base().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or "classifier" in name)
    pretrained.train(model, steps=2, lr=1e-3)
    loralib.save_adapter(model, tmp_path / "a")
    base = pretrained.base()
    config = loralib.load_adapter(base, tmp_path / "a")
    assert config.kind == "parameters" and config.groups == []
    assert torch.equal(pretrained.logits(base), pretrained.logits(model))


def test_another_revision_of_the_base_is_refused(pretrained, lora2):
    base = pretrained.base()
    with torch.no_grad():
        base.bert.encoder.layer[5].intermediate.dense.weight[3, 5] *= 1.02
    before = snapshot(base)
    with pytest.raises(ValueError, match="weights are not those") as error:
        loralib.load_adapter(base, lora2[2])
    assert "\n" not in str(error.value)
    assert_unchanged(base, before)
    loralib.load_adapter(base, lora2[2], allow_other_base=True)
    assert (pretrained.logits(base) - pretrained.logits(lora2[0])).abs().max() < 1e-2


def test_merge_is_undone_exactly_and_the_same_base_is_known(pretrained, lora2, tmp_path):
    base = pretrained.base()
    loralib.load_adapter(base, lora2[2])
    before, logits = {n: t.clone() for n, t in base.state_dict().items()}, pretrained.logits(base)
    loralib.merge_adapter(base)
    loralib.merge_adapter(base)
    torch.testing.assert_close(pretrained.logits(base), logits, atol=1e-5, rtol=1e-5)
    loralib.save_adapter(base, tmp_path / "merged")  # the base counts with its own weight
    assert (
        loralib.read_adapter_config(tmp_path / "merged").base_fingerprint
        == loralib.read_adapter_config(lora2[2]).base_fingerprint
    )
    with pytest.raises(ValueError, match="merged"):
        loralib.load_adapter(base, lora2[2])
    loralib.unmerge_adapter(base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


# ---- damage ---------------------------------------------------------------------------------------------------------


def tiny(model_type="bert", **changes):
    torch.manual_seed(0)
    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(model_type, **{**config, "vocab_size": 30, **changes})
    return AutoModelForSequenceClassification.from_config(config).eval()


def adapted(kind="lora2", modules=SIX, **options):
    model = tiny()
    loralib.inject(model, kind, modules, r=3, **options)
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    for layer in loralib.lora_layers(model).values():
        for parameter in layer.lora_parameters():
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def saved(tmp_path):
    return loralib.save_adapter(adapted(k=2), tmp_path / "adapter")


def rewrite(folder, change):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def resave(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


DAMAGE = {
    "truncated tensors": lambda f: os.truncate(f / "adapter_model.safetensors", 100),
    "one bit of a tensor": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (b := (f / "adapter_model.safetensors").read_bytes())[:-1] + bytes([b[-1] ^ 1])
    ),
    "another tensor more": lambda f: resave(f, lambda t: t.update(extra=torch.zeros(1))),
    "no tensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no configuration": lambda f: (f / "adapter_config.json").unlink(),
    "truncated configuration": lambda f: os.truncate(f / "adapter_config.json", 100),
    "a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "unknown key": lambda f: rewrite(f, lambda c: c.update(weights="../../elsewhere.safetensors")),
    "missing key": lambda f: rewrite(f, lambda c: c.pop("head")),
    "other alpha": lambda f: rewrite(f, lambda c: c["groups"][0].update(lora_alpha=17)),
    "newer format": lambda f: rewrite(f, lambda c: c.update(format_version=2)),
    "peft's": lambda f: rewrite(f, lambda c: c.update(peft_type="LORA")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(saved, damage):
    model = tiny()
    before = snapshot(model)
    DAMAGE[damage](saved)
    with pytest.raises(ValueError) as error:
        loralib.load_adapter(model, saved)
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "base, says",
    [
        (lambda: tiny("roberta"), "made for a BertForSequenceClassification, this is a RobertaFor"),
        (lambda: tiny(num_hidden_layers=1), "no linear layer bert.encoder.layer.1"),
        (lambda: tiny(hidden_size=16), "shape"),
        (lambda: tiny(num_labels=3), "classifier.bias has shape"),
        (lambda: adapted(modules=["query"]), "load it into the plain base"),
        (lambda: tiny().to("meta"), "meta device"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(saved, base, says):
    model = base()
    names = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=says) as error:
        loralib.load_adapter(model, saved)
    assert "\n" not in str(error.value)
    assert [(n, type(m)) for n, m in model.named_modules()] == names
    assert not any("lora" in n for n, _ in names) or loralib.lora_layers(model)


def test_an_injected_model_with_the_same_layers_takes_the_adapter(saved):
    first, second = adapted(k=2), tiny()
    loralib.load_adapter(first, saved)
    loralib.load_adapter(second, saved)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_a_folder_with_other_files_is_left_alone(tmp_path, monkeypatch):
    model = adapted(k=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        loralib.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    folder = loralib.save_adapter(model, tmp_path / "a" / "b")
    first = (folder / "adapter_config.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        loralib.save_adapter(model, folder, base_model="x")
    assert (folder / "adapter_config.json").read_bytes() == first
    assert [p.name for p in folder.parent.iterdir()] == ["b"]
    monkeypatch.undo()
    loralib.save_adapter(model, folder, base_model="x")
    assert [p.name for p in folder.parent.iterdir()] == ["b"] and len(list(folder.iterdir())) == 3
    with pytest.raises(ValueError, match="JSON"):
        loralib.save_adapter(model, tmp_path / "c", card={"x": object()})
    assert not (tmp_path / "c").exists()


def test_nothing_to_save():
    with pytest.raises(ValueError, match="nothing to save"):
        loralib.save_adapter(tiny().requires_grad_(False), "unused")


# ---- compacting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options", [("adalora", {}), ("lora2", {"k": 2}), ("lora2", {"k": 2, "share_outer": True}),
                      ("multiscale", {"widths": (4, 2)})],
)  # fmt: skip
def test_compacted_layers_of_differing_rank_do_everything(kind, options, tmp_path):
    model = adapted(kind, **options)
    pattern = {}
    for i, (name, layer) in enumerate(loralib.lora_layers(model).items()):
        flags = [j < i % 4 for j in range(3)][::-1]  # ranks 0 to 3
        pattern[name] = flags
        layer.lora_E.data *= torch.tensor(flags)
    ids = torch.arange(12).view(2, 6)
    logits, delta = model(ids).logits, {n: m.delta_weight() for n, m in loralib.lora_layers(model).items()}
    scaling = {layer.scaling for layer in loralib.lora_layers(model).values()}
    assert loralib.compact(model, pattern) == {n: sum(f) for n, f in pattern.items()}
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-6, rtol=1e-6)
    layers = loralib.lora_layers(model)
    assert {layer.scaling for layer in layers.values()} == scaling
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta_weight(), delta[name], atol=1e-6, rtol=1e-6)
    assert all(not layer.lora_parameters() for n, layer in layers.items() if not any(pattern[n]))

    folder = loralib.save_adapter(model, tmp_path / "a")
    again = tiny()
    loralib.load_adapter(again, folder)
    assert torch.equal(again(ids).logits, model(ids).logits)

    assert loralib.compute_orth_regu(model).isfinite()
    with pytest.raises(ValueError, match="has rank"):
        loralib.RankAllocator(model, 3, 1, 1, 1, 1, 0.85, 0.85)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        (model(ids, labels=torch.tensor([0, 1])).loss + loralib.compute_orth_regu(model)).backward()
        optimizer.step()
    trained = model(ids).logits
    assert (trained - logits).abs().max() > 1e-3
    loralib.merge_adapter(model)
    torch.testing.assert_close(model(ids).logits, trained, atol=1e-5, rtol=1e-5)
    loralib.unmerge_adapter(model)
    assert torch.equal(model(ids).logits, trained)


def test_a_rank_pattern_that_does_not_fit_changes_nothing():
    model = adapted(k=2)
    layers = loralib.lora_layers(model)
    whole = {name: [True] * 3 for name in layers}
    first = next(iter(layers))
    for pattern, says in [
        ({**whole, first: [True] * 4}, "whose rank is 3"),
        ({first: [True] * 3}, "does not name"),
        ({**whole, "other": [True] * 3}, "other"),
    ]:
        with pytest.raises(ValueError, match=says):
            loralib.compact(model, pattern)
    assert all(layer.r == 3 for layer in layers.values())


def test_without_a_pattern_zeros_are_pruned_but_an_untrained_adapter_is_kept(tmp_path):
    model = adapted(k=2)
    layers = list(loralib.lora_layers(model).values())
    layers[0].lora_E.data[1] = 0
    ranks = loralib.compact(model)
    assert list(ranks.values()) == [2] + [3] * 11
    fresh = tiny()
    loralib.inject(fresh, "lora2", SIX, r=3, k=2)
    assert set(loralib.compact(fresh).values()) == {3}


def test_conv1d_and_tied_heads(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=30, n_positions=16, pad_token_id=0)
        return GPT2ForSequenceClassification(config).eval()

    model = gpt2()
    loralib.inject(model, "lora2", ["c_attn", "c_proj"], r=2, k=2)
    loralib.mark_only_lora_as_trainable(model)
    model.score.requires_grad_(True)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    folder = loralib.save_adapter(model, tmp_path / "a")
    again = gpt2()
    loralib.load_adapter(again, folder)
    ids = torch.arange(1, 13).view(2, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    loralib.merge_adapter(again)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_buffers_of_trained_modules_travel(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    model = build()
    loralib.inject(model, "lora2", ["0"], r=2, k=2)
    loralib.mark_only_lora_as_trainable(model)
    model[1].requires_grad_(True)
    model.train()(torch.randn(16, 4))
    folder = loralib.save_adapter(model.eval(), tmp_path / "a")
    shutil.move(folder, tmp_path / "moved")
    again = build().eval()
    loralib.load_adapter(again, tmp_path / "moved")
    x = torch.randn(5, 4)
    assert torch.equal(again(x), model(x))
