"""AX, predicted by the model that a run trains on MNLI, in a folder that the submission checker takes."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from loralib import export
from nlu.run_glue import main
from tests.nlu.tiny import changed, make_rows, write_rows


@pytest.fixture
def mnli_flags(encoder, tiny_glue, tmp_path):
    glue = tmp_path / "glue"
    fields = ("premise", "hypothesis")
    for split in ("train", "validation_matched", "validation_mismatched"):
        (glue / "mnli").mkdir(parents=True, exist_ok=True)
        (glue / "mnli" / f"{split}.jsonl").write_bytes((tiny_glue / "mnli" / f"{split}.jsonl").read_bytes())
    for task, split, count in (("mnli", "test_matched", 5), ("mnli", "test_mismatched", 7), ("ax", "test", 9)):
        rows = make_rows(fields, False, count, seed=count, labels=3)
        write_rows(glue / task / f"{split}.jsonl", [row | {"label": -1} for row in rows])
    return [
        "--model_name_or_path", str(encoder), "--task_name", "mnli", "--glue_dir", str(glue), "--do_train",
        "--do_predict", "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "True", "--root_output_dir",
        str(tmp_path / "run"),
    ]  # fmt: skip


def rows_of(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_ax_gets_the_answers_of_the_trained_model_at_once_or_later(mnli_flags, tmp_path):
    """The same rows, once as MNLI's test set and once as AX: the same words. They can be asked of a run that has
    finished: the same files."""
    glue = tmp_path / "glue"
    (glue / "ax/test.jsonl").write_bytes((glue / "mnli/test_mismatched.jsonl").read_bytes())
    at_once = [*mnli_flags, "--predict_task", "ax", "--learning_rate", "1e-2", "--lora_alpha", "128"]
    assert main(at_once) == 0
    folder = tmp_path / "run/predictions"
    counts = {path.name: len(rows_of(path)) for path in folder.iterdir()}
    assert counts == {"MNLI-m.tsv": 5, "MNLI-mm.tsv": 7, "AX.tsv": 7}
    rows = rows_of(folder / "AX.tsv")
    assert rows == rows_of(folder / "MNLI-mm.tsv") and [row["index"] for row in rows] == [str(i) for i in range(7)]
    assert {row["prediction"] for row in rows} <= {"entailment", "neutral", "contradiction"}

    later = [flag for flag in at_once if flag not in ("--do_predict", "--predict_task", "ax")]
    own = ["--root_output_dir", str(tmp_path / "steps"), "--save_strategy", "steps", "--save_steps", "1"]
    assert main([*later, *own]) == 0
    weights = (tmp_path / "steps/adapter/adapter_model.safetensors").read_bytes()
    assert main([*later, *own, "--do_predict", "--predict_task", "ax"]) == 0
    assert (tmp_path / "steps/adapter/adapter_model.safetensors").read_bytes() == weights
    for path in folder.iterdir():
        assert (tmp_path / "steps/predictions" / path.name).read_bytes() == path.read_bytes()


def test_a_test_set_with_known_labels_is_scored(base_flags, tmp_path, capsys):
    """MRPC's labels are public: scikit-learn on the file that was written is the judge."""
    rows = make_rows(("sentence1", "sentence2"), False, 40, seed=3)
    write_rows(tmp_path / "glue/mrpc/train.jsonl", rows)
    write_rows(tmp_path / "glue/mrpc/test.jsonl", rows)
    glue = ["--task_name", "mrpc", "--glue_dir", str(tmp_path / "glue"), "--do_eval", "False", "--eval_strategy", "no"]
    assert main([*base_flags, *glue, "--do_predict", "--max_steps", "2"]) == 0
    predicted = [int(row["prediction"]) for row in rows_of(tmp_path / "run/predictions/MRPC.tsv")]
    gold = [row["label"] for row in rows]
    scores = json.loads((tmp_path / "run/results.json").read_text())["test_scores"]["MRPC"]
    assert scores == {"accuracy": accuracy_score(gold, predicted), "f1": f1_score(gold, predicted)}
    assert f"MRPC: accuracy {scores['accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_has_finished_predicts_later(mnli_flags, base_flags, tmp_path):
    assert main([*mnli_flags, "--do_eval"]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "trained")
    merged = str(tmp_path / "merged")
    assert export.main([str(tmp_path / "trained/adapter"), "--to", "merged", merged, "--base", base_flags[1]]) == 0
    gone = ("--do_train", "--do_predict", "--max_steps", "2", "--save_strategy", "no")
    flags = changed([f for f in mnli_flags if f not in gone], model_name_or_path=merged, root_output_dir=tmp_path / "e")
    flags += ["--length_bucketing"]  # of the training rows, of which there are none
    assert main([*flags, "--do_eval"]) == 0 and not (tmp_path / "e/predictions").exists()
    first = json.loads((tmp_path / "e/results.json").read_text())["evaluations"]
    assert main([*flags, "--do_eval", "--do_predict"]) == 0
    assert json.loads((tmp_path / "e/results.json").read_text())["evaluations"] == first
    files = sorted((tmp_path / "e/predictions").glob("*.tsv"))
    assert [f.name for f in files] == [f.name for f in sorted((tmp_path / "trained/predictions").glob("*.tsv"))]
    assert all(f.read_bytes() == (tmp_path / "trained/predictions" / f.name).read_bytes() for f in files)


def test_validation_rows_are_predicted_beside_the_test_s_and_each_class_is_reported(own_flags, tmp_path):
    """scikit-learn on the file that was written is the judge."""
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    own_flags += ["--test_file", str(tmp_path / "dev.jsonl"), "--on_error", "skip", "--do_predict"]
    assert main(own_flags) == 0
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
    assert record["test_scores"] == {"custom_test": {"accuracy": pytest.approx(accuracy_score(truth, found))}}
    assert (tmp_path / "run/predictions/custom_validation.png").stat().st_size > 2000
    counts = {name: truth.count(name) for name in labels}
    assert record["data"]["validation"] == {"rows": 15, "skipped": 1, "cut": 0, "classes": counts}
