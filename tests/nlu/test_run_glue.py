"""Whole runs on a tiny encoder: records, checkpoints, MNLI's two sets, refusals, and adapters as input and output."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import loralib
from nlu import ROOT
from nlu.command_line import parse_arguments
from nlu.data.splits import load_data
from nlu.fine_tuning import build_trainer
from nlu.run_glue import main
from nlu.runs.record import RunRecord
from nlu.tasks import TASKS
from tests.nlu.tiny import changed, error_line, read, run_python, tiny_run


def test_run_writes_a_complete_record(finished, encoder):
    folder, record, printed, _ = finished
    assert record["status"] == "finished" and record["error"] is None
    assert (record["task"], record["method"], record["seed"]) == ("cola", "lora2", 3)
    assert record["metric"] == "matthews_correlation"
    assert [e["step"] for e in record["evaluations"]] == [3, 6]
    scores = [e["matthews_correlation"] for e in record["evaluations"]]
    assert record["best"] == max(scores) and record["last"] == scores[-1]
    assert record["head_params"] == 16 * 2 + 2 + 16 * 16 + 16
    assert (record["initial_budget"], record["final_budget"], record["live_budget"]) == (48, 24, 24)
    pattern = json.loads((folder / "rank_pattern.json").read_text())
    assert len(pattern) == 12 and sum(map(sum, pattern.values())) == 24
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    assert record["live_adapter_params"] == sum(t.numel() for name, t in stored.items() if ".lora_" in name)
    assert record["steps"] == 6 and len(record["history"]) == 6
    assert [row["budget"] for row in record["history"]] == [31, 24, 24, 24, 24, 24]
    assert record["effective_batch_size"] == 8
    assert record["command"].startswith("python nlu/run_glue.py --model_name_or_path ")  # not pytest's
    assert record["peak_memory_bytes"] > 1e6 and record["versions"]["torch"] == torch.__version__
    assert record["arguments"]["lora_k"] == 3 and record["arguments"]["learning_rate"] == 1e-2
    assert f"trains {record['adapter_params']:,} parameters in the encoder" in printed and "best" in printed
    assert {p.name for p in folder.iterdir()} >= {"results.json", "rank_pattern.json", "model", "log"}
    rows = {split: found["rows"] for split, found in record["data"].items()}
    assert rows == {"train": 50, "validation": 20, "test": 12} and "cola_validation" in record["class_reports"]
    # A checkpoint has the trainable parameters, not the base. The adapter's ranks and names are those of the run.
    assert sorted(p.name for p in (folder / "model").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    checkpoint = load_file(folder / "model/checkpoint-6/trained.safetensors")
    assert sum(t.numel() for t in checkpoint.values()) == record["adapter_params"] + record["head_params"]
    config = loralib.read_adapter_config(folder / "adapter")
    assert config.ranks == {name: sum(flags) for name, flags in pattern.items()}
    assert (config.card["task"], config.base_model) == ("cola", encoder.name)


def test_record_has_the_machine_that_took_the_last_step(finished):
    """A process that resumes a finished run may only predict, or train again."""
    _, before, _, trainer = finished
    record = RunRecord(trainer, {}, before | {"machine": {"cpu": "another"}})
    assert record.fields["machine"] == {"cpu": "another"}
    record.on_step_begin(trainer.args, trainer.state, trainer.control)
    assert record.fields["machine"] == before["machine"]


def test_class_weights_affect_the_training_loss_only(own_flags):
    own_flags += ["--on_error", "skip", "--class_weights", "balanced"]
    trainer, facts = build_trainer(arguments := parse_arguments(own_flags), load_data(arguments))
    counts = torch.bincount(torch.tensor(trainer.train_dataset["labels"][:]), minlength=3)
    torch.testing.assert_close(trainer.class_weights, 39 / (3 * counts.float()))
    assert facts["constant_loss"] == pytest.approx(math.log(3))  # three classes that count equally
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, -100])
    losses = -logits.log_softmax(-1)[range(4), labels[:4]]
    for training, expected in ((True, losses * trainer.class_weights[labels[:4]]), (False, losses)):
        trainer.model.train(training)
        torch.testing.assert_close(trainer.task_loss({"logits": logits}, labels, 4), expected.mean())


def test_finished_run_is_not_repeated_and_another_run_is_refused(base_flags, tmp_path, capsys):
    base_flags = changed(base_flags, max_steps=1)
    run, another = tmp_path / "run", [*base_flags, "--lora_dropout", "0.1"]
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    wrong = ["--optim", "galore_adamw"]
    assert main([*base_flags, *wrong]) == 2  # the run below can still start
    assert main(base_flags) == 0
    before = (run / "results.json").read_bytes()
    assert main(base_flags) == 0 and "finished" in capsys.readouterr().out
    assert main(another) == 2 and "lora_dropout" in error_line(capsys)
    assert main([*base_flags, "--overwrite_output_dir", *wrong]) == 2 and "--optim" in error_line(capsys)
    assert (run / "results.json").read_bytes() == before
    assert main([*another, "--overwrite_output_dir"]) == 0
    assert read(base_flags)["arguments"]["lora_dropout"] == 0.1 and (run / "thesis.tex").read_text() == "mine"


SCHEDULE = ["--method", "lora2", "--init_warmup", "0", "--final_warmup", "0", "--mask_interval", "10"]


@pytest.mark.parametrize("options, steps, every, scores, best", [
    (["--method", "sora", "--sora_lambda", "10"], 6, 3, [0.9, 0.2], 3),  # before the last gates close
    (SCHEDULE, 23, 6, [0.1, 0.9, 0.2, 0.2], 12),  # between two maskings
], ids=["sora", "lora2"])  # fmt: skip
def test_best_checkpoint_is_restored_with_its_ranks(
    base_flags, tmp_path, monkeypatch, options, steps, every, scores, best
):
    """Weights, live ranks and the adapter's score are those of the best step."""
    given = iter(scores)
    monkeypatch.setattr("nlu.trainer.compute_glue_metrics", lambda *_: {"matthews_correlation": next(given)})
    flags = changed(base_flags, max_steps=steps, save_steps=every, eval_steps=every)
    assert main([*flags, *options, "--load_best_model_at_end"]) == 0
    record, run = read(flags), tmp_path / "run"
    assert (record["status"], record["best_step"], record["last"]) == ("finished", best, 0.2)
    config, pattern = loralib.read_adapter_config(run / "adapter"), read(flags, "rank_pattern.json")
    assert config.card["score"] == 0.9
    assert {n: "".join("01"[flag] for flag in flags) for n, flags in pattern.items()} == config.groups[0].rank_pattern
    at_best = load_file(run / "model" / f"checkpoint-{best}" / "trained.safetensors")
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, flags_of_layer in pattern.items():
        values = at_best[f"{name}.lora_E"]
        kept = stored.get(f"{name}.lora_E", torch.zeros(0))  # absent if the whole layer was pruned
        torch.testing.assert_close(kept, values[values != 0], rtol=0, atol=0)
        assert flags_of_layer == (values != 0).tolist()
    assert record["live_budget"] == sum(map(sum, pattern.values()))
    if options is SCHEDULE:  # pruned at step 10, live again at the best step
        assert record["history"][9]["live"] < record["live_budget"] == 48
        assert record["history"][-1]["live"] == record["history"][-1]["budget"] == 24


