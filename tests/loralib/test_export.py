"""Exports of adapters, checked by loading them in peft and in plain transformers."""

import json
import shutil
from collections import OrderedDict
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import loralib
from loralib.export import main
from loralib.interop.peft_format import export_peft
from tests.loralib.small import INPUTS, KINDS, Net, adapted, encoder, gpt2, refused
from tests.loralib.test_adapter_folder import FOLDER
from tests.loralib.test_architectures import ENCODERS
from tests.nlu.tiny import make_encoder

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.arange(10, 16)[None]


@pytest.mark.parametrize("kind, options", KINDS)
def test_every_kind_exports_at_its_true_rank(tmp_path, capsys, kind, options):
    """A fully pruned module is not exported."""
    model = adapted(kind, r=4, lora_alpha=6, **options)
    live = loralib.read_adapter_config(folder := loralib.save_adapter(model, tmp_path / "ours")).ranks
    most = min(4, *options.get("widths", ()), options.get("k", 4))
    ranks = {name: min(most, r) for name, r in live.items() if r}
    assert main([str(folder), "--to", "peft", str(tmp_path / "peft"), "--base", "some/base"]) == 0
    assert f"{len(ranks)} modules of rank {min(ranks.values())} to {most}" in capsys.readouterr().out
    theirs = PeftModel.from_pretrained(Net(), tmp_path / "peft")
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    for peer in (theirs, theirs.merge_and_unload()):
        torch.testing.assert_close(peer(INPUTS), model(INPUTS), atol=1e-4, rtol=1e-4)


