"""The figures of a report. Lines differ in colour (Okabe and Ito's palette) and marker, so they differ in grey too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nlu.experiments.statistics import finished
from nlu.experiments.tables import ALL
from nlu.tasks import heading, headings

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS, marker=list("osD^vPX"))
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "savefig.dpi": 150,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "text.parse_math": False,  # a `$` in a label is an ordinary character
}
Styles = dict[str, dict[str, Any]]  # label → colour, marker and line
WIDTH = 5.0  # inches: 9-point letters stay readable when a page scales the figure to a phone's width


@dataclass(frozen=True)
class Drawing:
    """A figure; `text` describes it in words, for captions and for readers who cannot see it."""

    kind: str
    text: str
    figure: Figure

    def png(self) -> bytes:
        """The figure as a PNG without matplotlib's version in it."""
        output = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(output, format="png", metadata={"Software": None})
        return output.getvalue()


def styles_of(labels: Iterable[str]) -> Styles:
    """Label → colour, marker and line of a row, the same in every figure for which they are made once."""
    return dict(zip(dict.fromkeys(labels), cycle(STYLES), strict=False))


def draw(every: pd.DataFrame, scores: pd.DataFrame, tuning: pd.DataFrame, styles: Styles) -> list[Drawing]:
    """The figures for which there is data, in the order of the page.

    Args:
        every: all runs of an experiment. scores: theirs, see `tables.score_frame`.
        tuning: the runs that tried learning rates, see `tuning.tried_rates`.
        styles: see :func:`styles_of`; rows that it lacks get further ones.
    """
    final = finished(every)
    styles = styles_of([*styles, *tuning.row, *final.label])
    with matplotlib.rc_context(STYLE):
        drawn = [_rates(tuning, styles)]
        if len(final) and not (len(tuning) and every.held_out.all()):  # then each run only tries a learning rate
            drawn = [_differences(scores, final, styles), *drawn, _curves(final, styles)]
    return [drawing for drawing in drawn if drawing is not None]


def _differences(scores: pd.DataFrame, runs: pd.DataFrame, styles: Styles) -> Drawing | None:
    """Each row's difference from its reference with its interval."""
    rows = scores[(scores.task == ALL) & scores.low.notna()].iloc[::-1].reset_index(drop=True)
    if not len(rows):
        return None
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    several = rows.against.nunique() > 1
    for place, row in enumerate(rows.itertuples()):
        errors = [[row.difference - row.low], [row.high - row.difference]]
        look = {name: styles[row.row][name] for name in ("color", "marker")}
        axes.errorbar([row.difference], [place], xerr=errors, linestyle="", capsize=2, ms=5, **look)
    axes.set_yticks(rows.index, [f"{row.row} − {row.against}" if several else row.row for row in rows.itertuples()])
    axes.set_ylim(-0.5, len(rows) - 0.5)  # one row has room too
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_xlabel("points, with 95 % intervals")
    other = "of the row named after the minus" if several else f"of {rows.against[0]}"
    what = "mean over " * (runs.task.nunique() > 1) + headings(runs.task)
    _title(figure, runs, f"score minus that {other}, {what}")
    text = f"Score minus that {other} on {headings(runs.task)}, with 95 % intervals."
    return Drawing("differences", text, figure)


def _curves(runs: pd.DataFrame, styles: Styles) -> Drawing | None:
    """Score and validation loss against the step, a row for each task; None if no run has two evaluations."""
    if runs.steps_at.map(len).max() < 2:
        return None
    tasks, seeds = runs.task.unique(), runs.groupby(["label", "task"]).seed.nunique().max()
    runs = runs.explode(["steps_at", "scores", "losses"]).astype({"scores": float, "losses": float})
    figure = Figure(figsize=(WIDTH, 2.3 * len(tasks) + 0.3), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    handles = {}
    for task, row in zip(tasks, panels, strict=True):
        for source, axes in zip(("scores", "losses"), row, strict=True):
            for label, own in runs[runs.task == task].groupby("label", sort=False):
                medians = own.groupby("steps_at")[source].median()
                (handles[label],) = axes.plot(medians.index, medians, **styles[label])
            what = "validation score" if source == "scores" else "validation loss"
            axes.set_title(f"{heading(task)}: {what}", loc="left")
            axes.set_xlim(left=0)
            if source == "scores":
                axes.set_ylim(top=min(100.0, axes.get_ylim()[1]))
    for axes in panels[-1]:
        axes.set_xlabel("step")
    _legend(figure, handles)
    _title(figure, runs, f"score and loss on the validation set during training, medians over {_seeds(seeds)}")
    text = f"Score and validation loss at each evaluation on {headings(tasks)}: medians over the seeds."
    return Drawing("curves", text, figure)


def _rates(runs: pd.DataFrame, styles: Styles) -> Drawing | None:
    """Score against the learning rate, from the tuning runs."""
    if not len(runs):
        return None
    tasks = runs.task.dropna().unique()
    what = "held-out score" if runs.held_out.all() else "score"
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * lines + 0.3), layout="constrained")
    panels = [figure.add_subplot(lines, columns, number) for number in range(1, len(tasks) + 1)]
    handles = {}
    for task, axes in zip(tasks, panels, strict=True):
        axes.set_xscale("log")
        for label, own in runs[runs.task == task].groupby("row", sort=False):
            means = own.groupby("value")["last"].mean().dropna()
            (handles[label],) = axes.plot(means.index, means, **styles[label])
            for rate in own[own.failed].value:  # a cross on the lower edge
                place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
                axes.plot(rate, 0, "x", color=styles[label]["color"], **place)
        axes.minorticks_off()
        rates = np.unique(runs[runs.task == task].value)
        axes.set_xticks(rates[np.diff(np.log(rates), prepend=-np.inf) > 0.3])  # closer labels would overlap
        axes.xaxis.set_major_formatter("{x:.2g}")
        axes.tick_params(axis="x", rotation=45, labelsize=7.5)
        axes.set_title(heading(task), loc="left")
        axes.set_ylim(top=min(100.0, axes.get_ylim()[1]))
    for axes in panels[-columns:]:
        axes.set_xlabel("learning rate (log scale)")
    if runs.failed.any():
        handles["failed run"] = Line2D([], [], linestyle="", marker="x", color="#888888")
    _legend(figure, handles)
    _title(figure, runs, f"{what} against the learning rate, {_seeds(runs.seed.nunique())}")
    text = (
        f"Mean {what} at the last evaluation against the learning rate on {headings(tasks)}. A cross marks a failed "
        "run, if its record has the loss of a constant answer."
    )
    return Drawing("rates", text, figure)


def _seeds(number: int) -> str:
    return f"{number} seed{'s' if number > 1 else ''}"


def _title(figure: Figure, runs: pd.DataFrame, text: str) -> None:
    """A title that says what was measured, on which encoder."""
    text = f"{' and '.join(sorted(runs.model.dropna().unique()))}: {text}"
    lines = textwrap.wrap(text, 62)
    figure.set_figheight(figure.get_figheight() + 0.18 * len(lines))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5, fontweight="bold")


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    """One legend of labels and their lines below all panels; matplotlib's own leaves out a label that begins with _."""
    texts = ["\n".join(textwrap.wrap(label, 28)) for label in handles]
    lines = sum(text.count("\n") + 1 for text in texts) / 2
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)  # the panels keep their size
    figure.legend(handles.values(), texts, loc="outside lower center", ncols=2)
