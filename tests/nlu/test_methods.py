"""What every method must do: train the parameters that it names and no others, on several encoders and tasks."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

import loralib
from nlu import ROOT, fine_tuning
from nlu.command_line import parse_arguments
from nlu.errors import UsageError
from nlu.methods.full import is_bias
from nlu.methods.method import head_parameters
from nlu.methods.peft_methods import make_peft_config
from nlu.methods.registry import METHODS, apply_without_weights, count_parameters, method_arguments, rebuild
from nlu.model import set_precision
from nlu.run_glue import main
from tests.loralib import small
from tests.nlu.tiny import DEBERTA_BASE, SHAPES, changed, make_encoder, quick_peft_adalora, read, run_python

CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs/methods").glob("*.yaml")}
SIX = r"(attention\.(self\.(query|key|value)(_proj)?|output\.dense)|intermediate\.dense|(?<!attention\.)output\.dense)"
LAYER = r"encoder\.layer\.\d+\."

# The trainable parameters, by name without the encoder's prefix; written from the methods' definitions.
MOVES = {
    "full": r".*",
    "bitfit": r".*\.bias",
    "hadapter": LAYER + r"(attention\.)?output\.dropout\.adapter\.(down|up)\.(weight|bias)",
    "padapter": LAYER + r"output\.LayerNorm\.adapter\.(down|up)\.(weight|bias)",
    "lora": LAYER + SIX + r"\.lora_[AB]\.0",
    "adalora": LAYER + SIX + r"\.lora_([AB]\.0|E)",
    "sora": LAYER + SIX + r"\.lora_([AB]\.0|E)",
    "lora2": LAYER + SIX + r"\.lora_([AB]\.[01]|E)",
    "dora": LAYER + SIX + r"\.lora_([AB]|magnitude_vector)\.default\.weight",
    "rslora": LAYER + SIX + r"\.lora_[AB]\.default\.weight",
    "vera": LAYER + SIX + r"\.vera_lambda_[bd]\.default",
    "ia3": LAYER + r"(attention\.self\.(key|value)(_proj)?|output\.dense)\.ia3_l\.default",
    "miss": LAYER + SIX + r"\.miss_block\.default",
    "gralora": LAYER + SIX + r"\.gralora_[AB]\.default",
    "peft_adalora": LAYER + SIX + r"\.lora_[ABE]\.default",
}
HEADS = {
    "bert": r"bert\.pooler\..*|classifier\..*",
    "roberta": r"classifier\..*",
    "deberta-v2": r"pooler\..*|classifier\..*",
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {shape: make_encoder(folder / shape, shape) for shape in SHAPES}


@pytest.fixture
def moved(monkeypatch):
    """Names of the parameters that a run changed, and of those that it did not change; filled in by the run."""
    seen = {}
    original = fine_tuning.train_and_evaluate

    def watch(trainer, checkpoint):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        frozen = {name: b.detach().clone() for name, b in trainer.model.named_buffers() if "rankadapter" not in name}
        original(trainer, checkpoint)
        after = dict(trainer.model.named_parameters())
        assert after.keys() == before.keys()
        seen["moved"] = {name for name in before if not torch.equal(before[name], after[name])}
        seen["still"] = before.keys() - seen["moved"]
        seen["buffers"] = {n for n, b in trainer.model.named_buffers() if n in frozen and not torch.equal(b, frozen[n])}

    monkeypatch.setattr(fine_tuning, "train_and_evaluate", watch)
    return seen


def flags_of(method, tmp_path):
    if method != "peft_adalora":
        return ["--method", method]
    return ["--method", "peft", "--peft_config", str(quick_peft_adalora(tmp_path))]


SCORES = {"cola": {"matthews_correlation"}, "mrpc": {"accuracy", "f1"}, "stsb": {"pearson", "spearmanr"}}
# Every method on the paper's encoder, one of each family on another; the tasks alternate: a sentence, two, regression.
OTHERS = {"bitfit": "roberta", "hadapter": "bert", "dora": "bert", "ia3": "roberta"}
# These run by default: one of each kind, and every encoder. All run with --all.
QUICK = [("lora2", "deberta-v2"), ("miss", "deberta-v2"), ("bitfit", "roberta"), ("hadapter", "bert")]
CASES = [
    pytest.param(method, shape, list(SCORES)[i % 3], marks=[] if (method, shape) in QUICK else pytest.mark.slow)
    for i, (method, shape) in enumerate([*((method, "deberta-v2") for method in MOVES), *OTHERS.items()])
]


@pytest.mark.parametrize("method, shape, task", CASES)
def test_method_trains_exactly_the_parameters_that_it_names(method, shape, task, encoders, base_flags, tmp_path, moved):
    flags = changed(
        base_flags, model_name_or_path=encoders[shape], task_name=task, max_steps=4, lora_r=None, lora_alpha=None,
        eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    assert main([*flags, *flags_of(method, tmp_path)]) == 0
    record = read(flags)
    named = re.compile(rf"({shape.partition('-')[0]}\.)({MOVES[method]})|{HEADS[shape]}")
    assert {name for name in moved["moved"] if not named.fullmatch(name)} == set()
    # If no position term multiplies the key's bias, attention does not depend on it: its gradient is rounding noise.
    must = {name for name in moved["still"] if named.fullmatch(name) and not re.search(r"key(_proj)?\.bias", name)}
    assert must == set()
    assert moved["buffers"] == set()
    assert record["status"] == "finished" and record["best"] is not None and record["steps"] == 4
    assert record["method_config"] == ("peft" if method == "peft_adalora" else method)
    assert SCORES[task] <= set(record["evaluations"][-1])


@pytest.mark.slow
def test_step_of_every_method_stays_on_a_fake_device():
    """Runs in a process of its own, because a registered device cannot be removed."""
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nlu/device_steps.py")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def test_trained_parameters_are_listed_for_every_method():
    assert {CONFIGS[method]["method"] for method in MOVES} == set(METHODS)
    assert {name for name, values in CONFIGS.items() if "peft_config" in values} < set(MOVES)


# ---- budgets at real size ------------------------------------------------------------------------------------------


REAL_SIZES = {
    "deberta-v2": DEBERTA_BASE,
    "roberta": {
        "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "bert": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}  # fmt: skip


def arguments_of(method, **changes):
    values = CONFIGS[method] | changes
    values |= {"peft_config": json.dumps(values.get("peft_config"))}
    args = method_arguments(**{k: v for k, v in values.items() if not k.endswith("learning_rate")})
    args.target_rank = args.target_rank or args.lora_r
    return args


def apply(model, args, total_steps=100):
    return METHODS[args.method].apply(model, args, total_steps)


def applied_counts(method, kind="deberta-v2", **changes):
    """A model of the papers' size on the meta device, the method's training of it, and its parameter counts."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **REAL_SIZES[kind]))
        return model, apply(model, arguments_of(method, **changes)), count_parameters(model)


