"""Every figure of the tables against its formula written here; what counts as a score; the same bytes each time."""

import csv
import io
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtr

from nlu import tables
from nlu.errors import UsageError
from nlu.experiments.measured import average, average_interval, load_measured, paired
from nlu.experiments.published import PAPER_TABLES, published_average, published_table
from nlu.experiments.table_format import Table, latex
from tests.nlu.records import write_record

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = REPOSITORY / "results/published"
SCORES = {  # (method, task) → last score of seeds 1, 2, 3
    ("lora", "cola"): [0.50, 0.52, 0.57],
    ("lora", "rte"): [0.70, 0.71, 0.69],
    ("lora2", "cola"): [0.53, 0.58, 0.56],
    ("lora2", "rte"): [0.74, 0.70, 0.71],
}


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "measured"
    for (method, task), values in SCORES.items():
        for seed, last in enumerate(values, 1):
            write_record(folder / "trial", method, task, seed, [0.1, last + 0.05, last])
    return folder


def _rows(folder):
    (experiment,) = load_measured(folder)
    return experiment, {row.label: row for row in experiment.rows}


def _lines(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_means_deviations_and_averages(measured, tmp_path):
    tables.main(["--measured_dir", str(measured), "--output_dir", str(tmp_path / "tables")])
    for which, shift in (("last", 0.0), ("best", 5.0)):
        lines = {line["row"]: line for line in _lines(tmp_path / f"tables/trial_{which}.csv")}
        for (method, task), values in SCORES.items():
            percent = [100 * v + shift for v in values]
            mean = sum(percent) / 3
            deviation = math.sqrt(sum((v - mean) ** 2 for v in percent) / 2)
            assert float(lines[method][f"{task}_mean"]) == pytest.approx(mean, abs=1e-5)
            assert float(lines[method][f"{task}_std"]) == pytest.approx(deviation, abs=1e-5)
        lora2 = (sum(SCORES["lora2", "cola"]) + sum(SCORES["lora2", "rte"])) / 6 * 100 + shift
        assert float(lines["lora2"]["average"]) == pytest.approx(lora2, abs=1e-5)
        assert lines["lora2"]["seeds"] == "3"
    text = (tmp_path / "tables/trial_last.md").read_text()
    assert "| lora | 8,000 | 3 | 53.00 ± 3.61 | 70.00 ± 1.00 | 61.50 |" in text
    assert "| lora2 | 8,100 | 3 | **55.67 ± 2.52** | **71.67 ± 2.08** | **63.67** |" in text


def test_the_bootstrap_interval_is_the_distribution_of_all_resamples(measured):
    """With three seeds and two tasks every resample can be written down: 27 × 27 averages."""
    experiment, rows = _rows(measured)
    low, high = average_interval(rows["lora2"], "last", experiment.tasks)
    means = [
        [100 * sum(draw) / 3 for draw in itertools.product(SCORES["lora2", task], repeat=3)] for task in ("cola", "rte")
    ]
    every = np.array([(a + b) / 2 for a in means[0] for b in means[1]])
    expected = np.quantile(every, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.12)
    assert low < average(rows["lora2"], "last", experiment.tasks) < high
    assert average_interval(rows["lora2"], "last", experiment.tasks) == (low, high)


def test_the_paired_tests_follow_their_definitions(measured, tmp_path):
    _, rows = _rows(measured)
    result = paired(rows["lora2"], rows["lora"], "last")
    d = [100 * (a - b) for t in ("cola", "rte") for a, b in zip(SCORES["lora2", t], SCORES["lora", t], strict=True)]
    assert result.differences == pytest.approx(d)
    mean = sum(d) / 6
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / 5 / 6)
    assert result.mean == pytest.approx(mean)
    assert result.t_p == pytest.approx(2 * stdtr(5, -abs(mean / error)))
    half = 2.570581835636314 * error  # Student's t, 5 degrees of freedom, 97.5 %
    assert result.interval == pytest.approx((mean - half, mean + half))
    assert result.wins_ties_losses == (4, 0, 2)
    tables.main(["--measured_dir", str(measured), "--output_dir", str(tmp_path / "tables")])
    line = next(x for x in _lines(tmp_path / "tables/trial_paired.csv") if x["score"] == "last")
    assert (line["row"], line["against"], line["pairs"]) == ("lora2", "lora", "6")
    assert float(line["t_p"]) == pytest.approx(result.t_p, abs=1e-6)


