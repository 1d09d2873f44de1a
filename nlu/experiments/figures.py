"""The figures of a report. Lines differ in colour (Okabe and Ito's palette), dash and marker, for print in grey."""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import takewhile

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loralib.injection import module_type
from nlu.experiments.cells import number
from nlu.experiments.statistics import (
    Estimate,
    averages,
    common_seeds,
    compared,
    highest,
    of_one_data_set,
    tuned_over,
)
from nlu.experiments.tables import are_held_out, rows_of
from nlu.tasks import HEADINGS

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
KINDS = ("parameters", "curves", "rates", "ranks", "against")  # end the figures' names
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>*"
STYLE = {
    "svg.hashsalt": "nlu",  # fixed identifiers: equal lines give equal bytes
    "svg.fonttype": "path",
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
    "text.parse_math": False,  # a `$` is a character of a label
}
WIDTH = 5.0  # inches: on a phone, whose width a page scales figures to, letters of 9 points stay readable
APART = 1.06  # factor between points of about equal size, which would hide each other
SHARE = 0.025  # of the axis, at least, between two points that are set apart


@dataclass(frozen=True)
class Drawing:
    """A figure: `text` says in words what it shows, for captions and for those who cannot see it."""

    name: str
    title: str
    text: str
    figure: Figure

    def image(self, suffix: str) -> bytes:
        """The figure as `png` or `svg`, without dates or versions in it."""
        output = BytesIO()
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(output, format=suffix, metadata=metadata)
        return output.getvalue()


def draw(
    name: str, final: pd.DataFrame, every: pd.DataFrame, against: str | None = None
) -> Iterator[tuple[str, Callable[[], Drawing | None]]]:
    """(name, what draws it) for each figure of a question, so that one that fails does not stop the others.

    Args:
        name: begins the figures' names.
        final: the finished final runs, in the order of the legend. every: all runs of the same experiments, those of
            the tuning stage too, as `as_frame` orders them.
        against: the row that the others are compared with: one figure of that takes the place of the others.
    """
    labels = list(dict.fromkeys(every.label))  # in the registries' order: a comparison and a report colour alike
    styles = dict(zip(labels, _styles(len(labels)), strict=True))
    functions = dict(zip(KINDS, (_parameters, _curves, _rates, _ranks, partial(_against, against)), strict=True))
    for kind in KINDS[:-1] if against is None else KINDS[-1:]:

        def drawn(kind=kind, function=functions[kind], runs=every if kind == "rates" else final) -> Drawing | None:
            with matplotlib.rc_context(STYLE):
                return function(f"{name}_{kind}", runs, styles) if len(runs) else None

        yield f"{name}_{kind}", drawn


def _parameters(name: str, runs: pd.DataFrame, styles: dict[str, dict]) -> Drawing | None:
    """Average score against trained parameters, with 95 % intervals; None where rows differ in the learning rate
    or in the data."""
    runs = common_seeds(runs)
    sizes = runs.groupby("label").adapter_params.max()
    points = [(label, sizes[label], average) for label, average in averages(runs).items() if sizes[label] > 0]
    if len(points) < 2 or _rate_is_axis(runs) or not of_one_data_set(runs):
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (label, _, result), x in zip(points, spread_apart([size for _, size, _ in points]), strict=True):
        style = {**styles[label], "linestyle": "none", "markersize": 6, "linewidth": 1.2}
        axes.errorbar(x, result.mean, yerr=result.half_width, label=label, capsize=3, **style)
    cut = _cut_long_intervals(axes, [result for _, _, result in points])
    axes.set_xscale("log")
    _ticks(axes, [size for _, size, _ in points], _short_count)
    axes.set_xlabel("trained parameters without the head\n(log scale; points of about equal size are set apart)")
    axes.set_ylabel("average score, last evaluation")
    _legend(figure, [axes])
    known = {label: average for label, _, average in points}
    best = highest(known)
    text = (
        f"Average over {_names(runs.task)} against trained parameters, over the seeds that every row has, with 95 % "
        f"intervals{' (the longest cut off)' if cut else ''}. Highest: {' and '.join(best)}, "
        f"{number(known[best[0]].mean)}."
    )
    return Drawing(name, "Score against parameters", text, figure)


def _cut_long_intervals(axes: Axes, results: list[Estimate]) -> bool:
    """Limit a panel where an interval has over four times the median length, as a lost run makes it; says if it did."""
    halves = np.array([result.half_width or 0.0 for result in results])
    means = np.array([result.mean for result in results])
    known = halves[halves > 0]
    if len(known) < 3 or known.max() <= 4 * np.median(known):
        return False
    kept = np.minimum(halves, 4 * np.median(known))
    _limit(axes, (means - kept).min(), (means + kept).max())
    return True


