"""The report: one table and one figure for each question, and the unrounded numbers in CSV files."""

import re

import pandas as pd
import pytest
import yaml
from scipy import stats

from nlu import report
from nlu.experiments.comparison import advice, answer
from nlu.experiments.figures import Drawing, draw
from nlu.experiments.statistics import as_frame
from nlu.experiments.tables import score_frame
from nlu.experiments.tuning import tuning_runs
from tests.nlu.measured_lines import QUESTIONS, line, trial, write


@pytest.fixture
def make(tmp_path, capsys, monkeypatch):
    """A function that writes lines and questions, runs the report: (exit code, stdout, stderr). Figures are empty."""
    monkeypatch.setattr(Drawing, "png", lambda _: b"")

    def call(lines, questions=QUESTIONS):
        write(tmp_path / "measured", "trial", lines)
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump(questions))
        code = report.main(["--measured_dir", str(tmp_path / "measured"), "--claims", str(tmp_path / "claims.yaml")])
        return (code, *capsys.readouterr())

    return call


def scores(folder):
    return pd.read_csv(folder / "tables/scores.csv")


def test_a_row_has_its_difference_and_the_verdicts_of_its_claims(make, tmp_path):
    """tests/test_docs.py compares a whole page."""
    assert make(trial())[0] == 0
    page = (tmp_path / "README.md").read_text()
    # By hand: in both tasks 1.9, 2.0 and 2.1 points, so a standard error of 0.1 / √6, 4 degrees of freedom, t = 2.776.
    assert re.search(
        r"^\| LoRA² k=8 +\| +336,672 \| +6 \| +\d+\.\d ± \d\.\d \|.*\| +LoRA r=8 \| +\+2.00 \(\+1.89 to \+2.11\) \|"
        r".*\| +higher: holds \(p < 0.001; paper \+1.05\);", page, re.M)  # fmt: skip
    assert "; level, against absent: not measured yet |" in page


def test_same_lines_give_the_same_bytes_and_outdated_figures_are_removed(make, tmp_path):
    make(trial())
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".md", ".csv")}
    for name in ("mine.png", "old_curves.png"):
        (tmp_path / f"figures/{name}").touch()
    with (tmp_path / "README.md").open("a") as page:
        page.write("[curves](figures/old_curves.png)")
    make(trial()[::-1])
    assert all(path.read_bytes() == content for path, content in first.items())
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"mine.png", "trial_differences.png", "trial_curves.png"}


def test_question_has_no_table_before_its_last_run_has_ended_and_failed_ones_were_repeated(make, tmp_path):
    question = QUESTIONS["questions"][0] | {"runs": 12, "against": ["LoRA r=8"], "claims": []}
    lines = [each for each in trial() if each["label"] in ("LoRA r=8", "LoRA² k=8")]
    make(lines[:-1], questions={"questions": [question]})  # without the last seed of one row and task
    page = (tmp_path / "README.md").read_text()
    assert "score more on CoLA and STS-B? Measured so far: 11 of 12 runs (`" in page and "| LoRA" not in page
    assert not (tmp_path / "tables").exists()
    lost = lines[-1] | {"training_loss": [0.6] * 20, "constant_loss": 0.6}
    again = lines[-1] | {"run": "again", "seed": 103}
    for more in ([], [again | {"status": "failed"}]):  # not repeated yet, and the repetition ended early
        make([*lines[:-1], lost, *more], questions={"questions": [question]})
        page = (tmp_path / "README.md").read_text()
        repeat = "" if more else f" To be repeated with seed + 100: {lost['run']}."
        assert f"11 of 12 runs (`configs/experiments/trial.yaml`). 1 run(s) failed.{repeat}\n" in page
        assert "| LoRA" not in page
    for more, shown in (([], True), ([lines[0] | {"run": "next", "seed": 4}], False)):  # another seed has begun
        make([*lines[:-1], lost, again, *more], questions={"questions": [question]})
        assert ("| LoRA² k=8 |" in (tmp_path / "README.md").read_text()) == shown
        assert (tmp_path / "tables/scores.csv").exists() == shown


def test_question_whose_runs_have_all_failed_is_open(make, tmp_path):
    make([line("LoRA r=8", "cola", 1, [0.5], status="failed")])
    page = (tmp_path / "README.md").read_text()
    assert "score more on its tasks? Measured so far: 0 of 1 runs (`" in page and "1 run(s) failed." in page


def test_claim_that_expects_something_unknown_is_refused(make):
    claims = [{"label": "LoRA² k=8", "expect": "lower"}]
    code, _, said = make(trial(), questions={"questions": [QUESTIONS["questions"][0] | {"claims": claims}]})
    assert code == 2 and "expect: lower is none of higher, not lower, level" in said