def test_wilcoxon_counts_all_sign_patterns(tmp_path):
    """Six different differences without ties: the exact p is a count over 2⁶ assignments of signs."""
    differences = [0.01, -0.02, 0.03, 0.04, 0.05, 0.06]
    for seed, difference in enumerate(differences, 1):
        write_record(tmp_path / "trial", "lora", "rte", seed, [0.5])
        write_record(tmp_path / "trial", "adalora", "rte", seed, [0.5 + difference])
    _, rows = _rows(tmp_path)
    result = paired(rows["adalora"], rows["lora"], "last")
    ranks, observed = range(1, 7), 2
    smaller = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign < 0)
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert result.wilcoxon_p == pytest.approx(2 * sum(s <= observed for s in smaller) / 64)


def test_pairs_are_matched_by_task_and_seed_not_by_position(tmp_path):
    for seed, score in ((1, 0.5), (2, 0.6), (3, 0.7)):
        write_record(tmp_path / "trial", "lora", "rte", seed, [score])
    for seed, score in ((3, 0.72), (2, 0.61), (9, 0.1)):
        write_record(tmp_path / "trial", "lora2", "rte", seed, [score])
    _, rows = _rows(tmp_path)
    assert sorted(paired(rows["lora2"], rows["lora"], "last").differences) == pytest.approx([1.0, 2.0])


def test_degenerate_comparisons_give_no_p_value(tmp_path):
    for seed in (1, 2, 3):
        write_record(tmp_path / "trial", "lora", "rte", seed, [0.5])
        write_record(tmp_path / "trial", "lora2", "rte", seed, [0.5])
    write_record(tmp_path / "trial", "adalora", "mrpc", 1, [0.5])
    _, rows = _rows(tmp_path)
    same = paired(rows["lora2"], rows["lora"], "last")
    assert (same.mean, same.t_p, same.wilcoxon_p, same.wins_ties_losses) == (0, None, None, (0, 3, 0))
    assert paired(rows["adalora"], rows["lora"], "last") is None
    assert average(rows["lora2"], "last", ["mrpc", "rte"]) is None  # a task is missing: no average that would mislead
    assert average_interval(rows["adalora"], "last", ["mrpc"]) is None


def test_only_finished_runs_on_the_validation_set_count(measured):
    trial = measured / "trial"
    write_record(trial, "lora", "cola", 8, [0.99], status="failed", error="the loss is nan")
    write_record(trial, "lora", "cola", 9, [0.99], status="running")
    write_record(trial / "select", "lora", "cola", 7, [0.99], arguments={"holdout_fraction": 0.1},
                 sweep={"experiment": "trial", "axes": {"method": "lora"}})  # fmt: skip
    experiment, rows = _rows(measured)
    assert sorted(record.seed for record in rows["lora"].records["cola"]) == [1, 2, 3]
    assert experiment.failed == 2 and [record.seed for record in experiment.held_out] == [7]
    (last, *_) = tables.measured_tables(experiment)
    assert any("12 finished runs; 2 that did not finish give no score" in note for note in last.notes)


