"""Tables and figures of measured runs, and the papers' own tables."""

from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

from nlu import report
from nlu.experiments import figures
from nlu.experiments.claims import load_questions
from nlu.experiments.figures import STYLE, spread_apart
from nlu.experiments.published import published_table
from nlu.experiments.statistics import common_seeds, correct_claims, finished, load_measured, tuned_over
from nlu.experiments.tables import (
    _chosen,
    claims_table,
    score_table,
    training_table,
    tuning_table,
)
from tests.nlu.measured_lines import PUBLISHED, QUESTIONS, line, trial, write
from tests.nlu.tiny import REPOSITORY


@pytest.fixture
def runs(tmp_path):
    return load_measured(write(tmp_path / "lines", "trial", trial(3)))


def test_scores_and_the_mark_of_short_trainings(tmp_path):
    lines = [line("LoRA r=8", t, s, [0.9, v + s / 10]) for t, v in (("cola", 0.2), ("stsb", 0.6)) for s in (1, 2)]
    lines += [line("full", "cola", 1, [0.5], rate_sum=0.1), line("AdaLoRA", "cola", 1, [0.5], rate_sum=0.9)]
    runs = finished(load_measured(write(tmp_path, "trial", lines)))
    text = score_table("trial", runs).text.set_index("")
    row = text.loc["LoRA r=8"]
    assert (row["CoLA"], row["STS-B"], row["average"], row["seeds"]) == ("35.0 ± 7.1", "75.0 ± 7.1", "55.00", "2")
    assert (row["average of best"], row["average of medians"]) == ("90.00", "55.00")
    # Λ means nothing for full fine-tuning; a row that lacks a task has no average.
    assert list(text.index) == ["full", "LoRA r=8", "AdaLoRA (short)"] and text.loc["full"]["average"] == "–"
    training = training_table("trial", runs).text.set_index("")
    assert training.loc["AdaLoRA"][["Λ at pruning", "Λ at the end", "‖ΔW‖"]].tolist() == ["0.90", "0.90", "3.00"]
    assert training.loc["full"]["‖ΔW‖"] == "–" and training.loc["AdaLoRA"]["remaining values"] == "144 of 288"
    assert training.loc["LoRA r=8"]["CoLA loss"] == "0.105 (0.105)"


def test_labelled_test_sets_have_a_column_and_ranks_a_figure(tmp_path):
    modules = {f"encoder.layer.{i}.{kind}.dense": i + j for i in (0, 1) for j, kind in enumerate(("output", "other"))}
    lines = [
        line("AdaLoRA", "mrpc", s, [0.7], test_scores={"MRPC": {"accuracy": v, "f1": 0.1}},
             module_ranks={name: rank + 2 * (s - 1) for name, rank in modules.items()})
        for s, v in ((1, 0.6), (2, 0.8))
    ]  # fmt: skip
    lines += [line(label, "cola", 1, [0.5]) for label in ("AdaLoRA", "LoRA r=8")]
    runs = finished(load_measured(write(tmp_path, "trial", lines)))
    table = score_table("trial", runs)
    assert table.text.set_index("")["MRPC test"].tolist() == ["–", "70.0 ± 14.1"] and "CoLA test" not in table.text
    drawn = dict(figures.draw("trial", runs, runs))["trial_ranks"]().figure
    (panel,) = drawn.axes
    assert [text.get_text() for text in panel.get_yticklabels()] == ["output.dense", "other.dense"]
    assert [text.get_text() for text in panel.texts] == ["1.0", "2.0", "2.0", "3.0"]  # means, by type and layer
    assert dict(figures.draw("trial", runs[runs.label == "LoRA r=8"], runs))["trial_ranks"]() is None


