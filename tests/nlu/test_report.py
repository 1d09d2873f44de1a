"""The report: an answer, a table and a figure for each experiment, and the unrounded numbers in CSV files."""

import re

import pandas as pd
import pytest

from nlu import report
from nlu.experiments.experiment import make_experiment
from nlu.experiments.fairness import unlike_scales
from nlu.experiments.figures import Drawing, draw, styles_of
from nlu.experiments.sentences import advice, answer
from nlu.experiments.statistics import as_frame, references
from nlu.experiments.tables import score_frame
from nlu.experiments.tuning import tried_rates
from tests.nlu.measured_lines import line, trial, write


@pytest.fixture
def make(tmp_path, capsys, monkeypatch):
    """A function that writes lines, runs the report: (exit code, the page, stderr). Figures are empty."""
    monkeypatch.setattr(Drawing, "png", lambda _: b"")

    def call(lines, **more):
        monkeypatch.chdir(tmp_path)
        for name, own in {"trial": lines, **more}.items():
            write(tmp_path / "output/measured", name, own)
        code, page = report.main([]), tmp_path / "output/report.md"  # in the default folders
        return code, page.read_text(encoding="utf-8") if page.exists() else "", capsys.readouterr().err

    return call


def scores(folder):
    return pd.read_csv(folder / "output/tables/scores.csv")


def drawn(lines, tuning=()):
    """The figures of made-up lines, by kind."""
    runs, tried = as_frame(lines), tried_rates(as_frame(tuning))
    return {each.kind: each for each in draw(runs, score_frame(runs, references(runs)), tried, styles_of(runs.label))}


def test_section_has_the_answer_before_the_table_and_the_figure(make):
    code, page, _ = make(trial())
    # By hand: in both tasks 1.9, 2.0 and 2.1 points, so a standard error of 0.1 / √6, 4 degrees of freedom, t = 2.776.
    row = r"^\| LoRA² k=8 +\| +336,672 \| +2 \| +6 \|.*\| +LoRA r=8 \| +\+2.00 \(\+1.89 to \+2.11\) \|"
    assert code == 0 and re.search(row, page, re.M)
    answered = page.index(" LoRA² k=8 scores 2.00 points higher than LoRA r=8 (95 % interval 1.89 to 2.11).")
    order = [answered, page.index("| method"), page.index("\n- Measured: minilm;"), page.index("![Score minus")]
    assert page.index("## trial") < order[0] and order == sorted(order)
    assert "failed runs" not in page and len(page[page.rindex("\n\n") :].splitlines()) <= 6  # no manual below it


def test_a_difference_over_all_tasks_needs_runs_on_all_of_them(make):
    page = make([each for each in trial() if (each["label"], each["task"]) != ("LoRA² k=8", "stsb")])[1]
    assert "No difference over all tasks for LoRA² k=8: runs of a task are missing." in page
    assert re.search(r"^\| LoRA² k=8 .*\| +LoRA r=8 \| +– \|", page, re.M)


def test_same_lines_give_the_same_bytes_and_outdated_figures_are_removed(make, tmp_path):
    make(trial())
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".md", ".csv")}
    for name in ("mine.png", "old_curves.png"):
        (tmp_path / f"output/figures/{name}").touch()
    with (tmp_path / "output/report.md").open("a") as page:
        page.write("[curves](figures/old_curves.png)")
    make(trial()[::-1])
    assert len(first) == 2 and all(path.read_bytes() == content for path, content in first.items())
    names = {path.name for path in (tmp_path / "output/figures").iterdir()}
    assert names == {"mine.png", "trial_differences.png", "trial_curves.png"}


