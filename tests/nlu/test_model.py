"""From a checkpoint to the task's head: order of the labels, new output layers, and what is refused."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from loralib.export import export_merged
from nlu import predict as predict_program
from nlu.command_line import parse_arguments
from nlu.errors import UsageError
from nlu.model import head_for, limit_length, load_config, longest_input, without_weights
from nlu.run_glue import main
from nlu.tasks import TASKS
from tests.nlu.killed_runs import run_broken_off
from tests.nlu.tiny import SHAPES, changed, error_line, make_encoder, make_rows, read, write_rows

PERMUTED = ["Contradiction", "NEUTRAL", "entailment"]


def classifier(folder, names):
    """A tiny checkpoint with a head for labels of those names."""
    make_encoder(folder)
    torch.manual_seed(1)
    options = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


def flags_of(base_flags, folder, task, *more):
    return [*changed(base_flags, model_name_or_path=folder, task_name=task), *more]


@pytest.mark.parametrize("task, names, rows, unfit", [
    ("mnli", PERMUTED, [2, 1, 0], None),
    ("mnli", ["neutral", "contradiction", "entailment"], [2, 0, 1], None),  # its inverse is another order
    ("mnli", ["LABEL_0", "label_1", "LABEL_2"], None, None),
    ("mnli", ["joy", "anger", "fear"], None, "the labels joy"),
    ("rte", PERMUTED, None, "contradiction"),
    ("stsb", ["similarity"], None, None),
])  # fmt: skip
def test_head_for_orders_fitting_labels_and_names_what_does_not_fit(task, names, rows, unfit):
    found = head_for(TASKS[task], BertConfig(id2label=dict([*enumerate(names)][::-1])))
    assert found.rows == rows and (found.unfit is None if unfit is None else unfit in found.unfit)


def test_head_of_a_checkpoint_with_another_label_order_is_read_in_the_tasks_order(base_flags, tiny_glue, tmp_path):
    """The score is that of transformers alone with the checkpoint's label names; training starts from its head."""
    folder = classifier(tmp_path / "mnli", PERMUTED)
    path, words = tiny_glue / "mnli/validation_matched.jsonl", TASKS["mnli"].labels
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    texts = tokenizer([r["premise"] for r in rows], [r["hypothesis"] for r in rows], padding=True, return_tensors="pt")
    guessed, labels = model(**texts).logits.argmax(-1).tolist(), [row["label"] for row in rows]
    expected = accuracy_score([words[label] for label in labels], [PERMUTED[guess].lower() for guess in guessed])
    assert expected != accuracy_score(labels, guessed)  # the task's own order gives another score
    flags = flags_of(base_flags, folder, "mnli")
    untrained = [flag for flag in flags if flag != "--do_train"]
    assert main(untrained) == 0
    assert read(untrained)["last"] == pytest.approx(expected)
    assert read(untrained)["labels"] == list(words)

    flags = [*changed(flags, root_output_dir=tmp_path / "trained"), "--save_total_limit", "9"]
    run_broken_off(flags, 2)
    assert main(flags) == 0 and read(flags)["resumes"] == 1
    adapter = ["--adapter", str(tmp_path / "trained/adapter"), "--base", str(folder)]
    assert predict_program.main([*adapter, "--input", str(path), "--output", str(tmp_path / "out.jsonl")]) == 0
    answers = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    score = np.mean([words[row["label"]] == answer for row, answer in zip(rows, answers, strict=True)])
    assert read(flags)["last"] == pytest.approx(score)
    # A merged export can be trained on another task.
    export_merged(tmp_path / "trained/adapter", tmp_path / "merged", str(folder))
    assert list(AutoConfig.from_pretrained(tmp_path / "merged").id2label.values()) == read(untrained)["labels"]
    flags = flags_of(base_flags, tmp_path / "merged", "mrpc", "--overwrite_output_dir")
    assert main(flags) == 0 and read(flags)["labels"] == list(TASKS["mrpc"].labels)


@pytest.mark.parametrize(
    "task, names", [("stsb", PERMUTED), pytest.param("mnli", ["joy", "anger", "fear"], marks=pytest.mark.slow)]
)
def test_head_that_does_not_fit_is_replaced_with_one_warning(base_flags, tmp_path, caplog, task, names):
    run = tmp_path / "run"
    folder = classifier(tmp_path / "other", names)
    flags = changed(flags_of(base_flags, folder, task), learning_rate=1e-9, max_steps=2, eval_strategy="no")
    with caplog.at_level(logging.WARNING, logger="nlu"):
        assert main(flags) == 0
    assert len([r for r in caplog.records if "new output layer" in r.message]) == 1
    weights = load_file(run / "model" / "checkpoint-2" / "trained.safetensors")
    saved = load_file(folder / "model.safetensors")
    width = 1 if task == "stsb" else len(TASKS[task].labels)
    assert weights["classifier.weight"].shape == (width, 16) and weights["classifier.weight"].abs().max() < 0.2
    torch.testing.assert_close(weights["bert.pooler.dense.weight"], saved["bert.pooler.dense.weight"])
    output = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    write_rows(tmp_path / "rows.jsonl", make_rows(TASKS[task].text_fields, task == "stsb", 4, 0))
    assert predict_program.main(["--adapter", str(run / "adapter"), "--base", str(folder), *output]) == 0


def test_encoder_whose_shapes_differ_from_its_configuration_or_that_has_none_is_refused(base_flags, tmp_path, capsys):
    """transformers would initialise such weights at random."""
    folder = classifier(tmp_path / "odd", PERMUTED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    assert main(flags_of(base_flags, folder, "mrpc")) == 2
    assert "position_embeddings.weight has the shape (64, 16)" in error_line(capsys)
    (folder / "config.json").unlink()
    assert main(flags_of(base_flags, folder, "mrpc")) == 2 and "in its config.json" in error_line(capsys)


def test_cls_dropout_sets_that_of_alberts_head_and_is_refused_for_a_head_without_one(base_flags, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "albert", {"embedding_size": 8})
    folder = make_encoder(tmp_path / "encoder", "albert")
    arguments = parse_arguments([*changed(base_flags, model_name_or_path=folder), "--cls_dropout", "0.37"])
    model = without_weights(arguments, load_config(arguments, TASKS["cola"])[0])
    assert model.dropout.p == 0.37
    AutoConfig.for_model("gpt_neox").save_pretrained(folder)
    with pytest.raises(UsageError, match="gpt_neox has no dropout of its own in the head"):
        load_config(arguments, TASKS["cola"])


@pytest.mark.parametrize(("flag", "own", "cut"), [(32, 60, 32), (99, 60, 60), (99, 10**30, 64)])
def test_rows_are_cut_at_the_lowest_of_three_limits(base_flags, flag, own, cut):
    """The flag, the tokenizer's limit, and the number of position embeddings."""
    arguments = parse_arguments(base_flags)
    config, tokenizer, _ = load_config(arguments, TASKS["cola"])
    tokenizer.model_max_length = own
    limit_length(tokenizer, flag, without_weights(arguments, config))
    assert tokenizer.model_max_length == cut


@pytest.mark.parametrize("kind, longest", [
    ("bert", 30), ("roberta", 28), ("gpt2", 30), ("opt", 30), ("nystromformer", 30), ("openai-gpt", 30),
    ("deberta-v2", None),
])  # fmt: skip
def test_position_embeddings_limit_the_input_length(kind, longest):
    config = AutoConfig.for_model(kind, **SHAPES.get(kind, {}) | {"max_position_embeddings": 30})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert longest_input(model) == longest