def test_claims_have_a_row_for_each_task_and_published_gains_a_column(runs, tmp_path):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(QUESTIONS))
    question = load_questions(tmp_path / "claims.yaml")[0][0]
    final = finished(runs)
    # By hand: e^-0.02, e^-0.03 and e^-0.04 times the loss of CoLA, so an error of 0.01 / √3 in the exponent, with 2
    # degrees of freedom (t = 4.303); of STS-B e^-0.04, e^-0.05 and e^-0.06.
    exponent = final.task.map({"cola": 0.01, "stsb": 0.03}) + final.seed / 100
    less = np.exp(-exponent).where(final.label == "LoRA² k=8", 1)
    table = claims_table("trial", final.assign(loss=final.loss * less), question, correct_claims(runs, [question]))
    assert list(table.text["task"]) == ["all tasks", "CoLA", "STS-B"]
    assert list(table.text["loss, %"]) == ["−3.9", "−3.0", "−4.9"]
    assert table.text["95 % interval (loss)"][1] == "−5.3 to −0.5"
    lost = final.assign(
        last=final["last"].where((final.label != "LoRA r=8") | (final.seed < 3) | (final.task == "stsb"), 0)
    )
    moved = claims_table("trial", lost, question, correct_claims(lost, [question])).text
    assert list(moved["median"]) == list(table.text["median"]) == ["+2.00"] * 3
    assert list(moved["difference"]) != list(table.text["difference"])
    assert list(table.text["published"]) == ["+1.05", "–", "–"] and list(table.text["pairs"]) == ["6", "3", "3"]
    part = final[(final.label != "LoRA² k=8") | (final.task == "stsb")].assign(
        loss=final.loss.where(final.seed > 1, 0.0)
    )
    table = claims_table("trial", part, question, correct_claims(part, [question]))
    assert list(table.text["task"]) == ["STS-B"] and list(table.text["loss, %"]) == ["+0.0"]  # a loss of 0 has no ratio
    assert report._finding(table, part).startswith("LoRA² k=8 − LoRA r=8 on STS-B: +")


def test_rows_compare_over_the_seeds_that_all_of_them_have(tmp_path):
    """A lost run of a third seed, which only LoRA has, lowers its own average and no comparison."""
    even, lost = trial(2), [line("LoRA r=8", task, 3, [0.0]) for task in ("cola", "stsb")]
    runs = finished(load_measured(write(tmp_path / "more", "trial", even + lost)))
    before = finished(load_measured(write(tmp_path / "even", "trial", even)))
    text, plain = (score_table("trial", each).text.set_index("") for each in (runs, before))
    assert "average, common seeds" not in plain
    assert list(text["average, common seeds"]) == list(plain["average"])
    assert float(text["average"]["LoRA r=8"]) == pytest.approx(float(plain["average"]["LoRA r=8"]) * 2 / 3, abs=0.01)
    captions = [dict(figures.draw("trial", each, each))["trial_parameters"]().text for each in (runs, before)]
    assert captions[0] == captions[1] and report._finding(None, runs) == report._finding(None, before)
    apart = before[(before.label == "LoRA r=8") | (before.seed == 2)]
    assert set(common_seeds(apart).seed) == {2}
    apart = apart[(apart.label != "LoRA r=8") | (apart.seed == 1)]
    assert not len(common_seeds(apart)) and "No seed is common" in score_table("trial", apart).notes[-1]
    assert dict(figures.draw("trial", apart, apart))["trial_parameters"]() is None


def test_tuning_shows_what_was_chosen_and_what_no_tuning_gives(runs):
    text = tuning_table("trial", runs).text.set_index("")
    # By hand: 60, less 2 points for each thousandth away from 1e-3; the extra rate is left out.
    assert text.loc["LoRA² k=8", "mean of the values tried"] == f"{60 - 2 * (0.6 + 0 + 1.5 + 5.25) / 4:.2f}"
    assert text.loc["LoRA² k=8", "CoLA"] == "0.001" and text.loc["LoRA² k=8", "at the chosen values"] == "60.00"
    assert text.loc["LoRA r=8", "crashed"] == "2 of 8"  # which count as 0
    failed = (60 - 1.2) + 60 + (60 - 3)
    assert text.loc["LoRA r=8", "mean of the values tried"] == f"{failed / 4:.2f}"


def test_a_choice_that_was_made_before_a_better_value_was_measured_is_marked(tmp_path):
    def choices(**changes):
        lines = trial(2)
        last = next(e for e in lines if e["stage"] == "select" and e["label"] == "AdaLoRA" and e["task"] == "cola")
        last["evaluations"]["loss"] = [0.01]  # at 4e-4
        last |= changes
        table = tuning_table("trial", load_measured(write(tmp_path, "trial", lines)))
        return table.text.set_index("").loc["AdaLoRA", "CoLA"], any(note.startswith("‡") for note in table.notes)

    assert choices() == ("0.001 ‡", True)
    assert choices(seed=102, tried={"learning_rate": 1e-3}) == ("0.001 †", False)  # the others lack that seed
    assert choices(status="failed") == ("0.001 †", False)  # which cannot be chosen; 0.001 is the least of the others