def _ranks(name: str, runs: pd.DataFrame, styles: dict[str, dict]) -> Drawing | None:
    """Singular values left in each module at the end, a panel for each row that prunes (the paper's Figure 3)."""
    pruned = runs[runs.module_ranks.notna()]
    if not len(pruned):
        return None
    rows = rows_of(pruned)
    means = [pd.DataFrame(own.module_ranks.tolist()).mean() for _, own in rows]
    kinds = list(dict.fromkeys(module_type(module) for mean in means for module in mean.index))
    owners = zip(*(kind.split(".")[:-1] for kind in kinds), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, owners)))  # leading parts, which say nothing
    figure = Figure(figsize=(WIDTH, (0.8 + 0.27 * len(kinds)) * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), squeeze=False)[:, 0]
    most = max(mean.max() for mean in means)
    for (label, _), mean, axes in zip(rows, means, panels, strict=True):
        layers = mean.index.str.extract(r"\.(\d+)\.")[0].fillna("0").astype(int)
        # A module with two numbers in its name (one of a block's several networks) shares its cell with the others.
        values = mean.groupby([mean.index.map(module_type), layers.values]).mean().unstack().reindex(kinds)
        axes.imshow(values, cmap="cividis", vmin=0, vmax=most, aspect="auto")
        axes.grid(False)
        for (y, x), value in np.ndenumerate(values.values):
            if np.isnan(value):
                continue  # another row adapts this module
            colour = "white" if value < most / 2 else "black"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7.5)
        axes.set_yticks(range(len(kinds)), [".".join(kind.split(".")[shared:]) for kind in kinds])
        axes.set_xticks(range(values.shape[1]), values.columns)
        axes.set_title(label, loc="left")
    panels[-1].set_xlabel("layer")
    text = f"Singular values left in each module at the end on {_names(runs.task)}: means over runs."
    return Drawing(name, "Singular values that each module keeps", text, figure)


def _against(against: str, name: str, runs: pd.DataFrame, styles: dict[str, dict]) -> Drawing | None:
    """The paired change of the loss of each row against one of them, the best above."""
    found = [(label, loss) for label, (loss, _) in compared(runs, against).items() if loss.interval is not None]
    rows = sorted(found, key=lambda row: -row[1].mean)
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    means = np.array([each.mean for _, each in rows])
    errors = np.abs(np.array([each.interval for _, each in rows]).T - means)
    axes.errorbar(means, range(len(rows)), xerr=errors, fmt="o", color=COLOURS[0], capsize=3, markersize=4)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.axvline(0, color=COLOURS[1], linewidth=1)
    axes.set_xlabel(f"change of the loss against {against}, %\n(95 % interval; left is better)")
    tasks = _names(runs.task)
    text = (
        f"Change of the loss at the last evaluation on {tasks} against {against}, with 95 % intervals. Lowest of them: "
        f"{rows[-1][0]}."
    )
    return Drawing(name, f"Loss against {against}", text, figure)


def spread_apart(sizes: list[float]) -> list[float]:
    """The sizes, those that would hide each other moved to neighbouring places around their middle.

    Places lie `APART` from one another, and further where the sizes span a long axis.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    step = max(APART, (max(sizes) / min(sizes)) ** SHARE)
    groups: list[list[int]] = []
    for i in order:
        if groups and sizes[i] <= sizes[groups[-1][-1]] * step:
            groups[-1].append(i)
        else:
            groups.append([i])
    places = list(map(float, sizes))
    for group in filter(lambda each: len(each) > 1, groups):
        middle = float(np.exp(np.mean(np.log([sizes[i] for i in group]))))
        for position, i in enumerate(group):
            places[i] = middle * step ** (position - (len(group) - 1) / 2)
    return places


def _curves(name: str, runs: pd.DataFrame, styles: dict[str, dict]) -> Drawing:
    """Score and validation loss against the step, a row for each task; one lost run does not move a median."""
    tasks = list(dict.fromkeys(runs.task))
    figure = Figure(figsize=(WIDTH, 2.3 * len(tasks) + 0.3), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for task, row in zip(tasks, panels, strict=True):
        for source, axes in zip(("scores", "losses"), row, strict=True):
            for label, own in rows_of(runs[runs.task == task]):
                by_step: dict[float, list[float]] = {}
                for steps, values in zip(own.steps_at, own[source], strict=True):
                    for step, value in zip(steps, values, strict=True):
                        by_step.setdefault(step, []).append(value)
                _line(axes, by_step, label, styles[label])
            axes.set_title(f"{HEADINGS.get(task, task)}: {'score' if source == 'scores' else 'loss'}", loc="left")
            axes.set_xlim(left=0)  # one evaluation alone would get an axis of fractions of a step
            _leave_outliers_out(axes)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    _legend(figure, list(panels.ravel()))
    text = (
        f"Score and validation loss at each evaluation on {_names(tasks)}: medians over the seeds. Values far from "
        "the others are not shown."
    )
    return Drawing(name, "Learning curves", text, figure)


def _rates(name: str, every: pd.DataFrame, styles: dict[str, dict]) -> Drawing | None:
    """Score against the learning rate: in the tuning stage, or of final runs with several rates."""
    if _rate_is_axis(every):
        every = tuned_over(every, "learning_rate")
        rates = [{"learning_rate": asked.get("learning_rate")} for asked in every.asked]  # an axis may name its values
        every = every.assign(tried=rates)[[None not in rate.values() for rate in rates]]
        labels = list(dict.fromkeys(every.label))
        styles = dict(zip(labels, _styles(len(labels)), strict=True))
    tuning = every[every.stage == "select"]
    runs = tuning[["learning_rate" in tried for tried in tuning.tried]]
    if not len(runs):
        return None
    score = "held-out score" if are_held_out(runs) else "score"
    tasks = list(dict.fromkeys(runs.task.dropna()))
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * lines + 0.3), layout="constrained")
    panels = [figure.add_subplot(lines, columns, number) for number in range(1, len(tasks) + 1)]
    for task, axes in zip(tasks, panels, strict=True):
        axes.set_xscale("log")
        for label, own in rows_of(runs[runs.task == task]):
            own = own.assign(rate=_learning_rates(own), setting=own.tried.map(str))
            done = own.status == "finished"
            means = own[done].groupby(["rate", "setting"])[["loss", "last"]].mean()
            best = means.sort_values("loss").groupby("rate").head(1)["last"]
            _line(axes, {rate: [score] for (rate, _), score in best.items()}, label, styles[label])
            for rate in own[~done].rate:  # a cross on the lower edge
                place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
                axes.plot(rate, 0, "x", color=styles[label]["color"], **place)
        _ticks(axes, _learning_rates(runs[runs.task == task]), "{:.3g}".format)
        axes.set_title(f"{HEADINGS.get(task, task)}: {score}", loc="left")
    for axes in panels[-columns:]:
        axes.set_xlabel("learning rate (log scale)")
    _legend(figure, panels)
    text = (
        f"Mean {score} at the last evaluation against the learning rate on {_names(tasks)}; where other settings are "
        "tuned too, with those of the lowest loss at that rate. A cross marks a crashed run."
    )
    return Drawing(name, "Sensitivity to the learning rate", text, figure)


def _rate_is_axis(runs: pd.DataFrame) -> bool:
    """Whether final runs of one row and task have several learning rates, as labels of the grid."""
    rates: dict[str, set] = {}
    for axes in runs[runs.stage == "final"]["axes"]:
        if "learning_rate" in (axes or {}):
            others = {name: label for name, label in axes.items() if name not in ("learning_rate", "seed")}
            rates.setdefault(str(others), set()).add(axes["learning_rate"])
    return any(len(several) > 1 for several in rates.values())


def _learning_rates(tuning: pd.DataFrame) -> list[float]:
    """The rates that runs tried; an experiment's file may quote them."""
    return [float(tried["learning_rate"]) for tried in tuning.tried]