def test_chosen_rates_are_shown_and_those_at_an_edge_marked(measured, tmp_path):
    for method in ("lora", "lora2"):
        for rate in (5e-4, 1e-3, 2e-3) if method == "lora" else (1e-3, 2e-3):
            axes = {"method": method, "task_name": "cola", "learning_rate": rate, "seed": 101}
            changes = {"arguments": {"holdout_fraction": 0.1}, "sweep": {"experiment": "trial", "axes": axes}}
            write_record(measured / "trial/select", method, "cola", 101, [0.5], axes, **changes)
    tables.main(["--measured_dir", str(measured), "--output_dir", str(tmp_path / "tables")])
    text = (tmp_path / "tables/trial_chosen.md").read_text()
    assert "| lora | 0.001 | 0.001 |" in text and "| lora2 | 0.001 † | 0.001 |" in text


def test_parameters_that_differ_between_tasks_are_a_range_and_what_is_learnt_a_mean(tmp_path):
    write_record(tmp_path / "trial", "lora2", "rte", 1, [0.5], head_params=770, live_adapter_params=100)
    write_record(tmp_path / "trial", "lora2", "stsb", 1, [0.5], head_params=385, live_adapter_params=201)
    (experiment,) = load_measured(tmp_path)
    assert tables.cost_table(experiment).rows == [
        ["lora2", "8,100", "385 to 770", "100,000", "24", "16", "8", "150.5", "8", "1024"]
    ]
    line = tables.cost_table(experiment).data[0]
    assert (line["head_params_min"], line["head_params_max"], line["adapter_params_min"]) == (385, 770, 8100)


def test_mnli_and_qqp_have_two_columns_and_count_once(tmp_path):
    evaluations = [{"step": 100, "accuracy": 0.8, "accuracy_mm": 0.6}]
    write_record(tmp_path / "trial", "lora", "mnli", 1, [0.8], evaluations=evaluations)
    write_record(tmp_path / "trial", "lora", "qqp", 1, [0.9], evaluations=[{"step": 100, "accuracy": 0.9, "f1": 0.85}])
    write_record(tmp_path / "trial", "lora", "rte", 1, [0.5])
    experiment, rows = _rows(tmp_path)
    assert experiment.columns == ["qqp_acc", "qqp_f1", "mnli_m", "mnli_mm", "rte"]
    assert average(rows["lora"], "last", experiment.tasks) == pytest.approx((87.5 + 70 + 50) / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"metric": "absent"}, "lacks metric"),
        ({"best_step": 77}, "best_step 77"),
        ({"evaluations": [{"step": 100, "accuracy": "high"}]}, "evaluations[0].accuracy is 'high'"),
        ({"evaluations": [{"step": 100, "f1": 0.5}]}, "lacks evaluations[0].accuracy"),
    ],
)
def test_a_faulty_record_is_named_and_nothing_is_written(measured, tmp_path, capsys, changes, message):
    folder = write_record(measured / "trial", "lora", "mrpc", 1, [0.5], **changes)
    output = tmp_path / "tables"
    assert tables.main(["--measured_dir", str(measured), "--output_dir", str(output)]) == 2
    err = capsys.readouterr().err
    assert message in err and str(folder / "results.json") in err and err.count("\n") == 1
    assert not output.exists()


def test_two_records_of_one_run_are_refused(measured):
    source = measured / "trial/lora-cola-1"
    (measured / "trial/copy").mkdir()
    (measured / "trial/copy/results.json").write_bytes((source / "results.json").read_bytes())
    with pytest.raises(UsageError, match="same run"):
        load_measured(measured)


def test_regenerating_gives_the_same_bytes_and_drops_what_is_gone(measured, tmp_path):
    output = tmp_path / "tables"
    flags = ["--measured_dir", str(measured), "--output_dir", str(output)]
    (tmp_path / "tables").mkdir()
    (output / "notes.md").write_text("a file of the user's, from before")
    assert tables.main(flags) == 0
    assert (output / "notes.md").exists()  # the folder was not ours then
    (output / "notes.md").unlink()
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert tables.main(flags) == 0
    assert first == {path.name: path.read_bytes() for path in output.iterdir()}
    shutil.rmtree(measured)
    measured.mkdir()
    assert tables.main(flags) == 0
    assert not list(output.glob("trial_*"))


