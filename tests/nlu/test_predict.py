"""Predictions from an adapter: correct, in order, streamed, and strict about bad rows."""

import csv
import datetime
import io
import json
import math
import shutil
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import loralib
from loralib.export import export_merged
from nlu import predict, run_glue
from nlu.data.file_formats import Row
from nlu.errors import UsageError
from nlu.predict import main
from nlu.trained_model import Predictor, _text_columns
from tests.nlu.tiny import changed, make_rows, read, write_rows

ROWS = [{name: row[name] for name in ("a", "b")} for row in make_rows(("a", "b"), True, 40, 0)]


def save(encoder, folder, labels: int, **configured):
    """The folder of an adapter of random values that takes at most 12 tokens, and its model."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
    loralib.inject(model, "lora2", ["query", "value"], r=4, k=2, lora_alpha=32)
    model.classifier.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data)
    if labels == 2:
        model.config.update({"id2label": {0: "low", 1: "high"}} | configured)
    card = {"task": "custom", "text_fields": ["a", "b"], "max_seq_length": 12}
    return loralib.save_adapter(model, folder, card=card), model.eval()


@pytest.fixture(scope="module")
def scorer(encoder, tmp_path_factory):
    """An adapter folder for regression, and its scores for ROWS, one at a time and without padding."""
    folder, model = save(encoder, tmp_path_factory.mktemp("scorer") / "a", 1)
    return folder, alone(model, encoder)[:, 0].tolist()


def alone(model, encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        cut = {"truncation": True, "max_length": 12, "return_tensors": "pt"}
        return torch.cat([model(**tokenizer(*row.values(), **cut)).logits for row in ROWS])


@pytest.fixture(scope="module")
def input_files(tmp_path_factory):
    """The rows as .jsonl and .csv."""
    folder = tmp_path_factory.mktemp("inputs")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "rows.csv", [{"id": i, "b": row["b"], "a": row["a"]} for i, row in enumerate(ROWS)])
    return folder


@pytest.mark.parametrize(("suffix", "buffer"), [("jsonl", 1), ("csv", 32)])
def test_scores_are_those_of_each_row_alone(encoder, scorer, input_files, tmp_path, monkeypatch, suffix, buffer):
    monkeypatch.setattr(predict, "BATCHES_IN_BUFFER", buffer)
    out = tmp_path / "out.jsonl"
    flags = ["--adapter", str(scorer[0]), "--base", str(encoder), "--output", str(out), "--batch_size", "7"]
    flags += ["--input", str(input_files / f"rows.{suffix}")]
    out.touch()  # an empty file has nothing to lose
    assert main(flags) == 0
    written = out.read_text()
    assert main(flags) == 2 and out.read_text() == written  # never over an older output
    found = [json.loads(line) for line in written.splitlines()]
    first = 1 if suffix == "jsonl" else 2
    assert [row["line"] for row in found] == list(range(first, first + 40))
    assert [row["score"] for row in found] == pytest.approx(scorer[1], abs=2e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_rows_from_a_pipe_get_the_same_scores(encoder, scorer, input_files, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO((input_files / "rows.csv").read_bytes())))
    adapter = ["--adapter", str(scorer[0]), "--base", str(encoder)]
    assert main([*adapter, "--input", "-", "--input_format", "csv"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["score"] for row in found] == pytest.approx(scorer[1], abs=2e-5)


def test_classes_come_with_probabilities_and_the_columns_of_the_input(encoder, input_files, tmp_path, capsys):
    folder, model = save(encoder, tmp_path / "a", 2)
    flags = ["--adapter", str(folder), "--base", str(encoder), "--input", str(input_files / "rows.csv")]
    assert main(flags) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    too_long = sum(len(tokenizer(*row.values())["input_ids"]) > 12 for row in ROWS)
    last = f"40 rows predicted, {too_long} cut at 12 tokens (--max_seq_length), 0 skipped"
    assert 0 < too_long < 40 and captured.err.splitlines()[-1] == last
    assert main([*flags, "--output", str(tmp_path / "out.csv")]) == 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    expected = alone(model, encoder).softmax(-1).tolist()
    for i, ((low, high), row, line, cells) in enumerate(zip(expected, ROWS, found, table, strict=True)):
        assert list(line) == ["line", "id", "b", "a", "label", "probabilities"]
        assert line["probabilities"] == pytest.approx({"low": low, "high": high}, abs=1e-5)
        assert line["label"] == cells["label"] == ("low" if low > high else "high")
        assert float(cells["probability_high"]) == pytest.approx(high, abs=1e-5)
        assert {name: cells[name] for name in ("id", *row)} == {"id": str(i), **row}  # for a join with the input


def test_input_column_with_the_name_of_an_output_column_is_renamed():
    answers = [(Row(0, 2, {"id": "a", "label": "gold"}), [0.25, 0.75])]
    for kind, said in (
        ("csv", {"probability_no": 0.25, "probability_yes": 0.75}),
        ("jsonl", {"probabilities": {"no": 0.25, "yes": 0.75}}),
    ):
        (record,) = predict.records(answers, kind, ["no", "yes"], ["id", "label"])
        assert list(record.items()) == list(
            {"line": 2, "id": "a", "input_label": "gold", "label": "yes", **said}.items()
        )
    more = [*answers, (Row(1, 3, {"id": "b", "label": "", "extra": 1}), [0.25, 0.75])]
    with pytest.raises(UsageError, match="line 3 has the column 'extra', which the first line lacks"):
        list(predict.records(more, "csv", ["no", "yes"], ["id", "label"]))  # its value would have been lost
    assert len(list(predict.records(more, "jsonl", ["no", "yes"], ["id", "label"]))) == 2
    again = [(Row(0, 2, {"label": "first", "input_label": "gold"}), [0.25, 0.75])]  # an output as the input
    (record,) = predict.records(again, "jsonl", ["no", "yes"], ["label"])  # the first row had no other key
    assert (record["input_label"], record["input_input_label"], record["label"]) == ("first", "gold", "yes")


def test_kept_values_that_json_lacks_are_written_as_text_and_null():
    written = predict.as_line({"day": datetime.date(2020, 2, 3), "price": float("nan")}, "jsonl", False)
    assert json.loads(written) == {"day": "2020-02-03", "price": None}


def test_bad_rows_are_named_and_skipped_or_fatal(encoder, scorer, tmp_path, capsys, caplog):
    lines = ['{"a": "the cat", "b": "a dog"}'] * 8
    lines[1], lines[4], lines[6] = '{"a": "x"}', "", '{"a": "x", "b": " "}'
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"a": "\xff", "b": "x"}')
    flags = ["--adapter", str(scorer[0]), "--base", str(encoder), "--input", str(tmp_path / "in.jsonl")]
    assert main([*flags, "--output", str(tmp_path / "out.jsonl"), "--on_error", "skip"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in found] == [1, 3, 4, 6, 8]
    assert [m.split("line ")[1].split(":")[0] for m in caplog.messages] == ["2", "7", "9"]
    assert capsys.readouterr().err.splitlines()[-1] == "5 rows predicted, 3 skipped"
    (tmp_path / "out.jsonl").unlink()
    assert main([*flags, "--output", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "in.jsonl, line 2: no column 'b'" in error and error.splitlines()[-1].startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_nan_logits_are_refused(encoder):
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    predictor = Predictor(model.eval(), AutoTokenizer.from_pretrained(encoder), ("text",), ["a", "b"], 8)
    with pytest.raises(UsageError, match="gives NaN or infinity: its training has failed"):
        predictor([Row(0, 1, {"text": "a cat"})], 2)


@pytest.mark.parametrize(("asked", "trained"), [("a", ["a", "b"]), ("a,b,c", []), ("a,a", [])])
def test_text_columns_of_another_number_than_in_training_are_refused(asked, trained):
    """A column named twice would be a pair of texts, and a third one would become the tokenizer's text_target."""
    with pytest.raises(UsageError, match="different column"):
        _text_columns(asked, {"text_fields": trained})