def _line(axes: Axes, by_x: dict[float, list[float]], label: str, style: dict) -> None:
    xs = sorted(by_x)
    axes.plot(xs, [np.median(by_x[x]) for x in xs], label=label, **style)


def _leave_outliers_out(axes: Axes) -> None:
    """Limit a panel of many points to six interquartile ranges from the quartiles, twice Tukey's outer fences."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 6 * (high - low)
    low, high = max(values.min(), low - reach), min(values.max(), high + reach)
    if low < high and len(values) >= 20:
        _limit(axes, low, high)


def _limit(axes: Axes, low: float, high: float) -> None:
    """Show these values with a margin of a twentieth."""
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _styles(number: int) -> Iterator[dict]:
    """One style for each label; the first are the widest and lie below: an equal line over one leaves its rim."""
    for i in range(number):
        narrow = i / max(1, number - 1)
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 2.6 - 1.6 * narrow,
            "markersize": 6.5 - 4 * narrow,
            "zorder": 2 + narrow,
        }


def _ticks(axes: Axes, places: list[float], form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at the places themselves, without those that would run into the one before."""
    kept: list[float] = []
    span = max(places) / min(places)
    for place in sorted(set(places)):
        if not kept or place / kept[-1] > max(1.02, span**0.09):
            kept.append(place)
    axes.minorticks_off()
    axes.set_xticks(
        kept, [form(place) for place in kept], rotation=45, ha="right", rotation_mode="anchor", fontsize=7.5
    )


def _short_count(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k"


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend below all panels with every label once, in as many columns as the width allows."""
    handles: dict[str, object] = {}
    for axes in panels:
        for handle in axes.containers or axes.get_lines():
            if getattr(handle, "get_marker", str)() != "x":  # a cross marks what another handle names
                handles.setdefault(handle.get_label(), handle)
    texts = ["\n".join(textwrap.wrap(label, 28)) for label in handles]
    widest = max((len(line) for text in texts for line in text.split("\n")), default=1)
    columns = max(1, min(len(texts), int(figure.get_figwidth() / (0.07 * widest + 0.6))))
    lines = -(-len(texts) // columns) * max((text.count("\n") + 1 for text in texts), default=1)
    figure.set_figheight(figure.get_figheight() + 0.19 * lines)  # the panels keep their size
    legend = figure.legend(handles.values(), ["label"] * len(texts), loc="outside lower center", ncols=columns)
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set_text(text)  # given to the constructor, a label that begins with `_` would drop out


def _names(tasks: Iterable[str]) -> str:
    return ", ".join(HEADINGS.get(task, task) for task in dict.fromkeys(tasks))