def test_published_averages_are_computed_and_the_wrong_one_is_marked():
    table = published_table(PAPER_TABLES[0], PUBLISHED)
    rows = {(row[0], row[1]): row for row in table.rows}
    assert rows["lora2", "k=8"][-2:] == ["89.68", "89.43 †"]
    # By hand: (72.3 + 95.76 + 91.42 + (92.25 + 89.74)/2 + 91.92 + (90.43 + 90.23)/2 + 94.28 + 88.45) / 8
    assert table.data[-1]["avg_computed"] == pytest.approx(89.431875)
    assert sum("†" in row[-1] for row in table.rows) == 1
    marked = {p.stem: [r for r in published_table(p, PUBLISHED).rows if "†" in r[-1]] for p in PAPER_TABLES}
    assert [(stem, len(rows)) for stem, rows in marked.items() if rows] == [("table1", 1), ("table4", 1)]


def test_published_and_measured_never_share_a_table(measured):
    pages = tables.build_pages(measured, PUBLISHED)
    for _, _, found in pages:
        assert len({"published" in table.title for table in found}) == 1
    for table in (table for _, _, found in pages for table in found):
        first = " ".join(table.notes)
        assert ("Published, not measured here" in first) != ("Measured here" in first or table.stem.endswith("_paired"))
        assert "Protocol" in first or "published" not in table.title


def test_every_published_file_names_its_source():
    for path in PUBLISHED.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["source"] and content["rows"], path.name


@given(st.text(max_size=40))
def test_latex_text_has_no_bare_special_character(text):
    escaped = latex(text)
    for character in "&%#_":
        for i, found in enumerate(escaped):
            assert found != character or escaped[i - 1] == "\\"


@pytest.mark.parametrize("broken", ["two\nlines", "two\r\nlines", "two\u2028lines"])
def test_a_line_break_ends_no_row_of_a_table(broken):
    table = Table("stem", broken, ["method", broken], [[broken, "1"]], [broken])
    assert table.markdown().splitlines() == [
        "### two lines",
        "",
        "| method | two lines |",
        "| --- | ---: |",
        "| two lines | 1 |",
        "",
        "- two lines",
    ]
    assert r"two lines & 1 \\" in table.latex().splitlines()


@settings(max_examples=60)
@given(
    st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=6)] * 2), min_size=1)
)
def test_csv_reads_back_to_the_cells(cells):
    table = Table("t", "title", ["a", "b"], [list(row) for row in cells], [])
    assert [tuple(row) for row in csv.reader(io.StringIO(table.csv(), newline=""))][1:] == cells


def test_a_published_average_needs_every_column():
    assert published_average({"cola": 1.0, "qqp_acc": 4.0, "qqp_f1": 2.0}, ["cola", "qqp_acc", "qqp_f1"]) == 2.0
    assert published_average({"cola": 1.0}, ["cola", "rte"]) is None


def test_score_against_learning_rate_from_the_held_out_runs(tmp_path):
    folder = tmp_path / "trial"
    write_record(folder, "lora", "cola", 1, [0.5])
    for rate, scores in {1e-3: (0.2, 0.6), 4e-3: (0.0, 0.5)}.items():
        for task, score in zip(("cola", "rte"), scores, strict=True):
            axes = {"method": "lora", "task_name": task, "learning_rate": rate, "seed": 9}
            write_record(
                folder, "lora", task, 9, [0.9, score], axes, arguments={"learning_rate": rate, "holdout_fraction": 0.1}
            )
    (experiment,) = load_measured(tmp_path)
    table = tables.sensitivity_table(experiment)
    assert table.rows == [["lora", "2", "40.00 (0.001)", "25.00 (0.004)", "15.00"]]
    assert table.header[2:4] == ["lowest learning rate", "highest"]
    (line,) = table.data
    assert line["score_1"] == pytest.approx(40) and line["value_2"] == 4e-3