def test_a_new_head_is_not_scored_before_it_is_trained(base_flags, capsys):
    assert main([flag for flag in base_flags if flag != "--do_train"]) == 2
    assert "has no trained head for the task, and nothing trains it first" in error_line(capsys)


def test_mnlis_second_set_is_scored_separately_and_does_not_stop_training(base_flags, monkeypatch):
    monkeypatch.setitem(TASKS, "mnli", dataclasses.replace(TASKS["mnli"], second_rows=14))  # the tiny set is complete
    assert main([*changed(base_flags, task_name="mnli", max_steps=3), "--early_stopping_patience", "2"]) == 0
    record = read(base_flags)
    (row,) = record["evaluations"]
    assert row["mismatched_accuracy"] * 14 == pytest.approx(round(row["mismatched_accuracy"] * 14))
    assert row["accuracy"] * 20 == pytest.approx(round(row["accuracy"] * 20)) and row["mismatched_loss"] != row["loss"]
    assert record["best"] == row["accuracy"]


# ---- exact factors, own learning rates, and the adapter that a run saves or starts from -----------------------------


def test_retraction_keeps_factors_orthonormal_and_own_rates_keep_the_weight_decay(base_flags, run_folder):
    flags = changed(base_flags, max_steps=4, learning_rate=2e-3, eval_strategy="no", lora_r=None, lora_alpha=None)
    options = ["--method", "lora2_plus", "--weight_decay", "0.1", "--lr_scheduler_type", "constant"]
    assert main([*flags, *options]) == 0
    entries = read(flags)["history"]
    assert [entry["orthonormality"] < 2e-6 for entry in entries] == [True] * 4
    assert 0 < entries[0]["delta_norm"] < entries[-1]["delta_norm"]
    assert entries[-1]["smallest_value"] <= entries[-1]["largest_value"]
    groups = torch.load(run_folder / "model/checkpoint-4/optimizer.pt", weights_only=True)["param_groups"]
    decays = {(group["lr"], group["weight_decay"]) for group in groups if group["params"]}
    assert decays == {(2e-3, 0.1), (8e-3, 0.1), (1e-3, 0.1), (1e-3, 0.0)}  # factors, e, and the head with its biases


