"""Exports, judged by peft and by plain transformers, on a trained adapter over real weights."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import loralib
from loralib.adapter import merge_into
from loralib.adapter_files import TOKENIZER_FILES
from loralib.export import export_merged, main
from loralib.peft_format import decompose, export_peft, import_peft, start_factors
from tests.loralib.small import INPUTS, Net, adapted, encoder, factors_of, gpt2, largest_file, refused
from tests.loralib.test_adapter_files import FOLDER

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("lora", {}), ("adalora", {}), ("lora2", {"k": 1}), ("lora2", {"k": 3, "share_outer": True}),
        ("multiscale", {"widths": (6, 2)}), ("multiscale", {"widths": (2, 6)}),
    ],
)  # fmt: skip
def test_every_kind_exports_at_its_true_rank(tmp_path, capsys, kind, options):
    """Also where the allocator has left nothing of a module."""
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


def test_modules_whose_names_end_alike_keep_their_ranks(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).eval()

    model = adapted(modules=["0", "2.0", "2.1"], model=base(), head="1", k=3)
    for name, kept in {"0": 1, "2.0": 2, "2.1": 3}.items():
        model.get_submodule(name).lora_E.data.copy_((torch.arange(3) < kept).float())
    ranks = export_peft(loralib.save_adapter(model, tmp_path / "ours"), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "peft")
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert ranks == {name: layer.r["default"] for name, layer in layers.items()} == {"0": 1, "2.0": 2, "2.1": 3}
    torch.testing.assert_close(theirs(INPUTS), model(INPUTS), atol=1e-4, rtol=1e-4)
    import_peft(again := base(), tmp_path / "peft")
    torch.testing.assert_close(again(INPUTS), model(INPUTS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "base, modules, trained, lacks",
    [
        (gpt2, ["c_attn"], "transformer.wte.weight", "lm_head.weight"),
        (lambda: nn.Sequential(layer := nn.Linear(6, 6), nn.Sequential(layer)), ["0"], "", "1.0"),
        (encoder, ["query"], "bert.embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.weight"),
        (encoder, ["query"], "classifier.weight", "classifier.bias"),
    ],
)
def test_what_peft_would_load_wrongly_is_refused_and_loads_here(tmp_path, base, modules, trained, lacks):
    model, again = base(), base()
    loralib.inject(model, "lora", modules)
    loralib.mark_only_lora_as_trainable(model)
    if trained:
        model.get_parameter(trained).requires_grad_(True)
    loralib.load_adapter(again, loralib.save_adapter(model, tmp_path / "a"), allow_other_base=True)
    with refused(f"this adapter is without '{lacks}'"):
        export_peft(tmp_path / "a", tmp_path / "peft")


def test_a_weight_that_trained_beside_its_update_is_refused(tmp_path):
    model = adapted(k=2)
    model.layers[2]["v"].bias.requires_grad_(True)
    with refused("layers.2.v.bias was trained beside its low-rank update"):
        export_peft(loralib.save_adapter(model, tmp_path / "a"), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_an_export_replaces_another_and_records_revision_and_dropout(tmp_path):
    model = adapted(k=2, lora_dropout=0.1)
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1")
    for base in (None, "mine"):
        export_peft(folder, tmp_path / "peft", base)
        config = LoraConfig.from_pretrained(tmp_path / "peft")
        revision = None if base else "r1"  # it is of the base that the adapter records
        assert (config.base_model_name_or_path, config.revision, config.lora_dropout) == (base or "net", revision, 0.1)


def test_exports_keep_the_order_of_the_labels(tmp_path, capsys):
    """A checkpoint may number its classes in another order than the task; both exports print the names in its order."""
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    numbers = {name: number for number, name in names.items()}
    encoder("roberta", num_labels=3).save_pretrained(tmp_path / "base")
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names, label2id=numbers)
    model = adapted(modules=["query"], r=2, k=2, model=start)
    folder = loralib.save_adapter(model, tmp_path / "a", base_model=str(tmp_path / "base"))
    assert "0 contradiction, 1 neutral, 2 entailment" in (folder / "README.md").read_text()
    ids = torch.arange(4, 16).view(2, 6)

    assert main([str(folder), "--to", "peft", str(tmp_path / "peft")]) == 0
    assert "labels: 0 contradiction, 1 neutral, 2 entailment" in capsys.readouterr().out
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    code = (tmp_path / "peft/README.md").read_text().split("```")[1].removeprefix("python\n")
    code = code.replace("path/to/this/folder", str(tmp_path / "peft"))
    scope = {}
    exec(code, scope)
    assert scope["model"].config.id2label == names and scope["model"].config.label2id == numbers
    torch.testing.assert_close(scope["model"].eval()(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)

    assert main([str(folder), "--to", "merged", str(tmp_path / "m"), "--base", str(tmp_path / "base")]) == 0
    assert "labels: 0 contradiction, 1 neutral, 2 entailment" in capsys.readouterr().out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").config
    assert merged.id2label == names and merged.label2id == numbers


# ---- merged ---------------------------------------------------------------------------------------------------------


def test_the_merged_checkpoint_is_plain_transformers(pretrained, lora2, tmp_path):
    out = tmp_path / "merged"
    assert main([str(lora2[2]), "--to", "merged", str(out), "--base", str(pretrained.path)]) == 0
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_labels == 1
    assert not any(type(m).__module__.startswith("loralib") for m in model.modules())
    torch.testing.assert_close(pretrained.logits(model), pretrained.logits(lora2[0]), **CLOSE)
    export_merged(lora2[2], tmp_path / "half", str(pretrained.path), dtype=torch.bfloat16)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert stored.dtype == torch.bfloat16
    logits = pretrained.logits(lora2[0])
    moved = (pretrained.logits(pretrained.base()) - logits).abs().max()
    assert 0 < (pretrained.logits(stored.float()) - logits).abs().max() < 0.1 * moved
    text = ["A plane is taking off.", "Ein Flugzeug."]
    assert AutoTokenizer.from_pretrained(out)(text) == pretrained.tokenizer(text)


def test_another_base_and_precision_are_merged_where_asked_for(tmp_path, capsys):
    base = encoder()
    base.save_pretrained(tmp_path / "base")
    loralib.save_adapter(model := adapted(modules=["query"], k=2, model=base), tmp_path / "a")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    other.bert.embeddings.word_embeddings.weight.data[5] += 1
    other.save_pretrained(tmp_path / "other")
    command = [str(tmp_path / "a"), "--to", "merged", str(tmp_path / "m"), "--base", str(tmp_path / "other")]
    assert main(command) == 2 and "weights are not those" in capsys.readouterr().err
    assert main([*command, "--allow_other_base", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'm'}: plain bfloat16 checkpoint")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype="auto")
    assert merged.dtype == torch.bfloat16
    ids = torch.arange(10, 16)[None]
    torch.testing.assert_close(merged.float()(ids).logits, model(ids).logits, atol=0.1, rtol=0.1)


def test_a_checkpoint_whose_head_has_another_size_is_a_base(tmp_path):
    encoder(num_labels=3).save_pretrained(tmp_path / "base")
    options = {"num_labels": 2, "problem_type": "multi_label_classification", "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    loralib.save_adapter(adapted(modules=["query"], k=2, model=model), tmp_path / "a")
    export_merged(tmp_path / "a", tmp_path / "m", str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert (merged.config.num_labels, merged.config.problem_type) == (2, "multi_label_classification")
    ids = torch.arange(10, 16)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, **CLOSE)


def test_a_merge_leaves_flags_and_transformers_settings_alone(tmp_path):
    base = encoder()
    base.save_pretrained(tmp_path / "base")
    loralib.save_adapter(adapted(modules=["query"], k=2, model=encoder()), tmp_path / "a")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    export_merged(tmp_path / "a", tmp_path / "m", str(tmp_path / "base"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    base.bert.embeddings.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    merge_into(base, tmp_path / "a")
    assert [parameter.requires_grad for parameter in base.parameters()] == flags


# ---- import ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft_adapter(pretrained, tmp_path, request):
    """A LoRA of peft's own on real weights, two ranks, with the logits peft gives."""
    torch.manual_seed(5)
    settings = LoraConfig(task_type="SEQ_CLS", r=6, lora_alpha=9, target_modules=["query", "value"],
                          use_rslora=getattr(request, "param", False), rank_pattern={"value": 3},
                          alpha_pattern={r"layer\.1\..*value": 5})  # fmt: skip
    theirs = get_peft_model(pretrained.base(), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", pretrained.logits(theirs)


def test_an_import_by_svd_has_the_settings_that_are_asked_for(pretrained, peft_adapter, tmp_path):
    """And every singular value, also those beyond the rank that peft's update has: they can grow."""
    flags = ["--kind", "lora2", "--r", "10", "--lora_alpha", "5"]
    for widths, expected in (([], [8]), (["--widths", "12"], [12])):
        out = str(tmp_path / f"ours-{expected[0]}")
        command = [str(peft_adapter[0]), "--to", "loralib", out, "--base", str(pretrained.path)]
        assert main([*command, *flags, *widths]) == 0
        config = loralib.read_adapter_config(out)
        (group,) = config.groups
        assert (group.kind, group.r, group.widths, group.lora_alpha) == ("lora2", 10, expected, 5.0)
        assert set(group.rank_pattern.values()) == {"1" * 10}
        assert config.base_model == pretrained.path.name


def test_an_adapter_without_a_head_goes_to_peft_and_back(tmp_path):
    base = encoder()
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(10, 16)[None]
    model = adapted(modules=["query"], k=2, model=encoder())
    model.classifier = copy.deepcopy(base.classifier).requires_grad_(False)
    loralib.save_adapter(model, tmp_path / "a", base_model=str(tmp_path / "base"))
    export_peft(tmp_path / "a", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(encoder(), tmp_path / "peft").eval()
    assert theirs.peft_config["default"].task_type is None
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    command = [str(tmp_path / "peft"), "--to", "loralib", str(tmp_path / "back"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    loralib.load_adapter(back := encoder(), tmp_path / "back")
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("peft_adapter", [False, True], indirect=True, ids=["", "rank-stabilised"])
def test_a_peft_lora_imports_with_the_same_logits(pretrained, peft_adapter, tmp_path, capsys):
    folder, logits = peft_adapter
    out = tmp_path / "ours"
    assert main([str(folder), "--to", "loralib", str(out), "--base", str(pretrained.path)]) == 0
    model = pretrained.base()
    config = loralib.load_adapter(model, out)
    assert config.kind == "lora" and set(config.ranks.values()) == {3, 6} and config.base_model == pretrained.path.name
    torch.testing.assert_close(pretrained.logits(model), logits, **CLOSE)
    export_peft(out, tmp_path / "back")  # and back
    back = PeftModel.from_pretrained(pretrained.base(), tmp_path / "back")
    torch.testing.assert_close(pretrained.logits(back), logits, **CLOSE)


@pytest.mark.parametrize(
    "change, tensor, says",
    [
        ({"alora_invocation_tokens": [3]}, "", "alora_invocation_tokens"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "", "path_initial_model_for_weight_conversion"),
        ({"alpha_pattern": {"(q+)+": 2}}, "", "repeats a group"),
        ({"bias": "all"}, "", "trained biases"),
        ({"use_dora": True}, "", "use_dora"),
        ({"init_lora_weights": "lora_ga"}, "", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "orthogonal"}, "classifier.base_layer.weight", "save_embedding_layers=False"),
        ({}, "other.weight", "no parameter other.weight: the adapter was made for a model that peft adapted, this"),
    ],
)
def test_a_peft_adapter_that_is_more_than_lora_is_refused(tmp_path, change, tensor, says):
    folder, model = shutil.copytree(FOLDER / "peft", tmp_path / "a"), Net()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    save_file(load_file(weights) | ({f"base_model.model.{tensor}": torch.ones(2)} if tensor else {}), weights)
    with refused(says, model):
        import_peft(model, folder)


@pytest.mark.parametrize("patterns", [{"d.q+v": 2}, {".*q.v": 2}, {"q+v": 2}])
def test_module_names_with_the_signs_of_patterns_scale_as_in_peft(tmp_path, patterns):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"d": nn.ModuleDict({"q+v": nn.Linear(6, 5)})})

    theirs = get_peft_model(base(), LoraConfig(target_modules=["q+v"], r=2, lora_alpha=4, alpha_pattern=patterns))
    nn.init.normal_(theirs.base_model.model["d"]["q+v"].lora_B["default"].weight)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base()
    import_peft(ours, tmp_path / "theirs")
    delta = theirs.base_model.model["d"]["q+v"].get_delta_weight("default")
    torch.testing.assert_close(ours["d"]["q+v"].delta_weight(), delta)


@pytest.mark.parametrize("options", [
    {"kind": "foo"}, {"kind": "adalora", "r": 0}, {"kind": "adalora", "r": 2.5}, {"kind": "adalora", "lora_alpha": 0},
])  # fmt: skip
def test_settings_of_an_import_are_checked(options):
    name, model = list(options)[-1], Net()
    with refused(f"{name} must be", model):
        import_peft(model, FOLDER / "peft", **options)


@pytest.mark.parametrize("kind, widths", [("lora2", ()), ("lora2", (2, 2)), ("adalora", (2,))])
def test_an_import_takes_as_many_widths_as_its_kind_has(kind, widths):
    model = Net()
    with refused(f"the number of widths of kind '{kind}' is ", model):
        import_peft(model, FOLDER / "peft", kind, widths=widths)


@pytest.mark.parametrize("kind, r, widths", [("lora2", 4, (2,)), ("adalora", 4, ()), ("multiscale", 8, (7, 6))])
def test_a_start_by_svd_is_the_best_approximation(pretrained, peft_adapter, kind, r, widths):
    exact, start = pretrained.base(), pretrained.base()
    import_peft(exact, peft_adapter[0])
    import_peft(start, peft_adapter[0], kind, r=r, widths=widths, lora_alpha=4.0)
    kept = min(r, *widths, 99)
    for name, layer in loralib.lora_layers(start).items():
        whole = exact.get_submodule(name).delta_weight().detach()
        sigma = torch.linalg.svdvals(whole.double())
        error = torch.linalg.matrix_norm((whole - layer.delta_weight()).double())
        torch.testing.assert_close(error, sigma[kept:].square().sum().sqrt(), atol=1e-5, rtol=1e-4)
    if kept >= 6:
        torch.testing.assert_close(pretrained.logits(start), peft_adapter[1], **CLOSE)
    if widths == (2,):  # and it trains and prunes
        assert len(pretrained.train(start, steps=6, lr=1e-3)) == 12


# ---- errors -----------------------------------------------------------------------------------------------


def test_decomposition_against_a_dense_svd():
    torch.manual_seed(0)
    left, right = torch.randn(20, 5), torch.randn(4, 9)
    core = torch.randn(5, 4) @ torch.diag(torch.tensor([1.0, 0, 2, 1]))
    u, sigma, vt = decompose(left, core, right)
    dense = left.double() @ core.double() @ right.double()
    assert len(sigma) == 3
    torch.testing.assert_close(u * sigma @ vt, dense)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(dense)[:3])
    factors = start_factors((u, sigma, vt), 6, (5, 4), 2.0, torch.Generator().manual_seed(0))
    chain = factors["lora_B.0"] @ factors["lora_B.1"] @ factors["lora_B.2"] @ torch.diag(factors["lora_E"])
    chain = chain @ factors["lora_A.2"] @ factors["lora_A.1"] @ factors["lora_A.0"] * 2
    torch.testing.assert_close(chain, dense.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recorded, kept", [
    ("microsoft/deberta-v3-base", "microsoft/deberta-v3-base"), ("bert-base-cased", "bert-base-cased"), ("", None),
    (5, None), ("../me/model", "model"), ("~/models/bert/", "bert"), ("C:\\me\\model", "model"),
])  # fmt: skip
def test_an_import_keeps_the_base_s_name_on_the_hub_and_the_tokenizer(
    pretrained, peft_adapter, tmp_path, recorded, kept
):
    folder, _ = peft_adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": recorded, "revision": "r1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pretrained.tokenizer.save_pretrained(folder)
    assert main([str(folder), "--to", "loralib", str(tmp_path / "ours"), "--base", str(pretrained.path)]) == 0
    ours = loralib.read_adapter_config(tmp_path / "ours")
    assert (ours.base_model, ours.base_revision) == (kept, None)  # the folder need not be that revision
    assert (tmp_path / "ours/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_merged_checkpoint_has_the_adapter_s_tokenizer(pretrained, lora2, tmp_path, capsys):
    """A damaged one of the base is an error where the adapter has none, and nothing of the base's stays beside it."""
    adapter, base = shutil.copytree(lora2[2], tmp_path / "a"), shutil.copytree(pretrained.path, tmp_path / "base")
    for path in adapter.iterdir():
        if path.name in TOKENIZER_FILES:
            path.unlink()
    (base / "tokenizer.json").write_text("{")
    command = [str(adapter), "--to", "merged", str(tmp_path / "out"), "--base", str(base)]
    assert main(command) == 2 and "cannot be loaded" in capsys.readouterr().err
    pretrained.tokenizer.save_pretrained(adapter)
    assert main(command) == 0
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name in TOKENIZER_FILES} == {
        path.name for path in adapter.iterdir() if path.name in TOKENIZER_FILES
    }
    assert merged("a cat sat")["input_ids"] == pretrained.tokenizer("a cat sat")["input_ids"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere", "--to", "peft", "out"], "not an adapter folder"),
        (["nowhere", "--to", "merged", "out"], "--base"),
        (["nowhere", "--to", "onnx", "out"], "invalid choice"),
        (["nowhere", "--to", "peft", "out", "--dtype", "bfloat16"], "belongs to --to merged"),
        (["nowhere", "--to", "loralib", "out", "--base", "x", "--r", "4"], "--r is for truncated SVD"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_bad_path_are_one_line(pretrained, lora2, tmp_path, capsys):
    for to in (["peft"], ["merged", "--base", str(pretrained.path)]):
        command = [str(lora2[2]), str(tmp_path / "out"), "--to", *to]
        with largest_file(2_000):
            assert main(command) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "make room, and give the same command again" in error
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert main([str(lora2[2]), "--to", "peft", str(tmp_path / "file/out")]) == 2
    assert "check the path and its permissions" in capsys.readouterr().err


def test_damage_and_dead_adapters_write_nothing(pretrained, lora2, peft_adapter, tmp_path, capsys):
    copy = shutil.copytree(lora2[2], tmp_path / "copy")
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, copy / "adapter_model.safetensors")
    head_only = pretrained.base().requires_grad_(False)
    head_only.classifier.requires_grad_(True)
    loralib.save_adapter(head_only, tmp_path / "head")
    faults = {copy: "changed", tmp_path / "head": "no low-rank update", peft_adapter[0]: "peft adapter"}
    for adapter, says in faults.items():
        assert main([str(adapter), "--to", "peft", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert main([str(lora2[2]), "--to", "merged", str(tmp_path / "out"), "--base", str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    broken = shutil.copytree(pretrained.path, tmp_path / "broken")  # follows links
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main([str(lora2[2]), "--to", "merged", str(tmp_path / "out"), "--base", str(broken)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    assert main([str(lora2[2]), "--to", "peft", str(tmp_path / "mine")]) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_the_seed_of_an_import_draws_what_the_update_leaves_open():
    starts = []
    for seed in (0, 0, 1):
        import_peft(model := Net(), FOLDER / "peft", "adalora", r=6, seed=seed)
        starts.append(torch.cat([factor.detach().flatten() for factor in factors_of(model)]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_singular_values_below_the_rounding_of_float32_are_left_out():
    left, core = torch.eye(5, 3), torch.diag(torch.tensor([1.0, 1e-3, 1e-9]))
    torch.testing.assert_close(decompose(left, core, left.T)[1], torch.tensor([1.0, 1e-3], dtype=torch.float64))
