"""Write the table and the figure of docs/choose.md: the scores of an experiment beside each method's measured cost.

    python results/study/choose.py    # results/measured/which_method.jsonl, and the last benchmark of that name

The cost is that of the benchmark's first setting (benchmarks/run.py --name which_method), not of the runs.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loralib.files import write_bytes, write_text
from nlu import ROOT
from nlu.errors import OneLineParser, UsageError, program
from nlu.experiments.figures import STYLE, Drawing
from nlu.experiments.statistics import load_measured
from nlu.experiments.tables import number, with_interval
from results.study.runs import scored_on_test
from results.study.tables import score_table

EXPERIMENT, REFERENCE, ON_TEST = "which_method", "LoRA r=8", ("mrpc",)
TABLE = re.compile(r"(?<=<!-- table: results/study/choose.py -->\n).*?(?=<!-- end -->)", re.S)
HEADS = ["method", "trained parameters", "saved", "score", f"minus {REFERENCE}", "failed", "step", "memory", "merges"]


def costs(records: Path, name: str) -> dict[str, dict[str, Any]]:
    """Label → the measurement of its row in the first setting of the last benchmark of this name.

    Raises:
        UsageError: there is no such benchmark.
    """
    found = [
        record
        for line in records.read_text(encoding="utf-8").splitlines()
        if (record := json.loads(line))["name"] == name
    ]
    if not found:
        raise UsageError(f"{records} has no benchmark {name}: run benchmarks/run.py --name {name}")
    rows = found[-1]["measurements"]
    return {row["row"]: row for row in rows if row["setting"] == rows[0]["setting"]}


def joined(runs: pd.DataFrame, cost: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The scores of :func:`score_table`, best first, with `step` and `memory` as ratios to the reference."""
    table = score_table(scored_on_test(runs, ON_TEST), [REFERENCE])
    table = table.sort_values("average", ascending=False, kind="stable").set_index("row")
    seconds = {label: statistics.median(row["seconds"]) for label, row in cost.items()}
    table["step"] = pd.Series(seconds) / seconds[REFERENCE]
    table["memory"] = (
        pd.Series({label: row["memory_bytes"] for label, row in cost.items()}) / cost[REFERENCE]["memory_bytes"]
    )
    return table


def markdown_table(table: pd.DataFrame, cost: dict[str, dict[str, Any]]) -> str:
    """The table of the page."""
    lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
    for label, row in table.iterrows():
        saved = f"{cost[label]['adapter_bytes'] / 1e6:.2g} MB" if label in cost else ""
        merges = ("yes" if cost[label]["merges"] else "no") if label in cost else ""
        difference = "–" if pd.isna(row.difference) else with_interval(row.difference, row.low, row.high)
        cells = [
            label,
            f"{row.parameters:,}",
            saved,
            number(row.average, 1),
            difference,
            f"{row.failed:.0f} of {row.runs:.0f}",
        ]
        lines.append(f"| {' | '.join([*cells, number(row.step), number(row.memory), merges])} |")
    return "\n".join(lines) + "\n"


def drawing(table: pd.DataFrame) -> Drawing:
    """Difference from the reference against the time of a step; a point's area is its memory."""
    shown = table[table.step.notna()].fillna({"difference": 0.0, "low": 0.0, "high": 0.0})
    with matplotlib.rc_context(STYLE):
        figure = Figure((7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="#888888", linewidth=0.8)
        errors = [shown.difference - shown.low, shown.high - shown.difference]
        axes.errorbar(shown.step, shown.difference, errors, fmt="none", ecolor="#bbbbbb", linewidth=1)
        axes.scatter(shown.step, shown.difference, 40 * shown.memory, color="#0072B2", zorder=3)
        names = shown.sort_values("difference").iterrows()  # at the right, each with a line to its point
        for place, (label, row) in enumerate(names):
            axes.annotate(
                label,
                (row.step, row.difference),
                (1.04, (place + 0.5) / len(shown)),
                textcoords="axes fraction",
                va="center",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "relpos": (0, 0.5)},
            )
        axes.set(xlabel=f"time of a step ({REFERENCE} = 1)", ylabel=f"score minus {REFERENCE}, 95 % interval")
        axes.set_title("Score against time of a training step; a point's area is its memory")
    return Drawing("cost", "Score minus that of LoRA r=8 against the time of a training step.", figure)


@program
def main(words: Sequence[str]) -> None:
    """Write the table into the page, and the figure."""
    args = build_parser().parse_args(words)
    runs, cost = load_measured(args.measured_dir), costs(args.benchmarks, EXPERIMENT)
    if EXPERIMENT not in runs:
        raise UsageError(f"{args.measured_dir} has no {EXPERIMENT}.jsonl")
    table = joined(runs[EXPERIMENT], cost)
    page = args.page.read_text(encoding="utf-8")
    if not TABLE.search(page):
        raise UsageError(f"{args.page} has no place for the table")
    write_text(args.page, TABLE.sub(lambda _: markdown_table(table, cost), page))
    write_bytes(args.figure, drawing(table).png())


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog="choose.py", description=__doc__)
    add = parser.add_argument
    add("--measured_dir", type=Path, default=ROOT / "results/measured", help="the runs' lines (results/measured)")
    add("--benchmarks", type=Path, default=ROOT / "benchmarks/results/records.jsonl", help="the benchmarks' lines")
    add("--page", type=Path, default=ROOT / "docs/choose.md", help="the page (docs/choose.md)")
    add("--figure", type=Path, default=ROOT / f"results/figures/{EXPERIMENT}_cost.png", help="the figure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