# Adapter parameters on DeBERTaV3-base; the comments have the published "#Params", which are truncated.
BUDGETS = {
    "bitfit": 102_912,  # 0.1M
    "hadapter": 1_198_848, "hadapter_m16": 608_640, "hadapter_m8": 313_536,  # 0.61M, 0.31M
    "padapter": 1_189_632, "padapter_m32": 599_424, "padapter_m16": 304_320,  # 0.60M, 0.30M
    "lora": 1_327_104, "lora_r2": 331_776, "lora_r1": 165_888,  # 1.33M, 0.33M, 0.17M
    "adalora": 1_327_680, "adalora_r8": 1_991_520, "adalora_r2": 497_880,
    "lora2": 1_336_896, "lora2_k1": 167_616,  # 1.33M, 0.17M
    "sora": 1_327_680, "sora_r1": 165_960,
}  # fmt: skip


@pytest.mark.parametrize("kind, method, modules, expected", [
    *(("deberta-v2", method, "auto", expected) for method, expected in BUDGETS.items()),
    *(("deberta-v2", "lora2_k1", pair, 37_440) for pair in ("query,key", "query,value")),
    ("deberta-v2", "lora2_k1", "query,key,value", 56_160),  # the paper's table of modules
    ("deberta-v2", "full", "auto", 184_423_682 - (768 * 768 + 768 + 768 * 2 + 2)),
    ("roberta", "lora", "query,value", 786_432),  # the LoRA paper's 0.8M
    ("roberta", "lora2_k1", "auto", 445_824),  # the LoRA² paper's 0.4M
    ("roberta", "hadapter_m8", "auto", 835_968), ("roberta", "padapter_m16", "auto", 811_392),  # 0.8M
])  # fmt: skip
def test_parameter_counts_are_those_of_the_papers(kind, method, modules, expected):
    _, training, counts = applied_counts(method, kind, lora_module=modules)
    width = REAL_SIZES[kind]["hidden_size"]
    assert counts["adapter_params"] == expected and counts["head_params"] == width * width + width + width * 2 + 2
    if (ranks := training.ranks) is not None and modules == "auto":
        layers, r = 6 * REAL_SIZES[kind]["num_hidden_layers"], CONFIGS[method].get("lora_r", 8)
        assert ranks.initial == layers * r
        if method.partition("_")[0] != "sora":  # its gates have no budget
            assert ranks.target == layers * CONFIGS[method].get("target_rank", r)