def test_a_row_that_has_not_begun_a_task_has_no_choice_there(tmp_path):
    lines = [each for each in trial(2) if (each["label"], each["task"]) != ("AdaLoRA", "stsb")]
    text = tuning_table("trial", load_measured(write(tmp_path, "trial", lines))).text.set_index("")
    shown = text.loc["AdaLoRA", ["CoLA", "STS-B", "mean of the values tried", "at the chosen values"]].tolist()
    assert shown == ["0.001", "–", "–", "–"]


def test_published_averages_are_computed_and_the_wrong_one_is_marked():
    table = published_table(PUBLISHED, "lora2_table1_deberta_v3_base", "Table 1")
    # By hand: (72.3 + 95.76 + 91.42 + (92.25 + 89.74)/2 + 91.92 + (90.43 + 90.23)/2 + 94.28 + 88.45) / 8
    assert table.data["avg_computed"].iloc[-1] == pytest.approx(89.431875)
    marked = [cell for cell in table.text["average, computed"] if "†" in cell]
    assert marked == ["89.43 †"]


def test_a_gain_that_a_claim_cites_is_that_of_the_published_rows():
    questions, _ = load_questions(REPOSITORY / "configs/experiments/claims.yaml")
    table1 = published_table(PUBLISHED, "lora2_table1_deberta_v3_base", "").data
    average = {(r.method, r.setting): r.avg_computed for r in table1.itertuples()}
    gains = [average["lora2", f"k={k}"] - average["lora", f"r={r}"] for k, r in ((8, 8), (1, 1), (1, 8))]
    cited = {c.published for q in questions for c in q.claims if c.source == "LoRA² Table 1"}
    assert cited == {round(gain, 2) for gain in gains}


def test_rows_that_adapt_other_modules_share_a_figure(tmp_path):
    whole = {f"layer.{n}.{kind}.dense": 2 for n in range(2) for kind in ("key", "query")}
    part = {name: 1 for name in whole if "query" in name}
    for order in ((whole, part), (part, whole)):
        lines = [line(f"{n}", "cola", 1, [0.5], module_ranks=ranks) for n, ranks in enumerate(order)]
        runs = load_measured(write(tmp_path, "trial", lines))
        panels = dict(figures.draw("trial", runs, runs))["trial_ranks"]().figure.axes
        shown = [sorted(text.get_text() for text in panel.texts) for panel in panels]
        assert shown == [[f"{rank:.1f}" for rank in ranks.values()] for ranks in order]


def test_an_end_is_marked_behind_its_value_among_numbers_whose_runs_have_finished():
    chosen = {"learning_rate": 2e-3, "lora_alpha": 4, "rank_allocation": False, "lora_r": 8}
    tried = [chosen | {"learning_rate": rate, "rank_allocation": rate > 1e-3} for rate in (1e-3, 2e-3, 4e-3)]
    tried += [chosen | {"lora_alpha": alpha, "lora_r": alpha} for alpha in (2, 8)]
    tried += [chosen | {"lora_r": 4}]
    tried = [each | {"weight_decay": 0.1 if each["lora_r"] > 4 else 0} for each in tried]
    tuning = pd.DataFrame({"tried": pd.Series([chosen | {"weight_decay": 0}, *tried])})
    text, marked = _chosen("cola", chosen | {"weight_decay": 0}, tuning)
    # Of two values each is an end, which says nothing.
    assert text == "0.002, lora_alpha=4, rank_allocation=False, lora_r=8 †, weight_decay=0" and marked["cola_at_end"]


def test_modules_that_two_numbers_name_share_a_cell_of_the_figure(tmp_path):
    several = {f"layer.{n}.ffn.{i}.dense": rank for n in range(2) for i, rank in enumerate((1, 2, 6))}
    runs = load_measured(write(tmp_path, "trial", [line("a", "cola", 1, [0.5], module_ranks=several)]))
    (panel,) = dict(figures.draw("trial", runs, runs))["trial_ranks"]().figure.axes
    assert [text.get_text() for text in panel.texts] == ["3.0", "3.0"]


def test_points_of_about_equal_size_are_set_apart_and_the_others_stay():
    assert spread_apart([100.0, 5000.0]) == [100.0, 5000.0]
    placed = spread_apart([331_776, 42_336, 332_064, 336_672])
    assert placed[1] == 42_336
    close = sorted(placed[i] for i in (0, 2, 3))
    assert [b / a for a, b in pairwise(close)] == pytest.approx([figures.APART] * 2)
    small, large, other = spread_apart([40_000, 4e8, 44_000])  # at a fortieth of the axis
    assert large == 4e8 and other / small == pytest.approx(1e4 ** (1 / 40))


