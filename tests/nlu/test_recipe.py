"""Starts, exact factors and rates of parts in the pipeline: what a run's history and checkpoints show."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import loralib
from nlu import run_glue, start
from nlu.arguments import parse_arguments
from nlu.methods.method import head_parameters
from nlu.methods.registry import apply_method, count_parameters
from nlu.run_glue import main
from tests.nlu.tiny import SHAPES, make_encoder


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
    return load_file(folder / f"model/checkpoint-{step}/model.safetensors")


PLUS = ["--method", "lora2_plus"]


GRADIENT = ["--lora_init", "gradient", "--lora_init_batches", "2"]


@pytest.mark.parametrize("options", [
    ["--method", "lora2_plus_k1", "--value_lr_ratio", "auto"],
    [*PLUS, *GRADIENT, "--value_lr_ratio", "auto", "--head_first_epochs", "1"],
])  # fmt: skip
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
    low, high = (
        run([*flags, "--save_steps", "1"], tmp_path / rate, "--method", "lora", "--head_learning_rate", rate)
        and weights(tmp_path / rate, 1)
        for rate in ("1e-4", "4e-4")
    )
    for name in ("classifier.bias", "classifier.weight", "bert.pooler.dense.bias", "bert.pooler.dense.weight"):
        assert float((high[name] - low[name]).abs().max()) == pytest.approx(3e-4, rel=1e-2)
    assert all(torch.equal(low[name], high[name]) for name in low if "lora_B" in name)


@pytest.mark.parametrize("shape, side, settings", [
    ("bert", "right", {}), ("deberta-v2", "right", {}), ("roberta", "right", {}),
    ("llama", "right", {"pad_token_id": 0}), ("llama", "left", {"pad_token_id": 0}),
    ("modernbert", "right", {"classifier_pooling": "mean", "local_attention": 8, "pad_token_id": 0}),
    ("big_bird", "right", {"attention_type": "original_full"}),
])  # fmt: skip
def test_the_head_alone_learns_what_a_frozen_encoder_teaches_it(
    shape, side, settings, tiny_glue, tmp_path, monkeypatch
):
    """One epoch on stored features against one epoch of whole forward passes, without dropout.

    Wherever padding lies, and whether the head reads one token or all.
    """
    monkeypatch.setitem(SHAPES, shape, SHAPES.get(shape, {}) | settings)
    folder = make_encoder(tmp_path / "encoder", shape)
    config = json.loads((folder / "config.json").read_text())
    drops = [name for name in config if "drop" in name and isinstance(config[name], float)]
    config |= dict.fromkeys(drops, 0.0)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"padding_side": side}))
    found = {}

    def watch(trainer):
        model = trainer.model
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        start.train_head(trainer, 1)
        found["features"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        assert all(p.grad is None for p in model.parameters())
        model.load_state_dict(before, strict=False)
        head = list(head_parameters(model))
        optimizer = torch.optim.AdamW(head, 2e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(42)
        for rows in torch.randperm(len(trainer.train_dataset), generator=generator).split(8):
            batch = start._batch(trainer, rows)
            loss = trainer.task_loss(model(**{n: t for n, t in batch.items() if n != "labels"}), batch["labels"])
            for p, g in zip(head, torch.autograd.grad(loss, head, allow_unused=True), strict=True):
                p.grad = g
            optimizer.step()
        found["whole"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        found["before"] = before

    monkeypatch.setattr(run_glue, "prepare_start", watch)
    assert main([
        "--model_name_or_path", str(folder), "--task_name", "mrpc", "--glue_dir", str(tiny_glue), "--do_train",
        "--max_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "2e-3", "--disable_tqdm", "True",
        "--save_strategy", "no", "--method", "full", "--root_output_dir", str(tmp_path / "run"),
    ]) == 0  # fmt: skip
    moved = {n for n in found["before"] if not torch.equal(found["before"][n], found["features"][n])}
    assert moved and not any("layer" in name or "transformer.h" in name for name in moved)
    for name, parameter in found["whole"].items():
        torch.testing.assert_close(found["features"][name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [["--class_weights", "balanced"], ["--label_smoothing_factor", "0.5"]])
def test_a_start_from_the_gradient_is_of_the_training_s_loss(changed, flags, tmp_path):
    starts = []
    for name, more in (("plain", []), ("changed", changed)):
        run([*flags, "--max_steps", "1", "--save_steps", "1", "--learning_rate", "1e-12"], tmp_path / name,
            "--method", "lora", *GRADIENT, *more)  # fmt: skip
        starts.append(weights(tmp_path / name, 1))
    factors = [name for name in starts[0] if "lora_A" in name]
    assert factors and max(float((starts[0][n] - starts[1][n]).abs().max()) for n in factors) > 1e-3


def test_a_head_that_reads_more_than_the_hidden_states_is_refused(flags, tmp_path, monkeypatch, capsys):
    """ALBERT's pooler leaves a step to the model, so what it gives has another shape than the pooled output."""
    monkeypatch.setitem(SHAPES, "albert", {"embedding_size": 8})
    folder = make_encoder(tmp_path / "encoder", "albert")
    albert = ["--model_name_or_path", str(folder), "--lora_module", "query,value"]
    assert main([*flags, *albert, *PLUS, "--head_first_epochs", "1", "--root_output_dir", str(tmp_path / "run")]) == 2
    assert "reads more than the last hidden states: leave it out" in capsys.readouterr().err


