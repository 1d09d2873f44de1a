"""A run's predictions, and the GLUE server's files: written, checked against the rules, zipped."""

import csv
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from nlu import run_glue, submission
from nlu.data.prediction_files import draw_confusion, write_predictions
from nlu.errors import UsageError
from nlu.submission import find_predictions, main
from nlu.tasks import TASKS, Task
from tests.nlu.tiny import changed, make_rows, write_rows

# the server's names, the sizes of the official test sets and the words of its sample submission
OFFICIAL = {
    "CoLA.tsv": ("cola", "test", 1063, "01"),
    "SST-2.tsv": ("sst2", "test", 1821, "01"),
    "MRPC.tsv": ("mrpc", "test", 1725, "01"),
    "QQP.tsv": ("qqp", "test", 390965, "01"),
    "STS-B.tsv": ("stsb", "test", 1379, None),
    "MNLI-m.tsv": ("mnli", "test_matched", 9796, ["entailment", "neutral", "contradiction"]),
    "MNLI-mm.tsv": ("mnli", "test_mismatched", 9847, ["entailment", "neutral", "contradiction"]),
    "QNLI.tsv": ("qnli", "test", 5463, ["entailment", "not_entailment"]),
    "RTE.tsv": ("rte", "test", 3000, ["entailment", "not_entailment"]),
    "WNLI.tsv": ("wnli", "test", 146, "01"),
    "AX.tsv": ("ax", "test", 1104, ["entailment", "neutral", "contradiction"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder per task with predictions for its whole test set; for QQP, which would take seconds, 500 rows."""
    root, generator = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(submission._SERVER, "QQP.tsv", 500)
        for name, (task, split, _, words) in OFFICIAL.items():
            rows = submission._SERVER[name]
            predictions = generator.uniform(-1, 6, rows) if words is None else generator.integers(0, len(words), rows)
            write_predictions(TASKS[task], split, generator.permutation(rows), predictions, root / task / "predictions")
        yield sorted(root.iterdir())


def test_predictions_follow_their_index(tmp_path):
    path = write_predictions(TASKS["rte"], "test", [2, 0, 1], np.array([1, 0, 1]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n2\tnot_entailment\n"
    path = write_predictions(TASKS["stsb"], "test", [0, 1, 2], np.float32([5.5, -0.2, 3.14159]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n2\t3.142\n"
    path = write_predictions(TASKS["stsb"], "validation", [0], np.float32([5.25]), tmp_path, [5.0])
    assert path.read_text() == "index\tprediction\tlabel\n0\t5.25\t5\n"  # as it was scored
    own = Task("custom", "own data", ("text",), ("sad", "glad"), ("accuracy",))
    path = write_predictions(own, "validation", [4], [1], tmp_path, [0])
    assert (path.name, path.read_text()) == ("custom_validation.tsv", "index\tprediction\tlabel\n4\tglad\tsad\n")
    own = Task("custom", "own data", ("text",), None, ("pearson",))
    path = write_predictions(own, "test", [0, 1], np.float32([0.00012, -1234.5]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\t0.00012\n1\t-1234.5\n"


def test_zip_has_the_servers_eleven_files_with_its_rows_and_words(runs, tmp_path, capsys):
    """The rows are in the order of the test set. A second zip replaces the first, if nothing is wrong with it."""
    sizes = {name: (task.name, rows) for task in TASKS.values() for name, rows in task.submission_files}
    assert sizes == {name: (task, rows) for name, (task, _, rows, _) in OFFICIAL.items()}
    out = tmp_path / "submission.zip"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert "with 11 files" in capsys.readouterr().out
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == list(OFFICIAL) and archive.testzip() is None
        for name, (task, _, rows, words) in OFFICIAL.items():
            lines = [line.split("\t") for line in archive.read(name).decode().splitlines()]
            assert lines[0] == ["index", "prediction"]
            assert [index for index, _ in lines[1:]] == [str(i) for i in range(500 if task == "qqp" else rows)]
            assert words is None or {word for _, word in lines[1:]} == set(words)
    written = out.read_bytes()
    write_predictions(TASKS["wnli"], "test", range(146), [0] * 146, tmp_path / "other")
    assert main([*map(str, runs), str(tmp_path / "other"), "--out", str(out)]) == 2
    assert "WNLI.tsv is there twice" in capsys.readouterr().err
    assert main([str(tmp_path / "other"), "--out", str(out)]) == 2
    assert "missing: CoLA.tsv, SST-2.tsv" in capsys.readouterr().err and out.read_bytes() == written


@pytest.mark.parametrize("header, rows, answer", [
    ("index\tprediction\n", range(145), "0"), ("index\tprediction\n", (*range(5), *range(6, 147)), "0"),
    ("index\tprediction\n", range(146), ""), ("id\tlabel\n", range(146), "0"), ("", (), ""),
])  # fmt: skip
def test_a_file_without_a_prediction_for_each_row_of_the_test_set_is_refused(tmp_path, header, rows, answer):
    (tmp_path / "WNLI.tsv").write_text(header + "".join(f"{row}\t{answer}\n" for row in rows))
    with pytest.raises(UsageError, match="does not have the test set's 146 rows, each predicted"):
        find_predictions([tmp_path])


@pytest.mark.parametrize("name, value", [("WNLI.tsv", "entailment"), ("AX.tsv", "1"), ("STS-B.tsv", "5.5")])
def test_a_prediction_that_is_no_label_and_a_folder_that_does_not_exist_are_refused(runs, tmp_path, name, value):
    copy = shutil.copytree(runs[0].parent, tmp_path / "all")
    folders = [copy / run.name for run in runs]
    (path,) = (tmp_path / "all").glob(f"*/predictions/{name}")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], f"{len(lines) - 2}\t{value}"]))
    with pytest.raises(UsageError, match=f"{name}: '{value}' is no label of"):
        find_predictions(folders)
    with pytest.raises(UsageError, match="there is no folder"):
        find_predictions([*folders, tmp_path / "absent"])


# ---- what a run predicts -------------------------------------------------------------------------------------------


def rows_of(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_ax_is_predicted_by_the_trained_model_at_once_or_later(base_flags, tiny_glue, tmp_path):
    """The same rows as MNLI's test set and as AX get the same answers. A finished run can still be asked for them, and
    writes the same files."""
    glue = shutil.copytree(tiny_glue, tmp_path / "glue")
    for path, count in (("mnli/test_matched", 5), ("mnli/test_mismatched", 7), ("ax/test", 7)):
        rows = make_rows(("premise", "hypothesis"), False, count, seed=count, labels=3)
        write_rows(glue / f"{path}.jsonl", rows if path == "ax/test" else [row | {"label": -1} for row in rows])
    flags = changed(base_flags, task_name="mnli", glue_dir=glue, max_steps=2, eval_strategy="no", lora_alpha=64)
    flags.remove("--do_eval")
    asked = ["--do_predict", "--predict_task", "ax"]
    assert run_glue.main([*changed(flags, save_strategy="no"), *asked]) == 0
    folder = tmp_path / "run/predictions"
    counts = {path.name: len(rows_of(path)) for path in folder.glob("*.tsv")}
    assert counts == {"MNLI-m.tsv": 5, "MNLI-mm.tsv": 7, "AX.tsv": 7}
    rows = rows_of(folder / "AX.tsv")
    assert rows == rows_of(folder / "MNLI-mm.tsv") and [row["index"] for row in rows] == [str(i) for i in range(7)]
    assert {row["prediction"] for row in rows} <= {"entailment", "neutral", "contradiction"}
    scores = json.loads((tmp_path / "run/results.json").read_text())["test_scores"]
    assert {name: list(metrics) for name, metrics in scores.items()} == {"AX": ["matthews_correlation", "accuracy"]}

    later = changed(flags, root_output_dir=tmp_path / "steps", save_steps=1)
    assert run_glue.main(later) == 0
    weights = (tmp_path / "steps/adapter/adapter_model.safetensors").read_bytes()
    assert run_glue.main([*later, *asked]) == 0
    assert (tmp_path / "steps/adapter/adapter_model.safetensors").read_bytes() == weights
    for path in folder.iterdir():
        assert (tmp_path / "steps/predictions" / path.name).read_bytes() == path.read_bytes()


def test_confusion_matrix_is_drawn_of_labels_that_look_like_formulas(tmp_path):
    draw_confusion({"labels": ["$", "$$"], "confusion_matrix": [[1, 2], [3, 4]]}, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size


def test_validation_rows_are_predicted_too_and_each_class_is_reported(own_flags, tmp_path, capsys):
    """The scores are those of scikit-learn on the written files."""
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    own_flags += ["--test_file", str(tmp_path / "dev.jsonl"), "--on_error", "skip", "--do_predict"]
    assert run_glue.main([*own_flags, "--metric", "macro-f1"]) == 0
    assert f" on {tmp_path.name}: trains " in capsys.readouterr().out  # as tables name the data
    record = json.loads((tmp_path / "run/results.json").read_text())
    written = rows_of(tmp_path / "run/predictions/custom_validation.tsv")
    assert [row["label"] for row in written] == [row["rating"] for i, row in enumerate(rows) if i != 3]
    assert written == rows_of(tmp_path / "run/predictions/custom_test.tsv")
    truth, found = ([row[column] for row in written] for column in ("label", "prediction"))
    labels = ["bad", "fair", "good"]
    report = record["class_reports"]["custom_validation"]
    assert report["confusion_matrix"] == confusion_matrix(truth, found, labels=labels).tolist()
    recalls = recall_score(truth, found, labels=labels, average=None, zero_division=0)
    assert [report["classes"][name]["recall"] for name in labels] == pytest.approx(recalls)
    expected = {"macro_f1": f1_score(truth, found, average="macro"), "accuracy": accuracy_score(truth, found)}
    assert record["test_scores"] == {"custom_test": pytest.approx(expected)}
    assert (record["metric"], record["data"]["train"]["rows"]) == ("macro_f1", 39)
    assert record["last"] == pytest.approx(expected["macro_f1"])
    assert (tmp_path / "run/predictions/custom_validation.png").stat().st_size > 2000
    counts = {name: truth.count(name) for name in labels}
    assert record["data"]["validation"] == {"rows": 15, "skipped": 1, "cut": 0, "hidden": 0, "classes": counts}