def test_a_wide_line_lies_below_a_narrow_one_in_whatever_order_they_come(runs):
    for final in (finished(runs), finished(runs)[::-1]):
        drawing = dict(figures.draw("trial", final, runs))["trial_curves"]()
        lines = sorted(drawing.figure.axes[0].get_lines(), key=lambda each: each.get_zorder())
        widths = [each.get_linewidth() for each in lines]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths) > 2


def test_labels_are_printed_as_they_are(tmp_path):
    labels = ["d<e>", "*z*", "_a_b_", "__init__", "x|y", "a < b", "`c`"]
    lines = [line(label, "cola", 1, [0.5], adapter_params=1000) for label in labels]
    table = score_table("trial", load_measured(write(tmp_path, "trial", lines)))
    rows = [row.split(" | ")[0].strip("| ") for row in table.markdown().splitlines() if row.startswith("| ")]
    printed = [r"d\<e>", r"\*z\*", r"\_a_b\_", r"\_\_init\_\_", r"x\|y", "a < b", r"\`c\`"]
    assert sorted(rows[1:]) == sorted(printed)
    text = table.latex()
    assert r"d\textless{}e\textgreater{}" in text and r"x\textbar{}y" in text and not set("<>|") & set(text)


def test_every_series_is_seen_and_every_label_is_in_the_legend_as_it_is(tmp_path):
    labels = ["_hidden", "cost $x_1$", "a label that goes on and on until it no longer fits on one line", "a b", "A"]
    lines = [line(label, "cola", 1, [0.5], adapter_params=1000) for label in labels]
    runs = load_measured(write(tmp_path, "trial", lines))
    drawings = {name: drawn() for name, drawn in figures.draw("trial", finished(runs), runs)}
    assert drawings["trial_rates"] is None
    for name in ("trial_parameters", "trial_curves"):
        figure = drawings[name].figure
        assert isinstance(figure, Figure)
        with matplotlib.rc_context(STYLE):
            figure.draw_without_rendering()
        (legend,) = figure.legends
        assert sorted(text.get_text().replace("\n", " ") for text in legend.get_texts()) == sorted(labels)
        box, page = legend.get_window_extent(), figure.bbox
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
        markers = [
            artist for artist in figure.axes[0].get_lines() if artist.get_marker() not in ("None", "", None, "_")
        ]
        styles = {(artist.get_color(), artist.get_marker()) for artist in markers}
        assert len(styles) >= len(labels)


def test_a_training_table_has_means_over_runs_and_both_losses(tmp_path):
    lines = [line("LoRA² k=8", "cola", s, [0.5, 0.4], train_seconds=60.0 * s) for s in (1, 2, 3)]
    for each, least in zip(lines, (0.1, 0.2, 0.6), strict=True):
        each["evaluations"]["loss"] = [least, 0.7]
    (row,) = training_table("trial", finished(load_measured(write(tmp_path, "trial", lines)))).text.to_dict("records")
    assert (row["CoLA loss"], row["minutes a run"], row["peak memory, MiB"]) == ("0.700 (0.300)", "2.0", "1,024")


def test_the_average_of_best_weighs_tasks_alike(tmp_path):
    lines = [line("LoRA r=8", "cola", s, [0.9, 0.2]) for s in (1, 2, 3)] + [line("LoRA r=8", "stsb", 1, [0.5, 0.4])]
    (row,) = score_table("trial", finished(load_measured(write(tmp_path, "trial", lines)))).text.to_dict("records")
    assert (row["average"], row["average of best"], row["seeds"]) == ("30.00", "70.00", "1 to 3")


def test_at_each_learning_rate_the_other_settings_are_those_of_the_lowest_loss(tmp_path):
    lines = []
    for rate, alpha, loss, score in (
        (1e-3, 2, 0.5, 0.3),
        ("1e-3", 16, 0.4, 0.2),  # quoted in the file
        (2e-3, 2, 0.6, 0.1),
        (2e-3, 16, 0.9, 0),
    ):
        for seed in (1, 2):
            tried = {"learning_rate": rate, "lora_alpha": alpha}
            lines.append(line("LoRA r=1", "cola", seed, [score + 0.05 * seed], stage="select", tried=tried))
            lines[-1]["evaluations"]["loss"] = [loss]
    lines += [line("LoRA r=1", "cola", 1, [0.3])]
    every = load_measured(write(tmp_path, "trial", lines))
    drawing = dict(figures.draw("trial", finished(every), every))["trial_rates"]()
    (drawn,) = (artist for artist in drawing.figure.axes[0].get_lines() if artist.get_label() == "LoRA r=1")
    assert drawn.get_xdata().tolist() == [1e-3, 2e-3]
    assert drawn.get_ydata().tolist() == pytest.approx([27.5, 17.5])


