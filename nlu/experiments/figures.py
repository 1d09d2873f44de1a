"""The figures of one experiment, drawn from its records; each is readable in grey and by the colour-blind.

Lines differ in colour (Okabe and Ito's palette), dash and marker; heat maps carry their numbers.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nlu.experiments.files import run_label
from nlu.experiments.legends import add_legend, labelled_lines
from nlu.experiments.measured import (
    MeasuredExperiment,
    Record,
    Row,
    average,
    average_interval,
    mean_of,
    rank_pattern,
    sorted_tasks,
)
from nlu.tasks import HEADINGS

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>*"
STYLE = {
    "svg.hashsalt": "nlu",  # fixed identifiers: equal records give equal bytes
    "svg.fonttype": "path",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "savefig.dpi": 150,
    "legend.frameon": False,
}
# How the published names call a module, by what its name holds, first match first.
MODULE_NAMES = (
    ("query", r"query|q_proj|q_lin"),
    ("key", r"key|k_proj|k_lin"),
    ("value", r"value|v_proj|v_lin"),
    ("attention.output", r"attention\.output|o_proj|out_lin"),
    ("intermediate", r"intermediate|lin1"),
    ("layer.output", r"output|lin2"),
)
LEARNING_RATE = "learning_rate"


@dataclass(frozen=True)
class Drawing:
    """A finished figure; `text` says in words what it shows, for captions and for those who cannot see it."""

    stem: str
    title: str
    text: str
    figure: Figure


def draw(experiment: MeasuredExperiment) -> list[Drawing]:
    """Every figure that the experiment's records allow, in a fixed order."""
    drawings: list[Drawing | None] = []
    with matplotlib.rc_context(STYLE):
        swept = any(LEARNING_RATE in record.axes for row in experiment.rows for record in row.every)
        if swept:  # one row for each rate: the other figures would be a tangle
            drawings.append(
                _learning_rates(experiment, [r for row in experiment.rows for r in row.every], "learning_rate")
            )
        elif experiment.rows:
            drawings.append(_score_against_parameters(experiment))
            drawings.append(_learning_curves(experiment))
            drawings.append(_budgets(experiment))
            drawings.append(_spectra(experiment))
            stems = _file_stems([row.label for row in experiment.rows])
            drawings += [_rank_map(experiment, row, stems[row.label]) for row in experiment.rows]
        drawings.append(_learning_rates(experiment, experiment.held_out, "selection"))
    return [drawing for drawing in drawings if drawing is not None]


def module_place(name: str) -> tuple[int, str] | None:
    """(layer, published name) of a module such as `encoder.layer.3.attention.output.dense`; None outside layers."""
    found = re.search(r"\.(\d+)\.(.+)$", f".{name}")
    if not found:
        return None
    rest = found.group(2)
    return int(found.group(1)), next((short for short, pattern in MODULE_NAMES if re.search(pattern, rest)), rest)