@pytest.mark.parametrize("kind, shared, plain, k", [
    ("bert", "lora2_shared", "lora", 44), ("deberta-v2", "lora2_shared_small", "lora_r1", 11),
])  # fmt: skip
def test_width_of_shared_lora2_matches_loras_parameter_count(kind, shared, plain, k):
    """With a penalty, because exact factors cannot be initialised on the meta device."""
    model, _, counts = applied_counts(shared, kind, orthogonality="penalty")
    assert {layer.widths for layer in loralib.lora_layers(model).values()} == {(k,)}
    assert counts["adapter_params"] == pytest.approx(applied_counts(plain, kind)[2]["adapter_params"], rel=0.1)


@pytest.mark.parametrize("method, shared", [("adalora", False), ("sora", False), ("lora2", False), ("lora2", True)])
def test_live_parameters_are_those_that_compact_keeps(method, shared):
    """A layer without live singular values keeps none; a shared factor stays if one of its layers does."""
    model = small.encoder()
    training = apply(model, arguments_of(method, lora_share_outer=shared))
    every = count_parameters(model)["adapter_params"]
    for number, layer in enumerate(loralib.lora_layers(model).values()):
        layer.lora_E.data = (torch.arange(8) < number % 9).float()
    live = every - training.ranks.pruned_parameters()
    loralib.compact(model)
    assert count_parameters(model)["adapter_params"] == live < every


@pytest.mark.parametrize("method, modules, message", [
    ("lora", "nothing", "matches no linear layer"), ("lora", "classifier", "selects only the head"),
    ("peft", "query", "names its own target_modules"),
])  # fmt: skip
def test_modules_that_would_be_silently_ignored_are_refused(method, modules, message):
    named = {"peft_config": {"peft_type": "LORA", "target_modules": ["value"]}} if method == "peft" else {}
    with pytest.raises(UsageError, match=message):
        apply(small.encoder(), arguments_of(method, lora_module=modules, **named))


def test_a_config_saved_by_peft_trains_its_layers_and_the_head_once():
    saved = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "inference_mode": True}
    model = small.encoder()
    apply(model, arguments_of("peft", peft_config=saved | {"modules_to_save": ["classifier", "score"]}))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("lora_" in name for name in trained) == 4 and not any("original_module" in name for name in trained)


@pytest.mark.parametrize("modules, expected", [
    (".*", 12), (r"bert\.encoder\.layer\.\d{1,2}\.attention\.self\.query,value", 4),
])  # fmt: skip
@pytest.mark.parametrize("method", ["lora2", "sora", "dora"])
def test_patterns_select_layers_of_the_encoder_and_never_the_head(method, modules, expected):
    """``.*`` also matches the pooler and the classifier; these are trained in full and get no update."""
    model = small.encoder()
    apply(model, arguments_of(method, lora_module=modules))
    layers = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(layers) == expected and all(".encoder." in name for name in layers)
    assert [p.numel() for p in head_parameters(model)] == [16 * 2, 2, 16 * 16, 16]