def test_rates_that_the_grid_has_are_drawn_without_a_tuning_stage(tmp_path):
    lines = []
    for rate, scores in ((1e-3, (0.2, 0.4)), (2e-3, (0.5, 0.6))):
        for seed, score in enumerate(scores):
            axes = {"row": "LoRA r=8", "learning_rate": rate, "task_name": "cola", "seed": seed}
            asked = {"task_name": "cola", "seed": seed, "learning_rate": rate}
            label = f"LoRA r=8, learning_rate={rate}"
            lines.append(line(label, "cola", seed, [score], axes=axes, asked=asked, run=f"{rate}-{seed}", tried={}))
    runs = load_measured(write(tmp_path, "trial", lines))
    drawings = dict(figures.draw("trial", runs, runs))
    assert drawings["trial_parameters"]() is None  # all have one size
    (panel,) = drawings["trial_rates"]().figure.axes
    (drawn,) = panel.get_lines()
    tuned = tuned_over(runs, "learning_rate")
    assert dict(figures.draw("trial", finished(tuned), tuned))["trial_rates"]() is not None
    words = [
        each | {"axes": each["axes"] | {"learning_rate": f"rate {each['axes']['learning_rate']}"}} for each in lines
    ]
    named = load_measured(write(tmp_path / "named", "trial", words))
    (panel,) = dict(figures.draw("trial", named, named))["trial_rates"]().figure.axes
    assert panel.get_lines()[0].get_xdata().tolist() == [1e-3, 2e-3]  # what an axis calls its values does not matter
    alone = line(
        "AdaLoRA", "cola", 1, [0.3], axes={"row": "AdaLoRA", "learning_rate": 1e-3, "task_name": "cola", "seed": 1}
    )
    more = load_measured(write(tmp_path / "more", "trial", [*lines, alone]))
    (panel,) = dict(figures.draw("trial", more, more))["trial_rates"]().figure.axes
    assert {artist.get_label() for artist in panel.get_lines()} == {"LoRA r=8", "AdaLoRA"}
    assert (drawn.get_label(), panel.get_title("left")) == ("LoRA r=8", "CoLA: score")
    assert drawn.get_xdata().tolist() == [1e-3, 2e-3] and drawn.get_ydata().tolist() == pytest.approx([30, 55])


def test_a_curve_far_below_the_others_leaves_the_panel(tmp_path):
    lines = [line(f"row {i}", "cola", 1, [0.8, 0.81, 0.82 + i / 1000]) for i in range(7)]
    runs = load_measured(write(tmp_path, "trial", [*lines, line("lost", "cola", 1, [0.0, 0.1, 0.8])]))
    score, _ = dict(figures.draw("trial", runs, runs))["trial_curves"]().figure.axes
    low, high = score.get_ylim()
    assert 60 < low < 80 and 82.6 < high < 85


def test_the_interval_of_a_lost_run_does_not_set_the_scale(tmp_path):
    scores = {f"row {i}": [0.70 + i / 100, 0.71 + i / 100] for i in range(4)} | {"lost": [0.2, 0.72]}
    lines = [
        line(label, "cola", s, [v], adapter_params=1000) for label, own in scores.items() for s, v in enumerate(own)
    ]
    runs = load_measured(write(tmp_path, "trial", lines))
    drawing = dict(figures.draw("trial", runs, runs))["trial_parameters"]()
    low, high = drawing.figure.axes[0].get_ylim()
    half = stats.t.ppf(0.975, 1) * 0.5  # of two values that lie a point apart
    assert (low, high) == pytest.approx((46 - 4 * half - 0.05 * (w := 27.5 + 5 * half), 73.5 + half + 0.05 * w))
    assert "(the longest cut off)" in drawing.text
    even = runs[runs.label != "lost"]
    assert "cut off" not in dict(figures.draw("trial", even, even))["trial_parameters"]().text
