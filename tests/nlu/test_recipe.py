"""Exact factors, rates of parts, the adapter that a run leaves and the warm start from one, in whole runs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import loralib
from nlu import fine_tuning
from nlu.arguments import parse_arguments
from nlu.methods.registry import METHODS, count_parameters
from nlu.run_glue import main
from tests.nlu.tiny import changed, read, tiny_run


@pytest.fixture
def flags(encoder, tiny_glue):
    return [
        "--model_name_or_path", str(encoder), "--task_name", "mrpc", "--glue_dir", str(tiny_glue),
        "--do_train", "--max_steps", "4", "--per_device_train_batch_size", "8", "--learning_rate", "2e-3",
        "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9", "--disable_tqdm", "True",
        "--logging_steps", "1", "--lr_scheduler_type", "constant",
    ]  # fmt: skip


def run(flags, folder, *more):
    assert main([*flags, *more, "--root_output_dir", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def weights(folder, step):
    return load_file(folder / f"model/checkpoint-{step}/trained.safetensors")


PLUS = ["--method", "lora2_plus"]


@pytest.mark.parametrize("options", [pytest.param(["--method", "lora2_plus_k1"], marks=pytest.mark.slow), PLUS])
def test_retraction_keeps_factors_orthonormal(flags, options, tmp_path):
    record = run(flags, tmp_path, *options)
    for name, factor in weights(tmp_path, 4).items():
        if "lora_A" in name or "lora_B" in name:
            wide = (factor if factor.shape[0] <= factor.shape[1] else factor.T).double()
            assert torch.linalg.matrix_norm(wide @ wide.T - torch.eye(len(wide))) < 2e-6
    entries = record["history"]
    assert [entry["orthonormality"] < 2e-6 for entry in entries] == [True] * 4
    assert 0 < entries[0]["delta_norm"] < entries[-1]["delta_norm"]
    assert entries[-1]["smallest_value"] <= entries[-1]["largest_value"]
    by_type = [value for name, value in entries[-1].items() if name.startswith("delta_norm/")]
    assert sum(by_type) / len(by_type) == pytest.approx(entries[-1]["delta_norm"])  # as many layers of each type


def test_the_head_has_its_own_rate(flags, tmp_path):
    """Without weight decay, Adam's first step moves an entry by its rate."""
    low, high = (tmp_path / rate for rate in ("1e-4", "4e-4"))
    for folder in (low, high):
        one = ["--method", "lora", "--save_steps", "1", "--max_steps", "1", "--head_learning_rate", folder.name]
        run(flags, folder, *one)
    low, high = weights(low, 1), weights(high, 1)
    for name in ("classifier.bias", "classifier.weight", "bert.pooler.dense.bias", "bert.pooler.dense.weight"):
        assert float((high[name] - low[name]).abs().max()) == pytest.approx(3e-4, rel=1e-2)
    assert all(torch.equal(low[name], high[name]) for name in low if "lora_B" in name)


@pytest.mark.parametrize("layers, hidden, wide, name, k", [
    (6, 384, 1536, "lora", 44), (12, 768, 3072, "lora_r1", 11),
])  # fmt: skip
def test_the_width_matches_loras_size(layers, hidden, wide, name, k):
    config = AutoConfig.for_model(
        "bert", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=wide, num_attention_heads=12
    )
    sizes = {}
    for method in (f"lora2_shared{'' if name == 'lora' else '_small'}", name):
        argv = ["--model_name_or_path", "x", "--task_name", "cola", "--do_train", "--root_output_dir", "x"]
        args = parse_arguments([*argv, "--method", method]).method
        args.orthogonality = "penalty"  # exact factors need values
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
            METHODS[args.method].apply(model, args, 100)
        sizes[method] = count_parameters(model)["adapter_params"]
        if method != name:
            assert {layer.widths for layer in loralib.lora_layers(model).values()} == {(k,)}
    shared, plain = sizes.values()
    assert abs(shared - plain) <= 0.1 * plain


def test_a_warm_start_of_exact_factors_needs_orthonormal_ones(flags, tmp_path, capsys):
    run(flags, tmp_path / "plain", "--method", "lora2", "--rank_allocation", "False", "--max_steps", "1")
    refused = [*flags, *PLUS, "--lora_path", str(tmp_path / "plain/adapter"), "--root_output_dir", str(tmp_path / "no")]
    assert main(refused) == 2
    assert "not orthonormal" in capsys.readouterr().err and not (tmp_path / "no").exists()


# ---- the adapter that a run leaves, and the warm start from one -----------------------------------------------------


LORA2 = ["--method", "lora2", "--lora_k", "3"]


@pytest.fixture(scope="module")
def trained(encoder, tiny_glue, tmp_path_factory):
    """The adapter of an MNLI run of LoRA² with pruned ranks."""
    folder = tmp_path_factory.mktemp("mnli") / "run"
    quick = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    assert main([*changed(tiny_run(encoder, tiny_glue, folder), task_name="mnli", **quick), *LORA2]) == 0
    return folder / "adapter"


def test_the_saved_adapter_gives_the_trained_models_logits(finished, encoder):
    folder, _, _, trainer = finished
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    config = loralib.load_adapter(model, folder / "adapter")
    ids = torch.randint(5, 20, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert config.card["task"] == "cola" and config.base_model == encoder.name
    pattern = json.loads((folder / "rank_pattern.json").read_text())
    assert {n: sum(flags) for n, flags in pattern.items()} == config.ranks


def test_warm_start_takes_the_factors_and_records_the_source(base_flags, trained, monkeypatch):
    """tests/loralib/test_adapter.py compares the updates of every kind of layer, and refuses every other kind."""
    config, tensors = loralib.adapter_folder.read_adapter(trained)
    started = {}
    start = fine_tuning.start_from_adapter

    def keep(model, arguments):
        source = start(model, arguments)
        started.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return source

    monkeypatch.setattr(fine_tuning, "start_from_adapter", keep)
    assert main([*changed(base_flags, max_steps=1), *LORA2, "--lora_path", str(trained)]) == 0
    record = read(base_flags)
    assert record["warm_start"]["task"] == "mnli"
    assert record["warm_start"]["weights_sha256"] == config.weights_sha256
    for group in config.groups:
        for name, flags in group.rank_pattern.items():
            live = torch.tensor([flag == "1" for flag in flags])
            values = started[f"{name}.lora_E"]
            assert torch.equal(values[~live], torch.zeros(int((~live).sum())))
            if live.any():
                assert torch.equal(values[live], tensors[f"{name}.lora_E"])
    assert started["classifier.weight"].shape[0] == 2