def test_regulariser_dropout_and_precision_are_those_of_the_flags(base_flags):
    flags = ["--method", "lora2", "--orth_terms", "uv", "--orth_squared", "True", "--reg_orth_coef", "0.3", "--bf16"]
    arguments = parse_arguments([*base_flags, *flags, "--lora_dropout", "0.25"])
    model = small.encoder()
    penalty = apply(model, arguments).penalty()
    torch.testing.assert_close(penalty, loralib.compute_orth_regu(model, 0.3, "uv", squared=True))
    assert {layer.lora_dropout.p for layer in loralib.lora_layers(model).values()} == {0.25}
    set_precision(arguments, model)
    values = *model.parameters(), model(torch.tensor([[5]])).logits
    assert {(v.requires_grad, v.dtype) for v in values} == {(True, torch.float32), (False, torch.bfloat16)}


# ---- peft ----------------------------------------------------------------------------------------------------------


def test_is_bias_excludes_tables_of_position_biases():
    names = ("a.bias", "in_proj_bias", "lstm.bias_ih_l0", "attn.relative_position_bias_table", "bias_net.weight")
    assert [is_bias(name) for name in names] == [True, True, True, False, False]


def test_pruned_parameters_of_pefts_adalora_are_the_rows_and_columns_of_its_zeros():
    training = apply(small.encoder(), arguments_of("peft_adalora"), 1000)
    with torch.no_grad():
        for layer in training.layers.values():
            layer.lora_E["default"][:3] = 0
            layer.lora_E["default"][3:] = 1
    sides, ranks = [layer.in_features + layer.out_features for layer in training.layers.values()], training.ranks
    assert len(sides) == 12 and ranks.pruned_parameters() == sum(3 * (1 + side) for side in sides)
    assert set(map(tuple, ranks.pattern.values())) == {(False,) * 3 + (True,) * (ranks.initial // 12 - 3)}
    assert (ranks.live, ranks.budget) == (ranks.initial - 36, ranks.initial) and 0 < ranks.target < ranks.initial


@pytest.mark.parametrize("content, message", [
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "changes the input"),
    ({"peft_type": "ADALORA", "tinit": 5, "tfinal": 5}, "budgeting phase.*total_step is the training's, 10"),
    ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "at random"),
    ({"peft_type": "LORA", "init_lora_weights": "eva"}, "needs data"),
    ({"peft_type": "FROD"}, "number of threads"),
])  # fmt: skip
def test_a_peft_config_that_would_train_something_else_is_refused(content, message):
    with pytest.raises(UsageError, match=message):
        make_peft_config(content, 10)


def test_a_card_names_no_file_that_is_read_and_no_method_without_modules_of_its_own(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = {"method_arguments": {"method": "peft", "peft_config": str(tmp_path / "config.json")}}
    for wrong in (card, {"method_arguments": {"method": "lora"}}, {"method_arguments": {"method": "none"}}):
        with pytest.raises(UsageError, match="card does not describe its method"):
            rebuild(small.encoder(), wrong)
    rebuild(model := small.encoder(), card | {"peft_config": config})  # as 0.4 wrote it
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


@pytest.mark.parametrize("kind", ["LORA", "UNILORA", "BOFT"])
def test_a_check_without_weights_passes_layers_that_read_them_and_no_other_fault(kind, monkeypatch):
    args = arguments_of("peft", peft_config={"peft_type": kind, "target_modules": ["query"]})
    with torch.device("meta"):
        model = small.encoder()
    apply_without_weights(model, args, 100)

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setitem(METHODS, "peft", replace(METHODS["peft"], apply=broken))
    with pytest.raises(RuntimeError, match="shapes"):
        apply_without_weights(model, args, 100)
