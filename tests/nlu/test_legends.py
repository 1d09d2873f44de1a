"""Legends lie inside their figures and show every label as it is, whatever labels there are."""

from collections import Counter

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nlu import plots
from nlu.experiments import figures
from nlu.experiments.figures import STYLE, draw
from nlu.experiments.measured import load_measured
from tests.nlu.records import write_record

LONG = [f"change {i:02} of the regulariser, of the widths and of the scales" for i in range(18)]
SHORT = [f"k{i}" for i in range(18)]
ENDLESS = ["W" * 140, "word " * 30 + "end"]
ODD = ["_hidden", "cost $x_1$ and $y^2$", "$", "two\nlines", "a b", "a+b", "A b", "a_b_2"]


def _experiment(folder, labels, tasks=("cola",), rates=()):
    for number, label in enumerate(labels):
        for task in tasks:
            for rate in rates or (None,):
                axes = {"change": label, "task_name": task, "seed": 1} | ({"learning_rate": rate} if rate else {})
                made = write_record(folder / "trial", "lora2", task, 1, [0.5, 0.5 + number / 100], axes)
                made.rename(made.with_name(f"{number}-{task}-{rate}"))  # some labels make no good folder
    (experiment,) = load_measured(folder)
    return experiment


def _legends(drawing):
    return [*drawing.figure.legends, *(axes.get_legend() for axes in drawing.figure.axes if axes.get_legend())]


def _assert_inside(drawing):
    """At the resolutions of the screen, of SVG and of PNG files."""
    canvas = FigureCanvasAgg(drawing.figure)
    for dpi in (72, 100, 150):
        drawing.figure.set_dpi(dpi)
        with matplotlib.rc_context(STYLE):
            drawing.figure.draw_without_rendering()
        renderer = canvas.get_renderer()
        (legend,) = _legends(drawing)
        place, whole = legend.get_window_extent(renderer), drawing.figure.bbox
        assert place.x0 >= 0 and place.y0 >= 0 and place.x1 <= whole.width and place.y1 <= whole.height, drawing.stem
        for axes in drawing.figure.axes:
            if axes.get_visible():
                panel = axes.get_tightbbox(renderer)
                assert not place.overlaps(panel), drawing.stem
                assert axes.bbox.height > 0.8 * dpi and axes.bbox.width > 2 * dpi, "the legend crushes the panels"


@pytest.mark.parametrize("tasks", [("mrpc",), ("cola", "mrpc", "rte")])
@pytest.mark.parametrize("labels", [LONG, SHORT, ENDLESS], ids=["long", "short", "endless"])
def test_every_legend_is_inside_its_figure(tmp_path, monkeypatch, labels, tasks):
    monkeypatch.setattr(figures, "_rank_map", lambda *_: None)  # has none
    drawings = draw(_experiment(tmp_path, labels, tasks))
    assert [d.stem for d in drawings] == [f"trial_{kind}" for kind in ("parameters", "curves", "budget", "spectra")]
    for drawing in drawings:
        _assert_inside(drawing)


def test_the_legend_of_learning_rates_is_inside(tmp_path):
    (drawing,) = draw(_experiment(tmp_path, LONG, rates=(1e-3, 2e-3)))
    assert drawing.stem == "trial_learning_rate"
    _assert_inside(drawing)


def test_every_label_is_in_the_legend_as_it_is(tmp_path):
    drawings = {d.stem: d for d in draw(_experiment(tmp_path, ODD))}
    shown = [label.replace("\n", " ") for label in ODD]
    for kind, ends in (("parameters", [""]), ("curves", [""]), ("spectra", [""]), ("budget", [", budget", ", live"])):
        drawing = drawings[f"trial_{kind}"]
        _assert_inside(drawing)
        (legend,) = _legends(drawing)
        assert Counter(text.get_text() for text in legend.get_texts()) == Counter(
            s + end for s in shown for end in ends
        )
        assert not any(text.get_parse_math() for text in legend.get_texts())


def test_labels_that_look_alike_get_rank_maps_of_their_own(tmp_path):
    titles = {d.stem.lower(): d.title for d in draw(_experiment(tmp_path, ODD)) if "_ranks_" in d.stem}
    assert Counter(titles.values()) == Counter(f"Live ranks: {label}" for label in ODD)


def test_a_label_with_line_breaks_and_brackets_breaks_no_page(tmp_path):
    _experiment(tmp_path / "measured", ["two\nlines", "one ] bracket"])
    flags = ["--measured_dir", str(tmp_path / "measured"), "--output_dir", str(tmp_path / "figures")]
    assert plots.main(flags) == 0
    lines = (tmp_path / "figures/README.md").read_text(encoding="utf-8").splitlines()
    assert "### Live ranks: two lines" in lines
    assert len([line for line in lines if line.startswith("![") and line.endswith(".png)")]) == 6
    assert any(line.startswith("![one \\] bracket") for line in lines)


def test_points_on_one_spot_are_drawn_around_each_other(tmp_path):
    for number, (method, score) in enumerate([("lora", 0.3), ("adalora", 0.5), ("sora", 0.5), ("lora2", 0.9)]):
        write_record(tmp_path / "trial", method, "rte", number, [score], adapter_params=8000 if number else 100)
    (experiment,) = load_measured(tmp_path)
    drawing = draw(experiment)[0]
    points = {c.get_label(): c.lines[0] for c in drawing.figure.axes[0].containers}
    assert all(point.get_markerfacecolor() == "none" for point in points.values())
    sizes = {label: point.get_markersize() for label, point in points.items()}
    assert abs(sizes["adalora"] - sizes["sora"]) >= 4
    assert sizes["lora"] == sizes["lora2"] == min(sizes.values())
