"""Predictions from an adapter and a merged checkpoint: right, in order, streamed, and strict about bad rows."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import loralib
from loralib.interop.export import export_merged
from nlu import predict, run_glue
from nlu.data.reader import Row
from nlu.errors import UsageError
from nlu.predict import main
from tests.nlu.tiny import changed, make_encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(pretrained):
    return [{name: row[name] for name in ("sentence1", "sentence2")} for row in pretrained.rows[:40]]


@pytest.fixture(scope="module")
def expected(pretrained, lora2, rows):
    """One prediction at a time, nothing padded, through transformers alone."""
    base = pretrained.base()
    loralib.load_adapter(base, lora2[2])
    with torch.no_grad():
        return [float(base(**pretrained.tokenizer(*r.values(), return_tensors="pt")).logits) for r in rows]


@pytest.fixture(scope="module")
def input_files(rows, tmp_path_factory):
    """The rows as .jsonl, .csv (with an embedded line break) and .tsv."""
    folder = tmp_path_factory.mktemp("inputs")
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "sentence2", "sentence1"])
        writer.writeheader()
        writer.writerows({"id": i, **row} for i, row in enumerate(rows))
    with open(folder / "rows.tsv", "w") as file:
        file.write("sentence1\tsentence2\n" + "".join(f"{r['sentence1']}\t{r['sentence2']}\r\n" for r in rows))
    return folder


@pytest.mark.parametrize(("suffix", "buffer"), [("jsonl", 1), ("csv", 32), ("tsv", 32)])
def test_scores_are_those_of_each_row_alone(
    pretrained, lora2, input_files, expected, tmp_path, monkeypatch, suffix, buffer
):
    monkeypatch.setattr(predict, "BATCHES_IN_BUFFER", buffer)
    out = tmp_path / "out.jsonl"
    flags = ["--adapter", str(lora2[2]), "--base", str(pretrained.path), "--output", str(out), "--batch_size", "7"]
    assert main([*flags, "--input", str(input_files / f"rows.{suffix}")]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    first = 1 if suffix == "jsonl" else 2
    assert [row["line"] for row in found] == list(range(first, first + 40))
    assert [row["score"] for row in found] == pytest.approx(expected, abs=2e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_merged_checkpoint_predicts_the_same_from_a_pipe(pretrained, lora2, input_files, expected, tmp_path):
    export_merged(lora2[2], tmp_path / "merged", str(pretrained.path))
    flags = ["--model", str(tmp_path / "merged"), "--text_fields", "sentence1,sentence2", "--input", "-"]
    result = subprocess.run(
        [sys.executable, "nlu/predict.py", *flags, "--output_format", "csv"],
        input=(input_files / "rows.jsonl").read_text(), capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "40 rows predicted, 0 skipped\n"  # no bar: not a terminal
    table = list(csv.reader(io.StringIO(result.stdout)))
    assert table[0] == ["line", "score"] and [int(line) for line, _ in table[1:]] == list(range(1, 41))
    assert [float(score) for _, score in table[1:]] == pytest.approx(expected, abs=2e-5)


@pytest.fixture(scope="module")
def classifier(pretrained, tmp_path_factory):
    """An adapter folder with two named classes, and its model."""
    model = pretrained.base()
    model.config.id2label = {0: "low", 1: "high"}
    torch.manual_seed(0)
    model.classifier = torch.nn.Linear(384, 2)
    loralib.inject(model, "lora", ["query"], r=2)
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    card = {"task": "custom", "text_fields": ["sentence1"], "max_seq_length": 8}
    folder = tmp_path_factory.mktemp("classes") / "a"
    return loralib.save_adapter(model, folder, base_model="hub/name", card=card), model


@pytest.mark.parametrize("change, says", [
    ({"problem_type": "multi_label_classification", "num_labels": 2}, "several labels or numbers"),
    ({"problem_type": "regression", "num_labels": 3}, "several labels or numbers"),
    ({}, "which columns hold the text"),
    ({"id2label": {0: "same", 1: "same"}}, "2 different classes"),
    ({"id2label": {1: "a", 2: "b"}}, "2 different classes, numbered from 0"),
])  # fmt: skip
def test_what_a_checkpoint_says_of_itself_is_checked(tmp_path, input_files, change, says, capsys):
    make_encoder(tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m", **change)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    columns = ["--text_columns", "sentence1"] if change else []
    assert main(["--model", str(tmp_path / "m"), "--input", str(input_files / "rows.csv"), *columns]) == 2
    assert says in capsys.readouterr().err


def test_classes_come_with_probabilities(pretrained, classifier, input_files, rows, tmp_path, capsys):
    flags = ["--adapter", str(classifier[0]), "--base", str(pretrained.path), "--input", str(input_files / "rows.csv")]
    assert main([*flags, "--no-keep_columns"]) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    lengths = [len(pretrained.tokenizer(row["sentence1"])["input_ids"]) for row in rows]
    too_long = sum(length > 8 for length in lengths)
    assert (
        0 < too_long < 40
        and captured.err.splitlines()[-1] == f"40 rows predicted, {too_long} cut at 8 tokens, 0 skipped"
    )
    assert main([*flags, "--output", str(tmp_path / "out.csv")]) == 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    with torch.no_grad():
        for i, (row, line, cells) in enumerate(zip(rows, found, table, strict=True)):
            tokens = pretrained.tokenizer(row["sentence1"], truncation=True, max_length=8, return_tensors="pt")
            low, high = classifier[1].eval()(**tokens).logits.softmax(-1)[0].tolist()
            assert line.keys() == {"line", "label", "probabilities"}
            assert line["probabilities"] == pytest.approx({"low": low, "high": high}, abs=1e-5)
            assert line["label"] == cells["label"] == ("low" if low > high else "high")
            assert float(cells["probability_high"]) == pytest.approx(high, abs=1e-5)
            assert {name: cells[name] for name in ("id", *row)} == {"id": str(i), **row}  # what a join needs


def test_a_column_with_the_name_of_an_answer_is_kept_under_another():
    for kind in ("csv", "jsonl"):
        output = io.StringIO()
        write = predict.row_writer(output, kind, ["no", "yes"], ["id", "label"])
        write(Row(0, 2, {"id": "a", "label": "gold"}), [0.25, 0.75])
        if kind == "csv":
            assert (
                output.getvalue()
                == "line,id,input_label,label,probability_no,probability_yes\n2,a,gold,yes,0.25,0.75\n"
            )
        else:
            said = {"line": 2, "id": "a", "input_label": "gold", "label": "yes"}
            assert json.loads(output.getvalue()) == said | {"probabilities": {"no": 0.25, "yes": 0.75}}


BAD = {
    2: '{"sentence1": "a"}', 3: "not json", 4: '{"sentence1": "a", "sentence2": 3}', 5: '["a", "b"]',
    7: '{"sentence1": "\\ud800", "sentence2": "b"}', 8: '{"sentence1": "a", "sentence2": "b" ',
}  # fmt: skip


def test_bad_rows_are_named_and_skipped_or_fatal(pretrained, lora2, tmp_path, capsys):
    good = '{"sentence1": "A plane.", "sentence2": "A train."}'
    lines = [BAD.get(i, good if i != 6 else "") for i in range(1, 11)]
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"sentence1": "\xff", "sentence2": "b"}')
    flags = ["--adapter", str(lora2[2]), "--base", str(pretrained.path), "--input", str(tmp_path / "in.jsonl")]
    assert main([*flags, "--output", str(tmp_path / "out.jsonl"), "--on_error", "skip"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in found] == [1, 9, 10]
    messages = capsys.readouterr().err.splitlines()
    assert messages[-1] == "3 rows predicted, 7 skipped"
    assert [int(m.split("line ")[1].split(":")[0]) for m in messages[:-1]] == [*BAD, 11]
    (tmp_path / "out.jsonl").unlink()
    assert main([*flags, "--output", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "in.jsonl, line 2: no column 'sentence2'" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--input", "in.xlsx"], "the formats are jsonl, json, csv, tsv, parquet; save a spreadsheet as CSV"),
        (["--input", "in.csv"], "no column 'sentence1'"),
        (["--input", "in.csv", "--text_columns", "a,a"], "2 different column(s)"),
        (["--input", "in.csv", "--text_columns", "a,b", "--max_seq_length", "3"], "no room for text"),
        (["--input", "in.csv", "--text_columns", "a,b", "--output", "./in.csv"], "is the input"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(pretrained, lora2, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    for name in ("in.csv", "in.xlsx"):
        Path(name).write_text("a,b\n1,2\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["--adapter", str(lora2[2]), "--base", str(pretrained.path), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and says in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_nan_is_no_answer(encoder, labels):
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels or "a"))
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    predictor = predict.Predictor(model.eval(), AutoTokenizer.from_pretrained(encoder), ("text",), labels, 8)
    with pytest.raises(UsageError, match="gives NaN or infinity: its training has failed"):
        predictor([Row(0, 1, {"text": "a cat"})], 2)


def test_a_base_that_is_missing_or_another_says_what_differs(pretrained, lora2, encoder, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    flags = ["--input", str(tmp_path / "in.jsonl")]
    other = pretrained.base()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] += 1
    for name in ("changed", "headless"):
        (other if name == "changed" else other.bert).save_pretrained(tmp_path / name)
        pretrained.tokenizer.save_pretrained(tmp_path / name)
    for model, says in [
        (["--adapter", str(lora2[2])], "cannot be loaded"),
        (["--adapter", str(lora2[2]), "--base", str(encoder)], "no linear layer bert.encoder.layer.2"),
        (["--adapter", str(lora2[2]), "--base", str(tmp_path / "changed")], "weights are not those"),
        (["--model", str(tmp_path / "headless"), "--text_columns", "sentence1"], "is not a trained classifier"),
    ]:
        capsys.readouterr()
        assert main([*model, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_an_adapter_of_another_kind_of_model_and_a_base_without_a_tokenizer_are_refused(tmp_path, capsys):
    base = make_encoder(tmp_path / "base")
    (tmp_path / "in.jsonl").write_text('{"text": "the cat sat"}\n')
    for kind in ("TokenClassification", "SequenceClassification"):
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, num_labels=2)
        loralib.inject(model, "lora", ["query"], r=2, lora_alpha=2)
        model.classifier.requires_grad_(True)
        loralib.save_adapter(model, tmp_path / kind, card={"text_fields": ["text"]})
    flags = ["--base", str(base), "--input", str(tmp_path / "in.jsonl")]
    assert main(["--adapter", str(tmp_path / "TokenClassification"), *flags]) == 2
    assert "models for sequence classification only" in capsys.readouterr().err
    whole = ["--adapter", str(tmp_path / "SequenceClassification"), *flags]
    assert main(whole) == 0
    for path in base.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special")):
            path.unlink()
    capsys.readouterr()
    assert main(whole) == 2  # transformers would make a tokenizer of special tokens alone
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_revision_that_an_adapter_records_is_the_base(tmp_path):
    """A hub's cache with two commits; predicting and merging take the recorded one, though main is the other."""
    hub, commits = tmp_path / "hub/models--me--encoder", {"main": "1" * 40, "r1": "2" * 40}
    first = make_encoder(hub / "snapshots" / commits["main"])
    shutil.copytree(first, second := hub / "snapshots" / commits["r1"])
    model = AutoModelForSequenceClassification.from_pretrained(first)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(2)
    model.bert.save_pretrained(second)
    (hub / "refs").mkdir()
    for name, commit in commits.items():
        (hub / "refs" / name).write_text(commit)
    loralib.inject(model, "lora", ["query"], r=2, lora_alpha=2)
    model.classifier.requires_grad_(True)
    loralib.save_adapter(
        model, tmp_path / "a", base_model="me/encoder", base_revision="r1", card={"text_fields": ["text"]}
    )
    (tmp_path / "in.jsonl").write_text('{"text": "the cat sat"}\n')
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    export = ["-m", "loralib.export"]
    for program in (
        [ROOT / "nlu/predict.py", "--adapter", "a", "--input", "in.jsonl"],
        [*export, "a", "merged", "--to", "merged", "--base", "me/encoder"],
        [*export, "a", "peft", "--to", "peft"],
        [*export, "peft", "back", "--to", "loralib", "--base", "me/encoder"],
        [*export, "back", "merged-again", "--to", "merged", "--base", "me/encoder"],
    ):
        done = subprocess.run([sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---- streaming ------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_input():
    """An endless input: rows come out while it is read, and no more than a buffer of them is held."""
    read_so_far, written, held = count(), [], []

    class Endless(Exception):
        pass

    def rows():
        for i in read_so_far:
            held.append(i - len(written))
            if i == 20_000:
                raise Endless
            yield Row(i, i, {"text": "x"})

    def predictor(rows, batch_size):
        return [[1.0]] * len(rows)

    with pytest.raises(Endless):
        for row, _ in predict.predict_rows(rows(), predictor, 4):
            written.append(row.place)
    assert len(written) > 19_000 and written == sorted(written) and max(held) <= 4 * predict.BATCHES_IN_BUFFER


# ---- after a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, task", [
    ("lora2", "cola"), ("bitfit", "stsb"), ("hadapter", "cola"), ("peft", "cola"), ("full", "stsb"),
])  # fmt: skip
def test_a_run_s_adapter_predicts_what_the_run_scored(base_flags, encoder, tiny_glue, tmp_path, capsys, method, task):
    flags = changed(base_flags, task_name=task, lora_r=None, lora_alpha=None)
    assert run_glue.main([*flags, "--method", method, *(["--peft_config", "ia3"] if method == "peft" else [])]) == 0
    run, rows = tmp_path / "run", tiny_glue / task / "validation.jsonl"
    assert ("export:" in capsys.readouterr().out) == (method in ("lora2", "bitfit", "full"))  # what can be merged
    if method == "hadapter":
        with pytest.raises(ValueError, match="its method adds modules, which this model lacks"):
            export_merged(run / "adapter", tmp_path / "merged", str(encoder))
    assert main(["--adapter", str(run), "--base", str(encoder), "--input", str(rows),
                 "--output", str(tmp_path / "out.jsonl")]) == 0  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    truth = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    names = ["unacceptable", "acceptable"]
    losses = [
        (row["score"] - label) ** 2 if task == "stsb" else -math.log(row["probabilities"][names[label]])
        for row, label in zip(found, truth, strict=True)
    ]  # not Pearson: the scores of so small a model are nearly equal, and rounding orders them
    scores = json.loads((run / "results.json").read_text())["evaluations"][-1]
    assert sum(losses) / len(losses) == pytest.approx(scores["loss"], rel=1e-4)
    if task == "cola":
        right = [names.index(row["label"]) == label for row, label in zip(found, truth, strict=True)]
        assert sum(right) / len(right) == pytest.approx(scores["accuracy"])