def test_a_warm_start_of_exact_factors_needs_orthonormal_ones(base_flags, run_folder, finished, capsys):
    options = ["--method", "lora2_plus", "--lora_k", "3", "--lora_path", str(finished[0] / "adapter")]
    assert main([*base_flags, *options]) == 2
    assert "not orthonormal" in error_line(capsys) and not run_folder.exists()


def test_warm_start_takes_the_factors_and_records_the_source(base_flags, run_folder, finished):
    """At so low a learning rate a step changes nothing."""
    source = finished[0] / "adapter"
    config, tensors = loralib.adapter_folder.read_adapter(source)
    flags = changed(base_flags, task_name="mrpc", max_steps=1, learning_rate=1e-12)
    options = ["--method", "lora2", "--lora_k", "3", "--rank_allocation", "False", "--lora_path", str(source)]
    assert main([*flags, *options]) == 0
    noted, started = read(flags)["warm_start"], load_file(run_folder / "adapter/adapter_model.safetensors")
    assert (noted["task"], noted["weights_sha256"]) == ("cola", config.weights_sha256)
    for name in (name for name in tensors if name.endswith((".lora_A.0", ".lora_B.0"))):
        torch.testing.assert_close(started[name], tensors[name])


def test_programs_refuse_wrong_flags_before_importing_torch_and_set_threads_when_they_do():
    """Idle threads spin only briefly; a wrong command line and the digests of a sweep's runs need no slow import."""
    look = "import os, sys, nlu.run_glue, nlu.runs.identity; codes = [nlu.run_glue.main(['--method', 'lora3'])]\n"
    look += "heavy = {'numpy'} & {*sys.modules}\n"
    look += "import nlu.compare, nlu.report, nlu.sweep\n"
    look += "codes += [each.main(['--lora3']) for each in (nlu.compare, nlu.report, nlu.sweep)]\n"
    look += "heavy |= {'torch', 'transformers', 'datasets', 'pandas', 'matplotlib'} & {*sys.modules}\n"
    look += "print(os.environ.get('GOMP_SPINCOUNT'), codes, heavy)\n"
    look += "with nlu.startup.quick_imports():\n    print(os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    shown = subprocess.run([sys.executable, "-c", look], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert shown.stdout == "None [2, 2, 2, 2] set()\n20000\n", shown.stderr


def test_a_run_imports_neither_peft_nor_the_metrics_libraries_unless_it_uses_them(encoder, tiny_glue, tmp_path):
    flags = changed(tiny_run(encoder, tiny_glue, tmp_path / "run"), eval_strategy="no", eval_steps=None)
    flags[flags.index("--do_eval")] = "--method=lora2"
    blocked = "import sys; sys.modules.update(dict.fromkeys(('peft', 'scipy', 'sklearn', 'matplotlib')))\n"
    assert run_python("-c", f"{blocked}import nlu.run_glue; sys.exit(nlu.run_glue.main())", *flags).returncode == 0