def test_headings_and_settings_come_from_the_lines(make, tmp_path, monkeypatch):
    """Runs with another model, for six steps and on 100 rows are not called the paper's table."""
    changes = {"steps": 6, "arguments": {"max_eval_samples": 100, "num_train_epochs": 3, "method_config": "lora2"}}
    lines = [line("LoRA² k=8", "rte", 1, [0.5], machine={"cpu": "AMD EPYC"}, **changes)]
    lines.append(line("AdaLoRA", "rte", 1, [0.5], steps=6, arguments={"num_train_epochs": 30, "max_steps": 6}))
    write(tmp_path / "output/measured", "own", lines)  # max_steps ends the second run before its epochs
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0  # the user's own runs, in the default folders
    page = (tmp_path / "output/README.md").read_text()
    assert "## How do the methods compare on RTE with minilm (own)?" in page and "RTE published" not in page
    assert "Measured: minilm; 3 epochs; 6 steps; at most 100 validation rows in some runs; 1 seed; AMD EPYC." in page


def test_published_scores_have_a_column_of_their_own(make, tmp_path):
    settings = {"model": "deberta-v3-base", "arguments": {"method_config": "lora2"}}
    make([line("LoRA² k=8", task, 1, [0.5], **settings) for task in ("qqp", "mnli", "rte")])
    shown = (tmp_path / "README.md").read_text()
    assert re.search(r"\| +RTE \| +RTE published \| +average", shown)
    assert re.search(r"\| +50\.0 \| +92\.25 \| +50\.0 \| +90\.43 \| +50\.0 \| +88\.45 \|", shown)  # LoRA², Table 1
    make([line(label, "rte", 1, [0.5], **settings) for label in ("all terms", "two terms")])
    assert "RTE published" not in (tmp_path / "README.md").read_text()  # neither is the paper's row


def test_a_task_may_be_scored_on_its_test_set(make, tmp_path):
    lines = [
        line(label, "mrpc", seed, [0.9], test_scores={"MRPC": {"accuracy": score + seed / 100}})
        for label, score in (("LoRA r=8", 0.7), ("LoRA² k=8", 0.75))
        for seed in (1, 2)
    ]
    question = {"question": "Which?", "experiment": "trial", "test": ["mrpc"], "against": ["LoRA r=8"]}
    assert make(lines, questions={"questions": [question]})[0] == 0
    row = scores(tmp_path).set_index("row").loc["LoRA² k=8"]
    assert [row[name] for name in ("mrpc", "mrpc_validation", "difference")] == pytest.approx([76.5, 90, 5])
    assert "MRPC validation" in (tmp_path / "README.md").read_text()
    lines[0]["arguments"] = {"max_predict_samples": 10}
    code, _, said = make(lines, questions={"questions": [question]})
    assert code == 2 and "mrpc: the runs have test scores of different rows" in said
    del lines[0]["test_scores"]
    make(lines, questions={"questions": [question]})
    assert "Measured so far: 3 of 4 runs" in (tmp_path / "README.md").read_text()


def test_grid_of_learning_rates_is_shown_with_the_chosen_one(make, tmp_path):
    scores = {1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7, 8e-3: None}
    lines = []
    for rate, score in scores.items():
        axes = {"row": "LoRA r=8", "learning_rate": rate, "task_name": "custom"}
        arguments = {"learning_rate": rate}
        status = "finished" if score else "failed"
        label = f"LoRA r=8, learning_rate={rate:g}"
        lines.append(line(label, "custom", 201, [score or 0.0], axes=axes, arguments=arguments, status=status))
    question = {"question": "Which rate on {tasks}, {why}?", "experiment": "trial"}
    make(lines, questions={"questions": [question]})
    assert "learning rate |" not in (tmp_path / "README.md").read_text()  # these are scores on the validation set
    lines = [each | {"arguments": each["arguments"] | {"holdout_fraction": 0.1}} for each in lines]
    assert make(lines, questions={"questions": [question | {"runs": 4}]})[0] == 0  # no run of a tuning is repeated
    page = (tmp_path / "README.md").read_text()
    assert "## Which rate on custom, {why}?" in page  # an unknown name stays as it is
    rows = re.findall(r"^\| LoRA r=8 \| +([\d.]+) \| +(\S+) \|.*\| +(\w*) \|$", page, re.M)
    marks = [("50.0", ""), ("60.0", ""), ("70.0", "chosen"), ("–", "discarded")]
    assert [each[1:] for each in rows] == marks and [float(each[0]) for each in rows] == list(scores)
    runs = as_frame(lines)
    (rates,) = draw(runs, score_frame(runs), tuning_runs(runs))
    (panel,) = rates.figure.axes
    assert panel.get_title(loc="left") == "custom: held-out score"
    drawn = [(list(each.get_xdata()), list(each.get_ydata())) for each in panel.get_lines()]
    assert [text.get_text() for text in rates.figure.legends[0].get_texts()] == ["LoRA r=8", "failed run"]
    assert rates.kind == "rates" and drawn == [([1e-3, 2e-3, 4e-3], [50, 60, 70]), ([8e-3], [0])]