def test_layers_that_never_learned_are_left_out_and_an_adapter_of_these_alone_is_refused(tmp_path, capsys):
    model = adapted(k=3)
    before = export_peft(loralib.save_adapter(model, tmp_path / "all"), tmp_path / "peft")
    layers, (unlearned, *others) = loralib.lora_layers(model), before
    layers[unlearned].lora_E.data.zero_()
    assert [*export_peft(loralib.save_adapter(model, tmp_path / "some"), tmp_path / "peft")] == others
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "peft")(INPUTS), model(INPUTS), **CLOSE)
    for name in others:
        layers[name].lora_E.data.zero_()
    assert main([str(loralib.save_adapter(model, tmp_path / "zero")), "--to", "peft", str(tmp_path / "none")]) == 2
    assert "there is no update" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_modules_whose_names_end_alike_keep_their_ranks(tmp_path):
    """The name of the ReLU "2.0" also ends with ".0", but the ReLU is not a target."""

    def base():
        torch.manual_seed(0)
        inner = nn.Sequential(OrderedDict({"0": nn.ReLU(), "1+": nn.Linear(6, 6), "2": nn.Linear(6, 6)}))
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), inner, nn.Linear(6, 6)).eval()

    kept = {"0": 1, "2.1+": 2, "2.2": 3}
    model = adapted(modules=["^0$", r"2.1\+", "2.2"], model=base(), head="3", k=3)
    for name, rank in kept.items():
        model.get_submodule(name).lora_E.data.copy_((torch.arange(3) < rank).float())
    ranks = export_peft(loralib.save_adapter(model, tmp_path / "ours"), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "peft")
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert ranks == {name: layer.r["default"] for name, layer in layers.items()} == kept
    torch.testing.assert_close(theirs(INPUTS), model(INPUTS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "base, modules, trained, says",
    [
        (gpt2, ["c_attn"], "transformer.wte.weight", "'lm_head.weight' is a second name"),
        (lambda: nn.Sequential(layer := nn.Linear(6, 6), nn.Sequential(layer)), ["0"], "", "'1.0' is a second name"),
        (Net, ["v"], "layers.2.v.bias", "layers.2.v.bias was trained beside its low-rank update"),
    ],
)
def test_adapter_that_peft_would_load_wrongly_is_not_exported_but_loads_here(tmp_path, base, modules, trained, says):
    model, again = base(), base()
    loralib.inject(model, "lora", modules)
    if trained:
        model.get_parameter(trained).requires_grad_(True)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"), allow_other_base=True)
    with refused(says):
        export_peft(tmp_path / "a", tmp_path / "peft")


def test_adapter_whose_layers_are_not_loralibs_is_refused_with_what_to_do(tmp_path):
    """As peft's DoRA, rsLoRA and AdaLoRA, which a run trains with peft's own layers."""
    folder = loralib.save_adapter(encoder(), tmp_path / "a", card={"method": "dora", "how_to_load": "Call them."})
    with refused("'dora'.* has no low-rank layers of loralib.*see its README.md"):
        export_peft(folder, tmp_path / "peft")
    assert "## How to load\n\nCall them." in (folder / "README.md").read_text()


def test_peft_export_records_the_revision_only_for_the_base_of_the_adapter(tmp_path):
    model = adapted(modules=["query"], k=2, lora_dropout=0.1, model=encoder())
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1")
    for base, revision in ((None, "r1"), ("mine", None)):
        export_peft(folder, tmp_path / "peft", base)
        config = LoraConfig.from_pretrained(tmp_path / "peft")
        assert (config.base_model_name_or_path, config.revision, config.lora_dropout) == (base or "net", revision, 0.1)
        assert ("revision='r1'" in (tmp_path / "peft/README.md").read_text()) == (base is None)


def test_exports_keep_the_order_of_the_labels(tmp_path):
    """A checkpoint may number its classes in another order than the task, and its own head may have another size."""
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    numbers = {name: number for number, name in names.items()}
    encoder("roberta", num_labels=2).save_pretrained(tmp_path / "base")
    load = partial(AutoModelForSequenceClassification.from_pretrained, ignore_mismatched_sizes=True)
    start = load(tmp_path / "base", id2label=names, label2id=numbers)
    model = adapted(modules=["value"], r=2, k=2, model=start)
    folder = loralib.save_adapter(model, tmp_path / "a", base_model=str(tmp_path / "base"))
    ids = torch.arange(4, 16).view(2, 6)

    assert main([str(folder), "--to", "peft", str(tmp_path / "peft"), "--base", str(tmp_path / "base")]) == 0
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    code = (tmp_path / "peft/README.md").read_text().split("```")[1].removeprefix("python\n")
    code = code.replace("path/to/this/folder", str(tmp_path / "peft"))
    scope = {}
    exec(code, scope)
    assert scope["model"].config.id2label == names and scope["model"].config.label2id == numbers
    torch.testing.assert_close(scope["model"].eval()(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)

    assert main([str(folder), "--to", "merged", str(tmp_path / "m"), "--base", str(tmp_path / "base")]) == 0
    loralib.load_adapter(loaded := load(tmp_path / "base", num_labels=3, problem_type="regression"), folder)
    for config in (load(tmp_path / "m").config, loaded.config):
        assert config.id2label == names and config.label2id == numbers and config.problem_type is None
    for written in (folder, tmp_path / "peft", tmp_path / "m"):
        assert "| labels | 0 contradiction, 1 neutral, 2 entailment |" in (written / "README.md").read_text()


def test_peft_switches_between_exported_adapters_and_mixes_them_in_one_batch(tmp_path):
    """Each with its own head, as docs/adapters.md says for several adapters on one base."""
    models, theirs = {"a": ("lora2", ["query"]), "b": ("lora", ["value"])}, None
    for name, (kind, modules) in models.items():
        models[name] = adapted(kind, modules, model=encoder())
        export_peft(loralib.save_adapter(models[name], tmp_path / name), tmp_path / f"peft_{name}")
        if theirs is None:
            theirs = PeftModel.from_pretrained(encoder(), tmp_path / f"peft_{name}", adapter_name=name).eval()
        else:
            theirs.load_adapter(tmp_path / f"peft_{name}", name)
    expected = {name: model(IDS).logits for name, model in models.items()}
    mixed = theirs(IDS.repeat(2, 1), adapter_names=["a", "b"]).logits
    for row, name in enumerate("ab"):
        theirs.set_adapter(name)
        for logits in (theirs(IDS).logits, mixed[row : row + 1]):
            torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=1e-4)


# ---- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other_base", [False, True])
def test_merged_checkpoint_loads_in_plain_transformers(tmp_path, capsys, other_base):
    """The base's tokenizer is saved too, since the adapter has none. Another base is accepted only if the user asks. A
    run's folder stands for its adapter."""
    base, out = make_encoder(tmp_path / "base"), tmp_path / "out"
    load = AutoModelForSequenceClassification.from_pretrained
    model = adapted(modules=["query", "layer.output"], k=2, model=load(base, num_labels=1))
    folder = loralib.save_adapter(model, tmp_path / "run/adapter")
    for name in ("model.safetensors", "config.json", "optimizer.pt"):  # a checkpoint beside the adapter
        (folder / name).write_text("{}")
    command = [str(folder.parent if other_base else folder), "--to", "merged", str(out), "--base", str(base)]
    if other_base:
        other = load(base, num_labels=1)
        other.get_input_embeddings().weight.data[9] += 1  # a token that IDS does not contain
        other.save_pretrained(base)
        assert main(command) == 2 and "weights are not those" in capsys.readouterr().err
        command += ["--allow_other_base", "--dtype", "bfloat16"]
    assert main(command) == 0
    merged, info = load(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and merged.config.num_labels == 1
    assert not (out / "optimizer.pt").exists()
    assert not any(type(m).__module__.startswith("loralib") for m in merged.modules())
    assert merged.dtype == (torch.bfloat16 if other_base else torch.float32)
    close = {"atol": 0.05, "rtol": 0.05} if other_base else CLOSE
    torch.testing.assert_close(merged.eval().float()(IDS).logits, model(IDS).logits, **close)
    tokenizers = [AutoTokenizer.from_pretrained(place)("the cat sat") for place in (base, out)]
    assert tokenizers[0] == tokenizers[1]


def test_merged_checkpoint_has_the_padding_token_of_the_run(tmp_path):
    """Funnel zeroes the token's embedding if it is built with one, so that the base would not be the adapter's."""
    model = encoder("funnel", ENCODERS["funnel"])
    model.save_pretrained(tmp_path / "base")
    loralib.inject(model, "lora", "all-linear")
    model.config.pad_token_id = 0  # as the Trainer sets it from the tokenizer
    folder = loralib.save_adapter(model, tmp_path / "a")
    assert main([str(folder), "--to", "merged", str(tmp_path / "m"), "--base", str(tmp_path / "base")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "m").pad_token_id == 0


# ---- adapters of peft ----------------------------------------------------------------------------------------------


def test_an_adapter_without_a_head_is_exported_without_a_task_type(tmp_path):
    model = adapted(modules=["value"], k=2, model=encoder())
    model.classifier = encoder().classifier.requires_grad_(False)
    export_peft(loralib.save_adapter(model, tmp_path / "a"), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(encoder(), tmp_path / "peft").eval()
    assert theirs.peft_config["default"].task_type is None
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_export_of_pefts_adalora_keeps_trained_tokens(tmp_path):
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True,
                           task_type="CAUSAL_LM", trainable_token_indices={"wte": [1, 2]})  # fmt: skip
    model, ids = get_peft_model(gpt2(), config).eval(), torch.arange(8)[None]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "theirs")
    export_peft(tmp_path / "theirs", tmp_path / "lora")
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "lora").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, tensor, says", [
    ({"peft_type": "LORA"}, "", "peft_type is 'LORA'; only ADALORA and LORA2"),
    ({}, "classifier.base_layer.weight", "save_embedding_layers=False"),
    ({}, "layers.0.q.lora2_adapters.lora_A_0", "cannot be read"),
    ({"r": None}, "", "cannot be read"),
])  # fmt: skip
def test_a_peft_adapter_of_another_kind_and_a_damaged_one_are_refused(tmp_path, change, tensor, says):
    folder = shutil.copytree(FOLDER / "peft_lora2", tmp_path / "a")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    save_file(load_file(weights) | ({f"base_model.model.{tensor}": torch.ones(2)} if tensor else {}), weights)
    with refused(says):
        export_peft(folder, tmp_path / "peft")
    before = config.read_bytes()
    with refused("holds an adapter of loralib"):  # nor is an adapter of the other format replaced
        export_peft(FOLDER / "lora2", shutil.copytree(FOLDER / "lora", tmp_path / "b"))
    assert config.read_bytes() == before
