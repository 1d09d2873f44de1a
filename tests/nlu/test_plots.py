"""What the figures show against the records they are drawn from; the same bytes each time."""

import json
import xml.etree.ElementTree as ET
from statistics import fmean

import numpy as np
import pytest

from nlu import plots
from nlu.experiments.figures import draw, module_place
from nlu.experiments.measured import load_measured
from tests.nlu.records import write_record

TASKS = ("cola", "rte")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "measured"
    for method, base in (("lora", 0.5), ("lora2", 0.55), ("adalora", 0.4)):
        for task in TASKS:
            for seed in (1, 2):
                write_record(folder / "trial", method, task, seed, [base - 0.1, base + seed / 100])
    for rate in (1e-3, 2e-3):
        axes = {"method": "lora2", "task_name": "rte", "learning_rate": rate, "seed": 101}
        sweep = {"experiment": "trial", "axes": axes}
        arguments = {"holdout_fraction": 0.1}
        write_record(folder / "trial/select", "lora2", "rte", 101, [rate * 100], axes, arguments=arguments, sweep=sweep)
    return folder


@pytest.fixture(scope="module")
def drawings(measured):
    (experiment,) = load_measured(measured)
    return {drawing.stem.removeprefix("trial_"): drawing for drawing in draw(experiment)}


def _lines(drawing, panel):
    axes = drawing.figure.axes[panel]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_each_figure_that_the_records_allow_is_drawn_and_described(drawings):
    assert set(drawings) == {"parameters", "curves", "budget", "spectra", "ranks_lora2", "ranks_adalora", "selection"}
    assert all(drawing.text.endswith(".") for drawing in drawings.values())


def test_learning_curves_are_means_over_seeds(drawings):
    steps, scores = _lines(drawings["curves"], 1)["lora2"]
    assert steps == [100, 200]
    assert scores == pytest.approx([45.0, fmean([56.0, 57.0])])
    band = drawings["curves"].figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((40.0, 52.0))  # the first row is lora: 40 to 51 and 52


def test_budget_and_live_rank_come_from_the_history(drawings):
    lines = _lines(drawings["budget"], 0)
    assert set(lines) == {f"{method}, {key}" for method in ("lora2", "adalora") for key in ("budget", "live")}
    assert lines["lora2, budget"] == ([100, 200], [14, 12])


def test_spectra_are_medians_over_modules_and_seeds(drawings):
    index, values = _lines(drawings["spectra"], 0)["lora"]
    assert index == [1, 2, 3] and values == pytest.approx(list(np.median([[0.5, 0.2, 0.01], [0.4, 0.1, 0.0]], axis=0)))


def test_the_rank_map_counts_live_values_by_layer_and_module(drawings):
    """By hand: layer 0 keeps 1 of 4 for seed 1 and 2 for seed 2; layer 1 keeps 2 and 3."""
    axes = drawings["ranks_lora2"].figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["query", "attention.output", "layer.output"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1.5, 2.5]] * 3)
    assert [text.get_text() for text in axes.texts] == ["1.5", "2.5"] * 3
    assert "2.00 a module" in drawings["ranks_lora2"].text


def test_the_selection_shows_the_held_out_scores_only(drawings):
    rates, scores = _lines(drawings["selection"], 0)["lora2"]
    assert rates == [1e-3, 2e-3] and scores == pytest.approx([10.0, 20.0])


def test_parameters_are_those_of_the_records(drawings):
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in drawings["parameters"].figure.axes[0].containers}
    assert points["lora2"] == pytest.approx([8100, fmean([56.0, 57.0])])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("deberta.encoder.layer.11.attention.self.query_proj", (11, "query")),
        ("bert.encoder.layer.0.attention.output.dense", (0, "attention.output")),
        ("roberta.encoder.layer.3.intermediate.dense", (3, "intermediate")),
        ("bert.encoder.layer.2.output.dense", (2, "layer.output")),
        ("model.layers.5.self_attn.v_proj", (5, "value")),
        ("model.layers.5.mlp.gate_proj", (5, "mlp.gate_proj")),
        ("classifier.dense", None),
    ],
)
def test_modules_are_found_by_layer_and_published_name(name, place):
    assert module_place(name) == place


def test_an_experiment_over_learning_rates_gets_one_figure(tmp_path):
    for method in ("lora", "lora2"):
        for rate in (1e-4, 1e-3, 1e-2):
            axes = {"method": method, "learning_rate": rate, "task_name": "cola", "seed": 1}
            write_record(tmp_path / "rates", method, "cola", 1, [rate * 10], axes)
    (experiment,) = load_measured(tmp_path)
    (drawing,) = draw(experiment)
    assert _lines(drawing, 0)["lora"] == ([1e-4, 1e-3, 1e-2], pytest.approx([0.1, 1.0, 10.0]))


def test_the_files_are_whole_and_the_same_each_time(measured, tmp_path):
    flags = ["--measured_dir", str(measured), "--output_dir", str(tmp_path / "figures")]
    assert plots.main(flags) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert len(first) == 7 * 2 + 1
    for name, content in first.items():
        if name.endswith(".svg"):
            assert ET.fromstring(content).tag.endswith("svg")
            assert b"<dc:date>" not in content
        elif name.endswith(".png"):
            assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    assert plots.main(flags) == 0
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    text = first["README.md"].decode()
    assert all(f"]({name})" in text for name in first if name.endswith(".png"))


def test_without_a_finished_run_the_page_says_so(tmp_path):
    (tmp_path / "none").mkdir()
    assert plots.main(["--measured_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "figures")]) == 0
    assert "No finished run" in (tmp_path / "figures/README.md").read_text()
    (tmp_path / "bad/x").mkdir(parents=True)
    (tmp_path / "bad/x/results.json").write_text(json.dumps({"status": "finished"}))
    assert plots.main(["--measured_dir", str(tmp_path / "bad"), "--output_dir", str(tmp_path / "figures")]) == 2