def test_lora_starts_from_the_gradient_and_head_first_lowers_its_first_loss(flags, tmp_path):
    first = run(flags, tmp_path / "a", "--method", "lora", *GRADIENT)["history"][0]["loss"]
    later = run(flags, tmp_path / "b", "--method", "lora", *GRADIENT, "--head_first_epochs", "20")["history"][0]["loss"]
    assert later < first


@pytest.mark.parametrize("layers, hidden, wide, name, k", [
    (6, 384, 1536, "lora", 44), (6, 384, 1536, "lora_r1", 5), (12, 768, 3072, "lora", 89),
    (12, 768, 3072, "lora_r1", 11),
])  # fmt: skip
def test_the_width_matches_loras_size(layers, hidden, wide, name, k):
    config = AutoConfig.for_model(
        "bert", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=wide, num_attention_heads=12
    )
    sizes = {}
    for method in (f"lora2_shared{'' if name == 'lora' else '_small'}", name):
        argv = ["--model_name_or_path", "x", "--task_name", "cola", "--do_train", "--root_output_dir", "x"]
        args = parse_arguments([*argv, "--method", method]).method
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
            apply_method(model, args, 100)
        sizes[method] = count_parameters(model)["adapter_params"]
        if method != name:
            assert {layer.widths for layer in loralib.lora_layers(model).values()} == {(k,)}
    shared, plain = sizes.values()
    assert abs(shared - plain) <= 0.1 * plain


def test_a_warm_start_of_exact_factors_needs_orthonormal_ones(flags, tmp_path, capsys):
    run(flags, tmp_path / "exact", *PLUS)
    run(flags, tmp_path / "plain", "--method", "lora2", "--rank_allocation", "False")
    going_on = run(flags, tmp_path / "on", *PLUS, "--lora_path", str(tmp_path / "exact/adapter"))
    assert going_on["history"][-1]["orthonormality"] < 2e-6
    capsys.readouterr()
    refused = [*flags, *PLUS, "--lora_path", str(tmp_path / "plain/adapter"), "--root_output_dir", str(tmp_path / "no")]
    assert main(refused) == 2
    assert "not orthonormal" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("width, more", [("8", ["--value_lr_ratio", "auto"]), ("3", [])])
def test_a_pruned_adapter_of_exact_factors_starts_another_training(flags, width, more, tmp_path):
    """What was pruned grows again, also where k < r and what is left of a factor is not orthonormal by itself."""
    pruning = ["--rank_allocation", "True", "--target_rank", "4", "--mask_interval", "1", "--learning_rate", "1e-2"]
    plus = [*PLUS, "--lora_k", width, "--lora_r", "8"]
    assert run(flags, tmp_path / "pruned", *plus, *pruning)["live_budget"] < 8 * 12
    start = ["--lora_path", str(tmp_path / "pruned/adapter"), "--seed", "7"]
    going_on = run(flags, tmp_path / "on", *plus, *more, *start)
    assert going_on["history"][-1]["orthonormality"] < 2e-6
    assert all(value > 0 for values in going_on["spectra"].values() for value in values[: int(width)])
