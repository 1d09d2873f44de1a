"""The GLUE tasks (Wang et al. 2018, arXiv 1804.07461), one row each, in the order in which tables show them.

A row has the task's splits and its metrics, of which the first is its score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Name of a metric in --metric -> its key in records.
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "macro-f1": "macro_f1",
    "matthews": "matthews_correlation",
    "pearson": "pearson",
    "spearman": "spearmanr",
}


@dataclass(frozen=True)
class Task:
    """What the pipeline needs to know about one task.

    Attributes:
        name: the name on the command line and on the hub (`nyu-mll/glue`).
        display: the name in tables and figures.
        text_fields: the one or two text columns, under the hub's names, in the order the encoder reads them.
        labels: the class words, by class number as on the hub; None for a regression task.
        metrics: every metric reported, the main one first. All are fractions, higher is better.
        train_rows: size of the official training set.
        train_splits, validation_splits, test_splits: the splits' names, as on the hub.
        second_rows: size of the official second validation set (MNLI's mismatched one); any other size is not scored.
        value_range: the lowest and highest label of a regression task, or None for no bounds.
        official_file: the official release's file, if it is not `train.tsv`, `dev*.tsv` or `test*.tsv` in the folder
            `name` or `display`.
        official_header: the columns of a train or dev TSV file that has no header line.
        short_rows_skipped: whether to skip the release's rows with missing fields, which the hub's copy lacks.
        submission_files: the GLUE server's file name for each of `test_splits`, with the number of rows it wants.
        server_numbers: whether the GLUE server wants the hub's class numbers instead of the words.
    """

    name: str
    display: str
    text_fields: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train_rows: int = 0
    train_splits: tuple[str, ...] = ("train",)
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    second_rows: int | None = None
    value_range: tuple[float, float] | None = None
    official_file: str | None = None
    official_header: tuple[str, ...] = ()
    short_rows_skipped: bool = False
    submission_files: tuple[tuple[str, int], ...] = ()
    server_numbers: bool = False

    @property
    def metric(self) -> str:
        """The key of the task's score, which console, record, tables, comparisons and the best checkpoint use.

        For MNLI it is the score on the matched set.
        """
        return self.metrics[0]

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number and the loss a squared error."""
        return self.labels is None

    @property
    def num_labels(self) -> int:
        """Outputs of the classification head: 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split, training first."""
        return self.train_splits + self.validation_splits + self.test_splits


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")

_ROWS = (
    Task(
        "cola",
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation", "accuracy"),
        train_rows=8551,
        official_header=("source", "label", "mark", "sentence"),
        submission_files=(("CoLA.tsv", 1063),),
        server_numbers=True,
    ),
    Task(
        "sst2",
        "SST-2",
        ("sentence",),
        ("negative", "positive"),
        ("accuracy",),
        train_rows=67349,
        submission_files=(("SST-2.tsv", 1821),),
        server_numbers=True,
    ),
    Task(
        "mrpc",
        "MRPC",
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        train_rows=3668,
        submission_files=(("MRPC.tsv", 1725),),
        server_numbers=True,
    ),
    Task(
        "qqp",
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        train_rows=363846,
        short_rows_skipped=True,
        submission_files=(("QQP.tsv", 390965),),
        server_numbers=True,
    ),
    Task(
        "stsb",
        "STS-B",
        _PAIR,
        None,
        ("pearson", "spearmanr"),
        train_rows=5749,
        value_range=(0.0, 5.0),
        submission_files=(("STS-B.tsv", 1379),),
    ),
    Task(
        "mnli",
        "MNLI",
        ("premise", "hypothesis"),
        _MNLI,
        ("accuracy",),
        train_rows=392702,
        validation_splits=("validation_matched", "validation_mismatched"),
        test_splits=("test_matched", "test_mismatched"),
        second_rows=9832,
        submission_files=(("MNLI-m.tsv", 9796), ("MNLI-mm.tsv", 9847)),
    ),
    Task(
        "qnli",
        "QNLI",
        ("question", "sentence"),
        _ENTAILMENT,
        ("accuracy",),
        train_rows=104743,
        submission_files=(("QNLI.tsv", 5463),),
    ),
    Task("rte", "RTE", _PAIR, _ENTAILMENT, ("accuracy",), train_rows=2490, submission_files=(("RTE.tsv", 3000),)),
    Task(
        "wnli",
        "WNLI",
        _PAIR,
        ("not_entailment", "entailment"),
        ("accuracy",),
        train_rows=635,
        submission_files=(("WNLI.tsv", 146),),
        server_numbers=True,
    ),
    # The diagnostic set has hidden labels only: a model trained on MNLI predicts it.
    Task(
        "ax",
        "AX",
        ("premise", "hypothesis"),
        _MNLI,
        ("matthews_correlation", "accuracy"),
        train_splits=(),
        validation_splits=(),
        official_file="diagnostic/diagnostic.tsv",
        submission_files=(("AX.tsv", 1104),),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def own_name(train_file: str | Path) -> str:
    """What one's own data are called: as the training file, or as its folder if the file is called train."""
    file = Path(train_file)
    return file.parent.name if file.stem == "train" and file.parent.name else file.stem


def heading(name: str) -> str:
    """What tables and figures call a task; the name of one's own data stays as it is."""
    return TASKS[name].display if name in TASKS else name


def headings(names: Iterable[str]) -> str:
    """The headings of tasks for a sentence, each once."""
    return ", ".join(map(heading, dict.fromkeys(names)))