def _score_against_parameters(experiment: MeasuredExperiment) -> Drawing | None:
    points = [
        (row, mean_of(row, "adapter_params") or mean_of(row, "total_params"), average(row, "last", experiment.tasks))
        for row in experiment.rows
    ]
    points = [point for point in points if None not in point[1:]]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    sizes = _nested_sizes([(math.log10(parameters), value) for _, parameters, value in points])
    handles = {}
    for (row, parameters, value), size, style in zip(points, sizes, _styles(len(points)), strict=True):
        interval = average_interval(row, "last", experiment.tasks)
        bar = [[value - interval[0]], [interval[1] - value]] if interval else None
        hollow = {**style, "linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.4}
        axes.errorbar(parameters, value, yerr=bar, label=row.label, capsize=3, markersize=size, **hollow)
        handles[row.label] = Line2D([], [], markersize=7, **hollow)  # in the legend all are of one size
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters without the head (log scale)")
    axes.set_ylabel("average score at the last evaluation")
    add_legend(figure, handles)
    best = max(points, key=lambda point: point[2])
    text = (
        f"Average over {_names(experiment.tasks)} against trainable parameters, with 95 % bootstrap intervals over "
        f"seeds. Highest: {best[0].label}, {best[2]:.2f}."
    )
    return Drawing(f"{experiment.name}_parameters", "Score against parameters", text, figure)


def _nested_sizes(places: list[tuple[float, float]]) -> list[float]:
    """Sizes of hollow markers: one on the spot of others goes around them, so that all can be seen."""
    spans = [max(values) - min(values) or 1.0 for values in zip(*places, strict=True)]
    return [
        7.0 + 5.0 * sum(abs(x - u) < 0.03 * spans[0] and abs(y - v) < 0.03 * spans[1] for u, v in places[:i])
        for i, (x, y) in enumerate(places)
    ]


def _learning_curves(experiment: MeasuredExperiment) -> Drawing:
    def curve(axes: Axes, row: Row, records: list[Record], style: dict) -> None:
        metric = records[0].raw["metric"]
        by_step: dict[int, list[float]] = {}
        for record in records:
            for evaluation in record.raw["evaluations"]:
                by_step.setdefault(evaluation["step"], []).append(100 * evaluation[metric])
        _line_with_band(axes, by_step, row.label, style, spread=True)

    figure = _panels(experiment, curve, "step", "score, validation set")
    text = (
        f"Score on the validation set over training for {_names(experiment.tasks)}: means over seeds, the band from "
        "the lowest to the highest seed."
    )
    return Drawing(f"{experiment.name}_curves", "Learning curves", text, figure)


def _budgets(experiment: MeasuredExperiment) -> Drawing | None:
    def curve(axes: Axes, row: Row, records: list[Record], style: dict) -> None:
        for key, line in (("budget", ":"), ("live", "-")):
            by_step: dict[int, list[float]] = {}
            for record in records:
                for entry in record.raw.get("history") or []:
                    if entry.get(key) is not None:
                        by_step.setdefault(entry["step"], []).append(entry[key])
            # Equal schedules lie on one another: the first row's line is the widest, so that all can be seen.
            plain = {**style, "linestyle": line, "marker": "", "linewidth": widths[row.label]}
            _line_with_band(axes, by_step, f"{row.label}, {key}", plain, spread=False)

    rows = [row for row in experiment.rows if any(_has_budget(record) for record in row.every)]
    if not rows:
        return None
    widths = {row.label: max(1.0, 4.0 - 1.2 * i) for i, row in enumerate(rows)}
    figure = _panels(experiment, curve, "step", "singular values, all layers", rows)
    text = (
        "Singular values over training, means over seeds: the schedule's budget (dotted) and those that live (solid) "
        f"for {', '.join(row.label for row in rows)}."
    )
    return Drawing(f"{experiment.name}_budget", "Budget and live rank", text, figure)


def _spectra(experiment: MeasuredExperiment) -> Drawing | None:
    def curve(axes: Axes, row: Row, records: list[Record], style: dict) -> None:
        spectra = [values for record in records for values in (record.raw.get("spectra") or {}).values()]
        if not spectra:
            return
        width = max(map(len, spectra))
        table = np.array([[*values, *[0.0] * (width - len(values))] for values in spectra])
        middle, low, high = np.median(table, axis=0), *np.quantile(table, [0.1, 0.9], axis=0)
        shown = middle > 1e-5  # a logarithmic axis has no place for what is pruned in half of the modules
        index = np.arange(1, width + 1)
        axes.plot(index[shown], middle[shown], label=row.label, markersize=3.5, linewidth=1.2, **style)
        axes.fill_between(
            index[shown], np.maximum(low, 1e-5)[shown], high[shown], color=style["color"], alpha=0.12, lw=0
        )
        axes.set_yscale("log")

    rows = [row for row in experiment.rows if any(record.raw.get("spectra") for record in row.every)]
    if not rows:
        return None
    figure = _panels(experiment, curve, "index of the singular value of ΔW", "singular value", rows)
    text = (
        "Singular values of the update ΔW in falling order: the median over modules and seeds, the band from the 10th "
        f"to the 90th percentile, for {', '.join(row.label for row in rows)}. A line ends where the median is zero."
    )
    return Drawing(f"{experiment.name}_spectra", "Spectra of ΔW", text, figure)


def _rank_map(experiment: MeasuredExperiment, row: Row, stem: str) -> Drawing | None:
    """The paper's Figure 3: live rank by layer and module."""
    maps: dict[str, dict[tuple[int, str], float]] = {}
    for task, records in row.records.items():
        patterns = [pattern for pattern in map(rank_pattern, records) if pattern]
        places: dict[tuple[int, str], list[int]] = {}
        for pattern in patterns:
            for module, live in pattern.items():
                if place := module_place(module):
                    places.setdefault(place, []).append(sum(live))
        if places:
            maps[task] = {place: fmean(counts) for place, counts in places.items()}
    if not maps:
        return None
    modules = sorted({module for values in maps.values() for _, module in values}, key=_module_rank)
    layers = range(max(layer for values in maps.values() for layer, _ in values) + 1)
    top = max(max(values.values()) for values in maps.values()) or 1
    figure = Figure(
        figsize=(max(4.5, 0.42 * len(layers) + 2.2), 0.36 * len(modules) * len(maps) + 1.6), layout="constrained"
    )
    panels = figure.subplots(len(maps), squeeze=False, sharex=True)[:, 0]
    for axes, (task, values) in zip(panels, maps.items(), strict=True):
        grid = np.array([[values.get((layer, module), np.nan) for layer in layers] for module in modules])
        image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xticks(range(len(layers)), [str(layer + 1) for layer in layers])
        axes.set_title(HEADINGS.get(task, task), loc="left", parse_math=False)
        axes.grid(False)
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > 0.55 * top else "white"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=7)
    panels[-1].set_xlabel("layer")
    figure.colorbar(image, ax=panels, label="live rank, mean over seeds", shrink=0.8)
    whole = fmean(value for values in maps.values() for value in values.values())
    text = (
        f"{row.label}: singular values that live at the end of training, by layer and module, mean over seeds "
        f"({_names(list(maps))}); {whole:.2f} a module on average."
    )
    return Drawing(f"{experiment.name}_ranks_{stem}", f"Live ranks: {row.label}", text, figure)


