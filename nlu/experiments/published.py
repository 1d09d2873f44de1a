"""The papers' own tables: cited from `results/published/`, each average computed again beside the printed one."""

from pathlib import Path
from statistics import fmean
from typing import Any

from nlu.errors import UsageError
from nlu.experiments.cells import Table, cell, number, rounded
from nlu.json_yaml import check, read_json
from nlu.tasks import HEADINGS


def published_table(folder: Path, file: str, title: str) -> Table:
    """A table of a paper, with each average computed again beside the printed one.

    Raises:
        UsageError: its file is absent or damaged, or holds something else than a table.
    """
    path = folder / f"{file}.json"
    advice = "restore it from the repository"
    content = read_json(path, advice)
    if content is None:
        raise UsageError(f"{path} is absent; {advice}")
    check(content, "published_table", str(path))
    columns, published = content.get("columns", []), content["rows"]
    for i, row in enumerate(published):
        for column in filter(row.__contains__, columns):
            check(row[column], "published_table", f"{path}: rows.{i}.{column}", "number")
    digits = max((len(str(row[c]).partition(".")[2]) for row in published for c in columns if c in row), default=2)
    words = [k for k in dict.fromkeys(k for row in published for k in row) if k not in (*columns, "std", "avg_printed")]
    rows = []
    for each in published:
        row = {key: cell(HEADINGS.get(each.get(key), str(each.get(key, ""))), **{key: each.get(key)}) for key in words}
        deviations = each.get("std", {})
        for key in columns:
            text = number(each.get(key), digits) + (f" ± {deviations[key]}" if key in deviations else "")
            row[HEADINGS.get(key, key)] = cell(text, **{key: each.get(key)})
        if columns:
            printed, computed = each.get("avg_printed"), published_average(each, columns)
            # Rounding explains 0.02, or 0.06 where one decimal is printed.
            differs = None not in (printed, computed) and abs(printed - computed) > (0.06 if digits == 1 else 0.02)
            row["average, printed"] = rounded("avg_printed", printed, digits)
            row["average, computed"] = cell(number(computed) + (" †" if differs else ""), avg_computed=computed)
        rows.append(row)
    notes = [f"Published, not measured here. Source: {content['source']}."]
    notes += [content[key] for key in ("protocol", "note", "unit") if content.get(key)]
    if columns:
        notes.append("Averages: over the tasks, a task with two columns counting once. † does not follow from its row.")
    return Table(file, title, rows, notes)


def published_average(row: dict[str, Any], columns: list[str]) -> float | None:
    """Mean over tasks, a task with two columns counting once; None where a column is missing."""
    tasks: dict[str, list[float]] = {}
    for column in columns:
        tasks.setdefault(column.partition("_")[0], []).append(row.get(column))
    if any(value is None for values in tasks.values() for value in values):
        return None
    return fmean(fmean(values) for values in tasks.values())