@pytest.mark.parametrize("change", [
    {"problem_type": "multi_label_classification"}, {"id2label": {0: "same", 1: "same"}},
])  # fmt: skip
def test_adapter_without_one_answer_per_row_is_refused(encoder, tmp_path, input_files, change, capsys):
    folder, _ = save(encoder, tmp_path / "a", 2, **change)
    assert main(["--adapter", str(folder), "--base", str(encoder), "--input", str(input_files / "rows.csv")]) == 2
    assert "must predict one number or one class for each row" in capsys.readouterr().err


def test_another_base_than_the_trained_one_is_refused_in_one_line(encoder, scorer, input_files, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(shutil.copytree(encoder, tmp_path / "base"))
    model.bert.embeddings.word_embeddings.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    flags = ["--adapter", str(scorer[0]), "--base", str(tmp_path / "base"), "--input", str(input_files / "rows.csv")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "weights are not those" in error and error.count("\n") == 1
    for base, said in (("missing/base", ", and the hub gave no model: "), (tmp_path / "missing", "\n")):
        assert main([*flags[:3], str(base), *flags[4:]]) == 2
        error = capsys.readouterr().err
        assert f"--base {base} cannot be loaded: there is no such folder{said}" in error and error.count("\n") == 1


def test_memory_does_not_grow_with_the_input():
    """Rows of an endless input are written while it is read, and at most one buffer of them is held."""
    read = []

    def rows():
        for number in count(1):
            read.append(number)
            yield Row(number, number, {"text": "x"})

    answers = predict.predict_rows(rows(), lambda rows, batch_size: [[1.0]] * len(rows), 4)
    for number, (row, _) in enumerate(islice(answers, 20_000), 1):
        assert row.place == number and len(read) - number <= 4 * predict.BATCHES_IN_BUFFER


# ---- after a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, task", [
    ("lora2", "cola"), ("bitfit", "stsb"), pytest.param("hadapter", "cola", marks=pytest.mark.slow),
    pytest.param("full", "stsb", marks=pytest.mark.slow),
    ('peft --peft_config={"peft_type":"LORA","lora_dropout":0.9,"init_lora_weights":false}', "cola"),
])  # fmt: skip
def test_adapter_of_a_run_gives_the_scores_of_the_run(base_flags, encoder, tiny_glue, tmp_path, capsys, method, task):
    flags = changed(base_flags, task_name=task, lora_r=None, lora_alpha=None, learning_rate=0.1)
    assert run_glue.main([*flags, "--method", *method.split()]) == 0
    run, rows = tmp_path / "run", tiny_glue / task / "validation.jsonl"
    assert ("export:" in capsys.readouterr().out) == (method in ("lora2", "bitfit", "full"))  # these can be merged
    if method == "hadapter":
        with pytest.raises(ValueError, match=r"the model has no .* cannot be loaded or merged here .*README"):
            export_merged(run / "adapter", tmp_path / "merged", str(encoder))
    assert main(["--adapter", str(run), "--base", str(encoder), "--input", str(rows),
                 "--output", str(tmp_path / "out.jsonl")]) == 0  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    truth = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    names = ["unacceptable", "acceptable"]
    losses = [
        (row["score"] - label) ** 2 if task == "stsb" else -math.log(row["probabilities"][names[label]])
        for row, label in zip(found, truth, strict=True)
    ]  # not Pearson: so small a model's scores are nearly equal, and rounding decides their order
    assert sum(losses) / len(losses) == pytest.approx(read(flags)["evaluations"][-1]["loss"], rel=1e-5)