def _learning_rates(experiment: MeasuredExperiment, records: list[Record], name: str) -> Drawing | None:
    """Score against the learning rate, a line a method: of a sweep of rates, or of the held-out selection runs."""
    records = [record for record in records if LEARNING_RATE in record.axes]
    if not records:
        return None
    found = list(dict.fromkeys(_without_rate(record) for record in records))
    known = [row.label for row in experiment.rows if row.label in found]
    labels = known + [label for label in found if label not in known]  # a row's style is the same in every figure
    tasks = sorted_tasks({record.task for record in records})
    figure, panels = _grid_of_panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=False):
        for label, style in zip(labels, _styles(len(labels)), strict=True):
            by_rate: dict[float, list[float]] = {}
            for record in records:
                if record.task == task and _without_rate(record) == label:
                    by_rate.setdefault(record.axes[LEARNING_RATE], []).append(record.score("last"))
            _line_with_band(axes, by_rate, label, style, spread=True)
        axes.set_xscale("log")
        rates = sorted({record.axes[LEARNING_RATE] for record in records})
        axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates], rotation=60, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=8)
        axes.minorticks_off()
        axes.set_title(HEADINGS.get(task, task), loc="left", parse_math=False)
    held_out = name == "selection"
    where = "held-out training data" if held_out else "validation set"
    _finish(figure, panels, "learning rate (log scale)", f"last score, {where}")
    text = (
        f"Score at the last evaluation ({where}) against the learning rate for {', '.join(labels)} on {_names(tasks)}: "
        "means over seeds, the band from the lowest to the highest."
    )
    title = "Selection of the learning rate" if held_out else "Sensitivity to the learning rate"
    return Drawing(f"{experiment.name}_{name}", title, text, figure)


def _panels(
    experiment: MeasuredExperiment,
    curve: Callable[[Axes, Row, list[Record], dict], None],
    xlabel: str,
    ylabel: str,
    rows: list[Row] | None = None,
) -> Figure:
    """A panel for each task, `curve` called for each row in it; a row has the same style in every figure."""
    figure, panels = _grid_of_panels(len(experiment.tasks))
    styles = dict(zip([row.label for row in experiment.rows], _styles(len(experiment.rows)), strict=True))
    for axes, task in zip(panels, experiment.tasks, strict=False):
        for row in rows or experiment.rows:
            if task in row.records:
                curve(axes, row, row.records[task], styles[row.label])
        axes.set_title(HEADINGS.get(task, task), loc="left", parse_math=False)
    _finish(figure, panels, xlabel, ylabel)
    return figure


def _grid_of_panels(number: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, number)
    lines = -(-number // columns)
    figure = Figure(figsize=(3.9 * columns + 0.4, 2.6 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]


def _finish(figure: Figure, panels: list[Axes], xlabel: str, ylabel: str) -> None:
    """Axis labels at the outer panels, one legend for all below them."""
    columns = min(2, len(panels))
    for i, axes in enumerate(panels):
        if i + columns >= len(panels):
            axes.set_xlabel(xlabel)
        if i % columns == 0:
            axes.set_ylabel(ylabel)
    add_legend(figure, labelled_lines(panels))


def _line_with_band(axes: Axes, by_x: dict[float, list[float]], label: str, style: dict, spread: bool) -> None:
    if not by_x:
        return
    xs = sorted(by_x)
    axes.plot(xs, [fmean(by_x[x]) for x in xs], label=label, **{"markersize": 3.5, "linewidth": 1.3, **style})
    if spread:
        lows, highs = [min(by_x[x]) for x in xs], [max(by_x[x]) for x in xs]
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.12, linewidth=0)


def _styles(number: int) -> Iterator[dict]:
    for i in range(number):
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }


def _file_stems(labels: list[str]) -> dict[str, str]:
    """A name for each label's file, numbered where labels differ only in what a file's name cannot hold."""
    stems: dict[str, str] = {}
    taken: set[str] = set()  # in lower case: some file systems do not tell the two apart
    for label in labels:
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", label)
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in itertools.count(1))
        stems[label] = next(stem for stem in numbered if stem.lower() not in taken)
        taken.add(stems[label].lower())
    return stems


def _has_budget(record: Record) -> bool:
    return any(entry.get("budget") is not None for entry in record.raw.get("history") or [])


def _without_rate(record: Record) -> str:
    return run_label(record.axes, ("task_name", "seed", LEARNING_RATE)) or record.raw["method"]


def _module_rank(module: str) -> tuple[int, str]:
    names = [name for name, _ in MODULE_NAMES]
    return (names.index(module) if module in names else len(names), module)


def _names(tasks: list[str]) -> str:
    return ", ".join(HEADINGS.get(task, task) for task in tasks)
