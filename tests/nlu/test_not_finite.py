"""Losses, gradients, weights and logits that are not finite: named with step and rows, never saved or scored."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlu.errors import RunError
from nlu.run_glue import main
from nlu.runs.checkpoints import checkpoints
from nlu.runs.finite import FiniteWatch
from nlu.tasks import TASKS
from nlu.trainer import GlueTrainer, StepClock
from tests.nlu.tiny import changed, error_line, make_rows, read, tiny_run, write_rows


@pytest.fixture
def flags(base_flags):
    """Nine steps, seven of them an epoch."""
    return changed(base_flags, max_steps=9)


def poison(monkeypatch, what, value=math.nan):
    """The loss of step 3, or a gradient or a weight of step 4, becomes ``value``; returns the token ids of step 3."""
    seen, task_loss, compute, step = [], GlueTrainer.task_loss, GlueTrainer.compute_loss, GlueTrainer.training_step

    def loss(self, *args, **kwargs):
        return task_loss(self, *args, **kwargs) * (value if self.model.training and self.state.global_step == 2 else 1)

    def watch(self, model, inputs, *args, **kwargs):
        if model.training and self.state.global_step == 2:
            pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            seen.extend((self, ids[mask.bool()].tolist()) for ids, mask in pairs)
        return compute(self, model, inputs, *args, **kwargs)

    def gradient(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return loss

    def weight(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = value

    owner, name, function = {
        "loss": (GlueTrainer, "task_loss", loss), "gradient": (GlueTrainer, "training_step", gradient),
        "weight": (StepClock, "on_optimizer_step", weight),
    }[what]  # fmt: skip
    monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(GlueTrainer, "compute_loss", watch)
    return seen


@pytest.mark.parametrize(("value", "most", "seen_in"), [(math.nan, 1000, 4), (math.nan, 2, 3), (math.inf, None, 3)])
def test_a_loss_that_is_not_finite_names_its_step_and_rows(
    flags, run_folder, capsys, monkeypatch, value, most, seen_in
):
    """At once on a CPU; elsewhere at the next logging, evaluation or saving, or with so many losses that wait, and
    still with the first bad step."""
    seen = poison(monkeypatch, "loss", value)
    if most is not None:
        flags = changed(flags, logging_steps=100, eval_strategy="no")
        monkeypatch.setattr("nlu.runs.finite._MOST", most)
        monkeypatch.setattr("nlu.trainer.FiniteWatch", lambda _: FiniteWatch(torch.device("cuda")))
    assert main([*flags, "--gradient_accumulation_steps", "2", "--length_bucketing"]) == 1
    line = error_line(capsys)
    assert "the loss is" in line and "at step 3" in line and "checkpoint-2" in line
    rows = [int(word) for word in line.partition("idx ")[2].partition(";")[0].split(", ")]
    of_idx = {row["idx"]: row["input_ids"] for row in seen[0][0].train_dataset}
    assert [of_idx[i] for i in rows] == [ids for _, ids in seen]
    lengths = [len(ids) for _, ids in seen]
    assert seen[0][0].train_sampler.batch == 16 and lengths == sorted(lengths)  # of both batches of the step
    assert read(flags)["status"] == "failed" and "at step 3" in read(flags)["error"]
    assert read(flags)["steps"] == seen_in
    assert [p.name for p in checkpoints(run_folder / "model")] == ["checkpoint-2"]
    assert not (run_folder / "adapter").exists()


@pytest.mark.parametrize("asked", [[], ["--do_predict"]])
def test_without_checkpoints_too_the_first_bad_step_ends_the_run(flags, capsys, monkeypatch, asked):
    """Where nobody looks before the training ends, as may be on a GPU; what is saved then does not hide it."""
    poison(monkeypatch, "loss", math.inf)
    monkeypatch.setattr("nlu.trainer.FiniteWatch", lambda _: FiniteWatch(torch.device("cuda")))
    flags = changed(flags, logging_steps=100, eval_strategy="no", save_strategy="no")
    assert main([*flags, *asked]) == 1
    line = error_line(capsys)
    assert "the loss is inf" in line and "at step 3" in line and read(flags)["status"] == "failed"


def test_on_a_gpu_no_step_waits_for_its_loss():
    for kind, looks in (("cpu", True), ("cuda", False)):
        assert FiniteWatch(torch.device(kind)).is_due == looks


@pytest.mark.parametrize(
    ("what", "says", "saves"),
    [
        ("gradient", "the gradient is nan", ["checkpoint-2"]),
        ("weight", "a trained weight is not finite", ["checkpoint-2"]),
        ("weight", "a trained weight is not finite", []),
    ],
)
def test_gradients_and_weights_that_are_not_finite_are_never_saved(
    flags, run_folder, capsys, monkeypatch, what, says, saves
):
    """They come in the last step, after which nothing need be saved."""
    poison(monkeypatch, what)
    assert main(changed(flags, max_steps=4, save_strategy="steps" if saves else "no")) == 1
    assert says in (line := error_line(capsys)) and "at step 4" in line
    assert [p.name for p in checkpoints(run_folder / "model")] == saves


@pytest.mark.parametrize(("count", "shown"), [(32, "30, 31;"), (33, "30, 31, …;")])
def test_of_many_rows_the_first_32_are_named(tmp_path, count, shown):
    watch = FiniteWatch(torch.device("cuda"))
    watch.add(3, "loss", torch.tensor(math.nan))
    trainer = SimpleNamespace(
        finite=watch, rows_of_step=lambda step: list(range(count)), args=SimpleNamespace(output_dir=tmp_path)
    )
    with pytest.raises(RunError, match=f"the loss is nan at step 3.*{shown} last good checkpoint: none"):
        GlueTrainer.check_finite(trainer)


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
    assert read(tiny_run(base, glue, run_folder))["status"] == "failed" and not (run_folder / "predictions").exists()