def test_page_that_is_no_report_is_kept(make, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output/report.md").write_text("# Mine\n")
    code, _, said = make(trial())
    assert code == 2 and "is not of this program and would be replaced: move it, or give another --output_dir" in said
    assert (tmp_path / "output/report.md").read_text() == "# Mine\n" and not (tmp_path / "output/figures").exists()


def test_papers_table_has_last_best_and_published_scores_of_each_task(make):
    """By hand from results/published/lora2_table1_deberta_v3_base.json; its note tells of the average."""
    tasks = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
    lines = [
        line(label, task, seed, [0.6, 0.5 + seed / 100], model="deberta-v3-base", arguments={"method_config": config})
        for label, config in (("LoRA r=8", "lora"), ("LoRA² k=8", "lora2"))
        for task in tasks
        for seed in (1, 2)
    ]
    page = make(lines)[1]
    assert "Published: AdaLoRA" not in page
    part = page[page.index("### QQP") : page.index("### STS-B")]
    assert re.search(
        r"\| method +\| +last evaluation \| +best evaluation \| +published \| +seeds \| +minus LoRA r=8", part
    )
    assert re.search(r"\| LoRA² k=8 +\| +51\.5 ± 0\.7 \| +60\.00 \| +92\.25 \| +2 \| +\+0\.00 \|", part)
    assert re.search(r"\| LoRA² k=8 .*\| +51\.50 \| +60\.00 \| +89\.60 \| +89\.68 \| +\+0\.00", page)
    assert page.count("The printed average of lora2 k=8 (89.68)") == 1 and "average 89.43" in page
    fewer = [each for each in lines if each["task"] != "rte"]
    assert "as printed" not in make(fewer)[1]  # the paper's average has this task
    own = {"model": "deberta-v3-base", "arguments": {"method_config": "lora2"}}
    same = [line(label, "rte", 1, [0.5], **own) for label in "ab"]
    assert "published" not in make(same)[1]  # neither is the paper's row
    small = {"model": "deberta-v3-base", "arguments": {"method_config": "hadapter_m8"}}
    page = make([line("Houlsby", "rte", 1, [0.5], **small)])[1]
    assert re.search(r"\| Houlsby +\| +50\.0 \| +50\.00 \| +83\.39 \|", page) and "Published: LoRA" not in page


def tuned(rates, **changes):
    """Tuning runs of one row: rate → held-out score, None for a run that ended early."""
    return [
        line(f"LoRA r=8, learning_rate={rate:g}", "rte", 201, [score or 0.0], **changes | {
            "axes": {"row": "LoRA r=8", "learning_rate": rate, "task_name": "rte"},
            "arguments": {"learning_rate": rate, "holdout_fraction": 0.1},
            "status": "finished" if score else "failed"})
        for rate, score in rates.items()
    ]  # fmt: skip


def test_tuning_is_shown_with_its_experiment_and_alone(make):
    rates = {1e-3: 0.5, 2e-3: 0.7, 4e-3: 0.6, 8e-3: None}
    for page in (make([line("LoRA r=8", "rte", 1, [0.5])], trial_tuning=tuned(rates))[1], make([])[1]):
        rows = re.findall(r"^\| LoRA r=8 \| +(0\.\d+) \| +(\S+) \|.*\| +(\w*) \|$", page, re.M)
        assert [float(each[0]) for each in rows] == list(rates)
        assert [each[1] for each in rows] == ["50.0", "70.0", "60.0", "–"] and rows[1][2] == "chosen"
        assert "## trial\n" in page and "## trial_tuning" not in page
    assert "No run has finished." in page
    figure = drawn(tuned(rates), tuned(rates))["rates"]
    (panel,) = figure.figure.axes
    assert panel.get_title(loc="left") == "RTE"
    assert figure.figure.get_suptitle() == "minilm: held-out score against the learning rate, 1 seed"
    lines = [(list(each.get_xdata()), list(each.get_ydata())) for each in panel.get_lines()]
    assert [text.get_text() for text in figure.figure.legends[0].get_texts()] == ["LoRA r=8", "failed run"]
    assert lines == [([1e-3, 2e-3, 4e-3], [50, 70, 60]), ([8e-3], [0])]


def test_failed_runs_are_counted_and_those_without_a_score_are_named(make, tmp_path):
    lost = line("LoRA r=8", "cola", 3, [0.1], training_loss=[0.6] * 20, constant_loss=0.6)
    crashed = line("LoRA r=8", "cola", 4, [0.1], status="failed", error="boom")
    whole = [line("LoRA r=8", "cola", s, [0.5]) for s in (1, 2)]
    page = make([*whole, lost, crashed, line("LoRA² k=8", "cola", 1, [0.6])])[1]
    row = scores(tmp_path).set_index(["row", "task"]).loc["LoRA r=8", "cola"]
    assert (row.failed, row.runs, row.finished) == (2, 4, 3) and row.score == pytest.approx(110 / 3)
    ended = "- 1 of 5 runs ended early and have no score: LoRA r=8 on CoLA.\n"
    assert f"{ended}- LoRA² k=8: the difference is over " in page
    equal = [each | {"label": "b", "run": each["run"] + "b"} for each in whole]
    assert "is over the seeds" not in make([*whole, *equal])[1]


def test_experiment_without_a_finished_run_says_so(make, tmp_path):
    ended = {"status": "failed", "evaluations": None, "last": None}
    page = make([line("LoRA r=8", "rte", 1, [0.5])], bad=[line("AdaLoRA", "rte", 1, [0.5], **ended)])[1]
    part = "No run has finished.\n\n- 1 of 1 runs ended early and have no score: AdaLoRA on RTE.\n"
    assert f"## bad\n\n{part}\n## trial\n" in page
    page = make([line("LoRA r=8", "rte", 1, [0.5])], bad=[], bad_tuning=tuned({1e-3: None, 2e-3: None}))[1]
    assert "## bad\n\nNo run has finished.\n\n- No learning rate for LoRA r=8: " in page and "chosen |" not in page


def test_a_sweep_warns_of_rows_that_differ_in_their_scale_if_they_are_not_tuned():
    grid = {"method": ["lora", "lora_r1", "full"], "task_name": ["rte"], "seed": [1]}
    base = {"model_name_or_path": "encoder"}
    fixed, equal = base | {"learning_rate": 1e-3}, {"when": {"method": "lora_r1"}, "set": {"lora_alpha": 2}}
    (warning,) = unlike_scales(make_experiment("own", grid, base=fixed).runs)
    assert warning.endswith("not equal steps (RTE: LoRA 2, LoRA r1 16).")
    assert unlike_scales(make_experiment("own", grid, base=fixed, overrides=[equal]).runs) == []
    assert unlike_scales(make_experiment("own", grid, base=base, tune={"learning_rate": [1e-3, 2e-3]}).runs) == []


def test_answer_names_the_better_method_and_the_difference():
    def said(scores, **changes):
        lines = [
            line(label, "rte", s, [0.4, 0.5, x], **changes) for label, own in scores.items() for s, x in enumerate(own)
        ]
        runs = as_frame(lines)
        return " ".join([answer(score_frame(runs, references(runs)), runs), *advice(runs)])

    clear = {"LoRA r=8": [0.50, 0.51, 0.52], "LoRA² k=8": [0.60, 0.612, 0.618]}
    assert said(clear).startswith("LoRA² k=8 scores 10.00 points higher than LoRA r=8 (95 % interval ")
    swapped = dict(zip(clear, reversed(clear.values()), strict=True))
    assert said(swapped).startswith("LoRA² k=8 scores 10.00 points lower than LoRA r=8 (95 % interval ")
    assert "LoRA² k=8 still rose by 11.00 points at its last evaluation: train it longer." in said(clear)
    noisy = {"LoRA r=8": [0.50, 0.40, 0.45], "AdaLoRA": [0.51, 0.42, 0.45], "LoRA² k=8": [0.44, 0.50, 0.46]}
    assert said(noisy).startswith("No difference shown between LoRA r=8 and AdaLoRA, LoRA² k=8.")
    single = {label: own[:1] for label, own in noisy.items()}
    assert said(single).startswith("No difference shown between LoRA r=8 and AdaLoRA, LoRA² k=8; give more seeds.")
    one = noisy | {"LoRA² k=8": [0.44], "AdaLoRA": noisy["LoRA r=8"]}  # equal scores have no interval either
    assert "LoRA r=8 and AdaLoRA, LoRA² k=8; give more seeds to LoRA² k=8." in said(one)
    assert said({label: [0.5] * 3 for label in clear}).startswith("All runs score 50.0: the task is too easy, they ")
    lost = {"training_loss": [0.6] * 20, "constant_loss": 0.6}
    assert "3 of 3 runs of LoRA r=8 learned nothing: tune its learning rate" in said(clear, **lost)


def test_score_axis_ends_at_100_and_a_single_evaluation_has_no_curve():
    lines = [line("_LoRA", "rte", s, [first, 1.0]) for s, first in enumerate((0.7, 0.8, 0.85, 0.9))]
    (curves,) = drawn(lines).values()
    assert curves.figure.axes[0].get_ylim()[1] == 100
    assert curves.figure.axes[0].get_lines()[0].get_xydata().tolist() == [[100, 82.5], [200, 100]]  # medians
    (named,) = curves.figure.legends[0].get_texts()
    assert named.get_text() == "_LoRA"  # matplotlib itself leaves out a name that begins with _
    assert drawn([each | {"evaluations": line("", "rte", 1, [0.9])["evaluations"]} for each in lines]) == {}


def test_a_row_keeps_its_colour_in_every_figure():
    tuning = tuned({1e-3: 0.5, 2e-3: 0.6})
    figures = drawn([line(each["label"], "rte", each["seed"], each["evaluations"][each["metric"]])
                     for each in trial() if each["label"] != "AdaLoRA" and each["task"] == "cola"], tuning)  # fmt: skip
    colours = {}
    for kind in ("differences", "curves", "rates"):
        axes, legends = figures[kind].figure.axes[0], figures[kind].figure.legends
        names = [text.get_text() for text in axes.get_yticklabels()] if kind == "differences" else (
            [text.get_text() for text in legends[0].get_texts()])  # fmt: skip
        drawn_lines = [each for each in axes.get_lines() if each.get_marker() in "osD^vPX"]
        for name, each in zip(names, drawn_lines, strict=True):
            colours.setdefault(name.partition(" − ")[0], set()).add((each.get_color(), each.get_marker()))
    assert set(colours) == {"LoRA r=8", "LoRA r=1", "LoRA² k=8", "LoRA² k=1"}
    assert all(len(looks) == 1 for looks in colours.values()) and len(set.union(*colours.values())) == 4
