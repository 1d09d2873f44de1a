"""Made-up rows for every GLUE task, and a writer of the official TSV format, for the tests of the data."""

from pathlib import Path

from nlu.tasks import Task

TEXTS = [
    'He said "yes" to it.',
    'An opening quote: " and a trailing space ',
    "naïve café — 東京 😀",
    "no-break\u00a0space, line separator \u2028 inside",
    "it 's",
    "",
]
# The official release: a task's folder, and the columns of its files with labels and of its test files, without some
# that nothing reads. NAME=FIELD is the column NAME with a field of the row; a column without one holds "none".
OFFICIAL = {
    "cola": ("CoLA", "source|label|mark|sentence", "index=idx|sentence"),  # without this header
    "sst2": ("SST-2", "sentence|label", "index=idx|sentence"),
    "mrpc": (
        "MRPC", "Quality=label|#1 ID|#2 ID|#1 String=sentence1|#2 String=sentence2",
        "index=idx|#1 ID|#2 ID|#1 String=sentence1|#2 String=sentence2",
    ),
    "qqp": ("QQP", "id=idx|qid1|qid2|question1|question2|is_duplicate=label", "id=idx|question1|question2"),
    "stsb": ("STS-B", "index=idx|genre|sentence1|sentence2|score=label", "index=idx|genre|sentence1|sentence2"),
    "mnli": (
        "MNLI", "index=idx|genre|sentence1_parse|sentence1=premise|sentence2=hypothesis|label1|gold_label=label",
        "index=idx|genre|sentence1_parse|sentence1=premise|sentence2=hypothesis",
    ),
    "qnli": ("QNLI", "index=idx|question|sentence|label", "index=idx|question|sentence"),
    "rte": ("RTE", "index=idx|sentence1|sentence2|label", "index=idx|sentence1|sentence2"),
    "wnli": ("WNLI", "index=idx|sentence1|sentence2|label", "index=idx|sentence1|sentence2"),
    "ax": ("diagnostic", "", "index=idx|sentence1=premise|sentence2=hypothesis"),
}  # fmt: skip
# the hub's class names, in the order of its label numbers
HUB_WORDS = {
    "cola": "unacceptable acceptable",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "qqp": "not_duplicate duplicate",
    "mnli": "entailment neutral contradiction",
    "qnli": "entailment not_entailment",
    "rte": "entailment not_entailment",
    "wnli": "not_entailment entailment",
}


def sample_rows(task: Task, split: str, n: int = 12) -> list[dict]:
    """``n`` rows with the columns of the hub's dataset."""
    rows = []
    for i in range(n):
        row = {field: f"{TEXTS[(i + j) % len(TEXTS)]}" for j, field in enumerate(task.text_fields)}
        if split.startswith("test"):
            row["label"] = -1.0 if task.is_regression else -1
        else:
            row["label"] = round(i * 0.4, 2) if task.is_regression else i % len(task.labels)
        rows.append({**row, "idx": i})
    return rows


def write_official(root: Path, task: Task, split: str, rows: list[dict]) -> Path:
    """Write a TSV file in the official format, in the official release's folder; returns its path."""
    folder, labelled, unlabelled = OFFICIAL[task.name]
    test = split.startswith("test")
    columns = [column.partition("=") for column in (unlabelled if test else labelled).split("|")]
    lines = [[name for name, *_ in columns]]
    for row in rows:
        if task.name in ("mnli", "qnli", "rte") and not test:
            row = row | {"label": HUB_WORDS[task.name].split()[row["label"]]}
        lines.append([str(row.get(field or name, "none")) for name, _, field in columns])
    if task.name == "cola" and not test:
        del lines[0]
    path = root / folder / ("diagnostic.tsv" if task.name == "ax" else split.replace("validation", "dev") + ".tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path
