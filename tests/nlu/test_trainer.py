"""The trainer: the rows that a step counts, the time of steps, epochs, and transformers' private methods."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer

from loralib import lora_layers
from loralib.recipes.trainer_mixin import LowRankTrainerMixin
from nlu import ROOT
from nlu.command_line import parse_arguments
from nlu.data.batching import SeededRandomSampler
from nlu.data.splits import load_data
from nlu.fine_tuning import build_trainer
from nlu.run_glue import main
from nlu.runs.progress import Progress
from nlu.runs.resume import WholeCheckpoints
from nlu.trainer import GlueTrainer
from tests.nlu.tiny import changed, read

# The oldest and the newest transformers with which these tests, those of run_glue.py and those of nlu/fast have passed;
# 5.19 and 5.20 were tried too. With 5.12, pip installs older versions of tokenizers and huggingface_hub.
TRIED = ("5.12.0", "5.24.0")
KINDS = (LowRankTrainerMixin, WholeCheckpoints, GlueTrainer)
OVERRIDDEN = {
    "_get_output_dir", "_get_train_sampler", "_load_best_model", "_load_from_checkpoint",
    "_load_optimizer_and_scheduler", "_maybe_log_save_evaluate", "_run_epoch", "_save", "_save_checkpoint",
}  # fmt: skip


def test_overridden_private_methods_of_the_trainer_are_those_that_were_tried():
    installed, (oldest, newest) = Version(transformers.__version__), map(Version, TRIED)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    allowed = next(Requirement(line) for line in lines if line.startswith("transformers"))
    assert oldest in allowed.specifier and Version(f"{oldest.major}.{oldest.minor - 1}") not in allowed.specifier
    assert oldest <= installed < Version(f"{newest.major}.{newest.minor + 1}"), "try this version and name it in TRIED"
    own = {n for kind in KINDS for n in vars(kind) if not n.startswith("__")}
    assert {n for n in own if n.startswith("_") and hasattr(Trainer, n)} == OVERRIDDEN


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_time_of_steps_excludes_evaluations_and_checkpoints(base_flags, monkeypatch, logging_steps):
    """It includes the work that a GPU still has to do after a step, because the next batch waits for it."""
    now = [0.0]

    def lasts(owner, name, seconds):
        method = getattr(owner, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    lasts(GlueTrainer, "training_step", 1)
    lasts(GlueTrainer, "check_finite", 0.5)  # waits for the step
    lasts(Progress, "on_evaluate", 100)
    lasts(Progress, "on_save", 100)
    monkeypatch.setattr("nlu.runs.progress.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert main(changed(base_flags, logging_steps=logging_steps)) == 0
    record = read(base_flags)
    waited = 0.5 * len({*range(logging_steps, 7, logging_steps), 2, 3, 4, 6})  # logged, evaluated at 3, saved at 2
    assert record["train_seconds"] == 6 + waited and record["seconds_per_step"] == record["train_seconds"] / 6
    assert record["history"][0]["seconds"] == {1: 1.5, 4: 5.5}[logging_steps]


ACCUMULATED = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


@pytest.mark.parametrize("flags", [
    [], ACCUMULATED, ["--max_steps", "30", "--learning_rate", "1e-12", "--early_stopping_patience", "2"],
    ["--eval_strategy", "epoch", "--max_steps", "-1", "--num_train_epochs", "4"],
])  # fmt: skip
def test_training_loss_is_that_of_the_steps_however_rarely_they_are_logged(base_flags, tmp_path, flags):
    """The judge is the log of a run that logs each step, cut into twentieths by numpy."""
    records = []
    for logged in (["--logging_steps", "1"], ["--logging_steps", "500"], ["--logging_strategy", "no"]):
        run = [*changed(base_flags, root_output_dir=tmp_path / str(len(records))), "--method", "lora", *flags, *logged]
        assert main(run) == 0
        records.append(read(run))
    losses = [entry["loss"] for entry in records[0]["history"]]
    assert len(losses) == records[0]["steps"] == (9 if "--early_stopping_patience" in flags else len(losses))
    expected = [part.mean() for part in np.array_split(losses, min(20, len(losses)))]
    assert records[0]["training_loss"] == pytest.approx(expected, rel=1e-5)
    assert records[0]["training_loss"] == records[1]["training_loss"] == records[2]["training_loss"]
    assert len(records[1]["history"]) <= 1


def test_seed_determines_the_initial_values(base_flags):
    starts = []
    for seed in (3, 3, 4):
        arguments = parse_arguments([*changed(base_flags, seed=seed), "--method", "lora"])
        trainer, _ = build_trainer(arguments, load_data(arguments))
        starts.append([layer.lora_A[0] for layer in lora_layers(trainer.model).values()])
    for one, same, other in zip(*starts, strict=True):
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_order_of_the_rows_follows_the_seed_and_buckets_have_the_rows_of_a_step(finished, monkeypatch):
    trainer = finished[3]
    assert list(trainer._get_train_sampler()) == list(SeededRandomSampler(50, 3))
    monkeypatch.setattr(trainer.arguments, "length_bucketing", True)
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 2)
    assert trainer._get_train_sampler().batch == 16
