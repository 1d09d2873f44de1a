"""The published numbers (`results/published/*.json`) as tables: as printed, each average computed again beside it."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nlu.errors import UsageError
from nlu.experiments.table_format import Table, bold_best, number
from nlu.readers import read_json
from nlu.tasks import HEADINGS


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper: its file in results/published/ and the experiment here that measures the same.

    ``experiment`` is None for times, which benchmarks/run.py measures.
    """

    stem: str
    title: str
    published: str
    experiment: str | None


PAPER_TABLES = (
    PaperTable("table1", "Table 1 of LoRA²: DeBERTaV3-base", "lora2_table1_deberta_v3_base", "paper_table1"),
    PaperTable(
        "adalora_table1", "Table 1 of AdaLoRA: DeBERTaV3-base", "adalora_table1_deberta_v3_base", "paper_table1"
    ),
    PaperTable("lora_table2", "Table 2 of LoRA: RoBERTa-large", "lora_table2_roberta_large", "paper_roberta_large"),
    PaperTable("table2", "Table 2 of LoRA²: time a step", "lora2_table2_time", None),
    PaperTable("table3", "Table 3 of LoRA²: terms of the regulariser", "lora2_table3_regulariser", "paper_table3"),
    PaperTable("table4", "Table 4 of LoRA²: target modules", "lora2_table4_modules", "paper_table4"),
)


def published_table(paper: PaperTable, folder: Path) -> Table:
    """One published table.

    Raises:
        UsageError: its file is absent, damaged or without source, protocol or rows.
    """
    path = folder / f"{paper.published}.json"
    content = read_json(path)
    if content is None or not all(content.get(key) for key in ("source", "rows")):
        raise UsageError(f"{path} is absent or lacks its source or rows; restore it from the repository")
    notes = [f"Published, not measured here. Source: {content['source']}."]
    notes += [f"Protocol: {content['protocol']}."] if content.get("protocol") else []
    notes += [content["note"]] if content.get("note") else []
    if "columns" not in content:
        return _time_table(paper, content, notes)
    return _score_table(paper, content, notes)


def _score_table(paper: PaperTable, content: dict[str, Any], notes: list[str]) -> Table:
    columns, rows = content["columns"], content["rows"]
    names = [
        key for key in ("method", "setting", "regulariser", "modules", "params") if any(key in row for row in rows)
    ]
    digits = _digits(rows, columns)
    cells = {name: [str(row.get(name, "")) for row in rows] for name in names}
    for column in columns:
        deviations = [row.get("std", {}).get(column) for row in rows]
        texts = [number(row.get(column), digits) for row in rows]
        texts = [f"{t} ± {d}" if d is not None else t for t, d in zip(texts, deviations, strict=True)]
        cells[HEADINGS[column]] = bold_best(texts, [row.get(column) for row in rows])
    recomputed = [published_average(row, columns) for row in rows]
    cells["average, printed"] = [number(row.get("avg_printed"), digits) for row in rows]
    marked = [
        number(average) + (" †" if _differs(row.get("avg_printed"), average, digits) else "")
        for row, average in zip(rows, recomputed, strict=True)
    ]
    cells["average, computed"] = bold_best(marked, recomputed)
    if any("†" in cell for cell in marked):
        notes.append("† does not follow from its own row: the printed average is off by more than rounding explains.")
    notes.append("Averages: mean over tasks; QQP is the mean of accuracy and F1, MNLI of matched and mismatched.")
    data = [
        {**{k: row.get(k, "") for k in names}, **{c: row.get(c) for c in columns},
         "avg_printed": row.get("avg_printed"), "avg_computed": average}
        for row, average in zip(rows, recomputed, strict=True)
    ]  # fmt: skip
    return Table(f"{paper.stem}_published", f"{paper.title} (published)", *_columns(cells), notes, data)


def _time_table(paper: PaperTable, content: dict[str, Any], notes: list[str]) -> Table:
    rows = content["rows"]
    methods = [key for key in rows[0] if key != "task"]
    header = ["task", *methods, f"{methods[1]} : {methods[0]}"]
    lines = [
        [HEADINGS[row["task"]], *[number(row[m]) for m in methods], number(row[methods[1]] / row[methods[0]])]
        for row in rows
    ]
    notes.append(f"Unit: {content['unit']}. The last column is computed.")
    return Table(f"{paper.stem}_published", f"{paper.title} (published)", header, lines, notes, [dict(r) for r in rows])


def published_average(row: dict[str, Any], columns: list[str]) -> float | None:
    """Mean over tasks, a task with two columns counting once; None where a column is missing."""
    tasks: dict[str, list[float]] = {}
    for column in columns:
        tasks.setdefault(column.partition("_")[0], []).append(row.get(column))
    if any(value is None for values in tasks.values() for value in values):
        return None
    return fmean(fmean(values) for values in tasks.values())


def _differs(printed: float | None, average: float | None, digits: int) -> bool:
    """Whether rounding cannot explain a printed average: off by 0.02, or by 0.06 where one decimal is printed."""
    return printed is not None and average is not None and abs(printed - average) > (0.06 if digits == 1 else 0.02)


def _digits(rows: list[dict[str, Any]], columns: list[str]) -> int:
    """How many decimals the table prints (JSON drops trailing zeros)."""
    return max(len(str(row[column]).partition(".")[2]) for row in rows for column in columns if column in row)


def _columns(cells: dict[str, list[str]]) -> tuple[list[str], list[list[str]]]:
    return list(cells), [list(row) for row in zip(*cells.values(), strict=True)]
