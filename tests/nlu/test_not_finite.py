"""Losses, weights and logits that are not finite are never saved or scored."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nlu.run_glue import main
from nlu.runs.checkpoints import checkpoints
from nlu.tasks import TASKS
from nlu.trainer import GlueTrainer, StepClock
from tests.nlu.tiny import changed, error_line, make_rows, read, tiny_run, write_rows


def infinite_loss(self, *args, task_loss=GlueTrainer.task_loss, **kwargs):
    return task_loss(self, *args, **kwargs) * (math.inf if self.model.training and self.state.global_step == 2 else 1)


def nan_weight(self, args, state, control, model=None, **kwargs):
    if state.global_step == 3:
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = math.nan


@pytest.mark.parametrize(
    ("owner", "name", "fault", "options", "saved"),
    [
        (GlueTrainer, "task_loss", infinite_loss, {}, ["checkpoint-2"]),
        (StepClock, "on_optimizer_step", nan_weight, {"logging_steps": 100}, ["checkpoint-2"]),
        (StepClock, "on_optimizer_step", nan_weight, {"logging_steps": 100, "save_strategy": "no"}, []),
    ],
    ids=["loss", "weight", "weight in the last step, without checkpoints"],
)
def test_a_value_that_is_not_finite_ends_the_run_and_is_never_saved(
    base_flags, run_folder, capsys, monkeypatch, owner, name, fault, options, saved
):
    monkeypatch.setattr(owner, name, fault, raising=False)
    flags = changed(base_flags, max_steps=4, eval_strategy="no", **options)
    assert main(flags) == 1
    assert "the loss or a trained weight is not finite at step" in error_line(capsys)
    assert read(flags)["status"] == "failed" and not (run_folder / "adapter").exists()
    assert [p.name for p in checkpoints(run_folder / "model")] == saved


@pytest.mark.parametrize("task, split", [("cola", "validation"), ("cola", "test"), ("stsb", "validation")])
def test_a_base_that_is_not_finite_is_not_scored(encoder, tiny_glue, tmp_path, run_folder, capsys, task, split):
    """Its NaN logits would all pass for class 0. Only one split has the word whose embedding is NaN."""
    base, glue = shutil.copytree(encoder, tmp_path / "base"), shutil.copytree(tiny_glue, tmp_path / "glue")
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][1] = math.nan  # of [UNK]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    fields = TASKS[task].text_fields
    rows = make_rows(fields, task == "stsb", 20, seed=3)
    write_rows(glue / f"{task}/{split}.jsonl", [*rows[:-1], rows[-1] | {fields[0]: "unheard"}])
    assert main([*changed(tiny_run(base, glue, run_folder), task_name=task), "--do_predict"]) == 1
    stage = {"validation": "evaluation", "test": "prediction"}[split]
    assert f"the model gives NaN or infinity in the {stage}" in error_line(capsys)
    assert read(tiny_run(base, glue, run_folder))["status"] == "failed"
    assert not list(run_folder.glob(f"predictions/*{split}*")) and not (run_folder / "predictions/CoLA.tsv").exists()