def test_failed_runs_are_counted_and_a_crashed_one_has_no_score(make, tmp_path):
    lost = line("LoRA r=8", "cola", 3, [0.1], training_loss=[0.6] * 20, constant_loss=0.6)
    crashed = line("LoRA r=8", "cola", 4, [0.1], status="failed", error="boom")
    assert make([line("LoRA r=8", "cola", s, [0.5]) for s in (1, 103)] + [lost, crashed])[0] == 0  # 103 repeats no run
    row = scores(tmp_path).iloc[0]
    assert (row.failed, row.runs) == (2, 4) and row.cola == pytest.approx(110 / 3)
    assert [row.failed_low, row.failed_high] == pytest.approx(stats.beta.ppf([0.025, 0.975], [2, 3], [3, 2]), abs=1e-5)
    assert "1 run(s) ended early and have no score." in (tmp_path / "README.md").read_text()


def test_answer_names_the_better_method_and_difference_or_the_seeds_needed():
    def said(scores, **changes):
        lines = [
            line(label, "rte", s, [0.4, 0.5, x], **changes) for label, own in scores.items() for s, x in enumerate(own)
        ]
        runs = as_frame(lines)
        sentence = answer(score_frame(runs, ["LoRA r=8"]), runs)
        return " ".join([sentence, *advice(runs)])

    clear = {"LoRA r=8": [0.50, 0.51, 0.52], "LoRA² k=8": [0.60, 0.612, 0.618]}
    assert said(clear).startswith("LoRA² k=8 scores 10.00 points higher than LoRA r=8 (95 % interval ")
    swapped = dict(zip(clear, reversed(clear.values()), strict=True))
    assert said(swapped).startswith("LoRA² k=8 scores 10.00 points lower than LoRA r=8 (95 % interval ")
    assert "LoRA² k=8 still rose by 11.00 points at its last evaluation: train it longer." in said(clear)
    noisy = {"LoRA r=8": [0.50, 0.40, 0.45], "AdaLoRA": [0.51, 0.42, 0.45], "LoRA² k=8": [0.44, 0.50, 0.46]}
    assert said(noisy).startswith(
        "No difference shown between LoRA r=8 and AdaLoRA, LoRA² k=8; about 507 seeds would show one of 1 point."
    )
    steady = {"LoRA r=8": [0.707, 0.714, 0.721], "LoRA² k=8": [0.757, 0.764, 0.771]}
    assert said(steady).startswith("No difference shown between LoRA r=8 and LoRA² k=8; give more --seeds.")
    assert "All runs have the same score" in said({label: [0.5, 0.5, 0.5] for label in clear})
    lost = {"training_loss": [0.6] * 20, "constant_loss": 0.6}
    assert "3 of 3 runs of LoRA r=8 learned nothing: lower its learning rate, or tune it." in said(clear, **lost)
    started = "(Λ, the sum of the learning rates, is 0.2): train it longer, or raise its learning rate."
    assert f"3 of 3 runs of LoRA r=8 learned nothing {started}" in said(clear, **lost, rate_sum=0.2)
    assert "Λ" not in said(clear, rate_sum=0.2)  # the runs have learned something


def test_score_axis_ends_at_100_and_a_single_evaluation_has_no_curve():
    lines = [line("_LoRA", "rte", s, [first, 1.0]) for s, first in enumerate((0.7, 0.8, 0.85, 0.9))]
    runs = as_frame(lines)
    (curves,) = draw(runs, score_frame(runs), runs[:0])
    assert curves.figure.axes[0].get_ylim()[1] == 100
    assert curves.figure.axes[0].get_lines()[0].get_xydata().tolist() == [[100, 82.5], [200, 100]]  # medians
    (named,) = curves.figure.legends[0].get_texts()
    assert named.get_text() == "_LoRA"  # matplotlib itself leaves out a name that begins with _
    single = as_frame(each | {"evaluations": line("", "rte", 1, [0.9])["evaluations"]} for each in lines)
    assert draw(single, score_frame(single), single[:0]) == []


def test_live_ranks_are_drawn_for_each_row_that_prunes():
    ranks = {f"encoder.layer.{i}.attention.{name}": i + 1 for i in (0, 1) for name in ("query", "key")}
    lines = [line("LoRA² k=8", "rte", 1, [0.5, 0.6], module_ranks=ranks), line("LoRA r=8", "rte", 1, [0.5, 0.6])]
    runs = as_frame(lines)
    drawing = draw(runs, score_frame(runs), runs[:0])[-1]
    titles = [axes.get_title(loc="left") for axes in drawing.figure.axes]
    assert drawing.kind == "ranks" and titles == ["LoRA² k=8: singular values left"]
    assert sorted(text.get_text() for text in drawing.figure.axes[0].texts) == ["1.0", "1.0", "2.0", "2.0"]
    assert drawing.png()[:4] == b"\x89PNG"


def test_page_that_is_no_report_is_kept(make, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    code, _, said = make(trial())
    assert code == 2 and "was not written by report.py and would be replaced: give another --output_dir" in said
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and not (tmp_path / "figures").exists()
