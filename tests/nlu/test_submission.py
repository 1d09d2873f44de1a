"""The GLUE server's files: written, checked against the rules, zipped."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from nlu import submission
from nlu.data.predictions import write_predictions
from nlu.errors import UsageError
from nlu.submission import find_predictions, main
from nlu.tasks import TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
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
SERVER = dict(OFFICIAL)
TAKEN = dict(submission._SERVER)


def test_the_servers_files_are_the_official_test_sets():
    assert {name: (task.name, rows) for name, (task, rows) in TAKEN.items()} == {
        name: (task, rows) for name, (task, _, rows, _) in OFFICIAL.items()
    }


@pytest.fixture(scope="module", autouse=True)
def fewer_rows_of_qqp():
    """Which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SERVER, "QQP.tsv", ("qqp", "test", 500, "01"))
        patch.setitem(submission._SERVER, "QQP.tsv", (TASKS["qqp"], 500))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """One folder a task, with predictions for whole test sets."""
    root = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    for task, split, rows, words in SERVER.values():
        predictions = generator.uniform(-1, 6, rows) if words is None else generator.integers(0, len(words), rows)
        write_predictions(TASKS[task], split, generator.permutation(rows), predictions, root / task / "predictions")
    return sorted(root.iterdir())


def test_files_are_the_servers(runs):
    for folder in runs:
        for name, path in find_predictions(folder).items():
            task, _, rows, words = SERVER[name]
            assert task == folder.name
            lines = path.read_text().split("\n")
            assert lines[0] == "index\tprediction" and lines[-1] == "" and len(lines) == rows + 2
            assert [line.split("\t")[0] for line in lines[1:-1]] == [str(i) for i in range(rows)]
            values = {line.split("\t")[1] for line in lines[1:-1]}
            if words is None:
                assert min(map(float, values)) == 0 and max(map(float, values)) == 5 and "0.000" in values
            else:
                assert values == set(words)


def test_predictions_follow_their_index(tmp_path):
    path = write_predictions(TASKS["rte"], "test", [2, 0, 1], np.array([1, 0, 1]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n2\tnot_entailment\n"
    path = write_predictions(TASKS["stsb"], "test", [0, 1, 2], np.float32([5.5, -0.2, 3.14159]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n2\t3.142\n"
    own = Task("custom", "own data", ("text",), ("sad", "glad"), ("accuracy",))
    path = write_predictions(own, "validation", [4], [1], tmp_path, [0])
    assert (path.name, path.read_text()) == ("custom_validation.tsv", "index\tprediction\tlabel\n4\tglad\tsad\n")
    own = Task("custom", "own data", ("text",), None, ("pearson",))
    path = write_predictions(own, "test", [0, 1], np.float32([0.00012, -1234.5]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\t0.00012\n1\t-1234.5\n"


def test_zip_has_the_eleven_files_and_a_second_one_replaces_it(runs, tmp_path, capsys):
    out = tmp_path / "submission.zip"
    assert main([*map(str, runs[:3]), "--out", str(out), "--allow_partial"]) == 0
    assert zipfile.ZipFile(out).namelist() == ["CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"]
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert "with 11 of 11 files" in capsys.readouterr().out
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == list(SERVER) and archive.testzip() is None
        assert archive.read("CoLA.tsv") == (runs[0].parent / "cola" / "predictions" / "CoLA.tsv").read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_refused_submission_leaves_the_old_zip(runs, tmp_path, capsys):
    out = tmp_path / "submission.zip"
    out.write_text("old")
    other = tmp_path / "other"
    write_predictions(TASKS["wnli"], "test", range(146), [0] * 146, other)
    assert main([*map(str, runs), str(other), "--out", str(out)]) == 2
    assert "WNLI.tsv is there twice" in capsys.readouterr().err and out.read_text() == "old"


def wnli(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


ROWS = ["index\tprediction", *(f"{i}\t{i % 2}" for i in range(146))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("WNLI.tsv", wnli(["id\tlabel", *ROWS[1:]]), "line 1: the header must be"),
        ("WNLI.tsv", wnli([*ROWS[:5], *ROWS[6:]]), "line 6: index '5' where 4 comes next"),
        ("WNLI.tsv", wnli([*ROWS[:5], "4\tentailment", *ROWS[6:]]), "line 6: label 'entailment' is not one of 0, 1"),
        ("WNLI.tsv", wnli(ROWS[:-1]), "145 rows where the test set has 146"),
        ("STS-B.tsv", "index\tprediction\n0\t5.001\n", "line 2: '5.001' is not a score from 0 to 5"),
    ],
)
def test_what_breaks_a_rule_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        find_predictions(tmp_path)
