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
OFFICIAL_FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B", "ax": "diagnostic"}
OFFICIAL_COLUMNS = {
    # as in the official release; test files have `index` and no label
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["#1 ID", "#2 ID", "#1 String", "#2 String"],
    "qqp": ["qid1", "qid2", "question1", "question2"],
    "stsb": ["genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"],
    "mnli": ["promptID", "pairID", "genre", "sentence1_binary_parse", "sentence1", "sentence2", "label1"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
    "ax": ["sentence1", "sentence2"],
}
OFFICIAL_TEXT = {
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2"},
    "ax": {"premise": "sentence1", "hypothesis": "sentence2"},
}
OFFICIAL_LABEL = {"mrpc": "Quality", "qqp": "is_duplicate", "stsb": "score", "mnli": "gold_label"}
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
    name = "diagnostic.tsv" if task.name == "ax" else split.replace("validation", "dev") + ".tsv"
    path = root / OFFICIAL_FOLDERS.get(task.name, task.name.upper()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    names, label = OFFICIAL_TEXT.get(task.name, {}), OFFICIAL_LABEL.get(task.name, "label")
    test = split.startswith("test")
    columns = ["index", *OFFICIAL_COLUMNS[task.name]] + ([] if test else [label])
    if task.name in ("cola", "sst2", "mrpc") and not test:
        columns = columns[1:]
    lines = ["\t".join(columns)]
    for row in rows:
        values = {names.get(field, field): row[field] for field in task.text_fields}
        code, worded = row["label"], task.name in ("mnli", "qnli", "rte") and not test
        values[label] = HUB_WORDS[task.name].split()[code] if worded else str(code)
        values |= {"index": str(row["idx"]), "#1 ID": f"1{row['idx']}", "#2 ID": f"2{row['idx']}", "label1": "neutral"}
        lines.append("\t".join(values.get(column, "none") for column in columns))
    if task.name == "cola" and not test:
        lines = [f"gj04\t{row['label']}\t{'' if row['label'] else '*'}\t{row['sentence']}" for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
