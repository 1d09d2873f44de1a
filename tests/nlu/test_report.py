"""The report: tables under their questions, figures, formats, and the published tables apart."""

import csv
import json
import math
import re
from copy import deepcopy
from html.parser import HTMLParser

import pytest
import yaml
from scipy import stats

from nlu import report
from nlu.experiments import figures
from tests.nlu.measured_lines import PUBLISHED, QUESTIONS, line, trial, write


@pytest.fixture
def make(tmp_path, capsys):
    """Write lines and questions, run the report; returns (exit code, stdout, stderr)."""
    (tmp_path / "published").mkdir()
    name = "lora2_table1_deberta_v3_base.json"
    (tmp_path / "published" / name).write_bytes((PUBLISHED / name).read_bytes())

    def call(lines, *flags, experiment="trial", questions=QUESTIONS):
        write(tmp_path / "measured", experiment, lines)
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump(questions))
        places = {"measured_dir": "measured", "published_dir": "published", "claims": "claims.yaml"}
        given = [word for flag, name in places.items() for word in (f"--{flag}", str(tmp_path / name))]
        code = report.main([*given, *flags])
        return (code, *capsys.readouterr())

    return call


def test_the_page_answers_each_question_with_its_tables_and_figures(make, tmp_path):
    assert make(trial())[0] == 0
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n") < 250
    headings = re.findall(r"^## (.*)", page, re.M)
    assert headings == ["Does the larger one score more?", "Open questions"]
    answer = page.split("## ")[1].split("\n")[2]
    # By hand: in both tasks 1.9, 2.0 and 2.1 points, so an error of 0.1 / √6 with 4 degrees of freedom (t = 2.776).
    assert answer.startswith("LoRA² k=8 − LoRA r=8: +2.00 points (95 % interval +1.89 to +2.11), holds.")
    assert "2 run(s) failed and have no score." in answer
    assert "- Claims without pairs of finished runs, which count in the correction: LoRA² k=8 − absent." in page
    open_questions = page.partition("\n## Open questions\n")[2].strip()
    assert open_questions.startswith("- And elsewhere? ") and "\n" not in open_questions
    assert open_questions.endswith("Not measured yet. Run `python nlu/sweep.py configs/experiments/recipe.yaml`.")
    shown = re.findall(r"\(figures/(\w+\.png)\)", page)
    assert shown == ["trial_parameters.png", "trial_curves.png", "trial_rates.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(shown)
    published = (tmp_path / "published/README.md").read_text()
    assert "89.43 †" in published and "89.43" not in page and "80.6" not in published


def test_the_same_lines_give_the_same_bytes_and_what_is_drawn_no_more_goes(make, tmp_path):
    make(trial())
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    make(trial()[::-1])
    assert all(path.read_bytes() == content for path, content in first.items() if path.suffix in (".md", ".png"))
    make([each for each in trial() if each["stage"] == "final"])
    assert not (tmp_path / "figures/trial_rates.png").exists() and (tmp_path / "figures/trial_curves.png").exists()


@pytest.mark.parametrize(
    ("form", "made"),
    [("csv", "tables/trial_claims.csv"), ("latex", "tables/trial_scores.tex"), ("svg", "figures/trial_curves.svg"),
     ("html", "report.html")],
)  # fmt: skip
def test_other_formats_are_made_on_request(make, tmp_path, form, made):
    assert make(trial(2), "--format", form)[0] == 0
    assert not (tmp_path / "README.md").exists() and not list(tmp_path.rglob("*.png"))
    text = (tmp_path / made).read_text()
    if form == "csv":
        row = next(csv.DictReader(text.splitlines()))
        assert (float(row["difference"]), row["published"], row["verdict"]) == (pytest.approx(2), "1.05", "holds")
    elif form == "latex":
        assert "**" not in (tmp_path / "tables/trial_claims.tex").read_text()
        assert r"LoRA\textsuperscript{2} k=8" in text and text.count(r"\\") == 1 + 5
    elif form == "html":
        _Checked().feed(text)
        assert text.index("Does the larger one score more?") < text.index('class="finding"') < text.index("<table")
        assert 'name="viewport"' in text and text.count('<div class="scroll"') == text.count("<table") > 0
        assert "img { max-width: 100%; }" in text and all(colour in text for colour in figures.COLOURS[1:3])
        assert "http" not in re.sub(r"base64,[^\"]*", "", text)


class _Checked(HTMLParser):
    """Every element that is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_only_prints_one_experiment_and_writes_nothing(make, tmp_path):
    write(tmp_path / "measured", "other", [line("LoRA r=8", "cola", 1, [0.1])])
    code, out, _ = make(trial(2), "--only", "other")
    assert code == 0 and "## What did the experiment other measure?" in out and "larger" not in out
    assert "\nLoRA r=8: 10.00." in out and "Highest" not in out  # of one row nothing is the highest
    write(tmp_path / "measured", "both", [line(label, "cola", 1, [score]) for label, score in (("a", 0.1), ("b", 0.2))])
    assert "\nHighest average: b, 20.00." in make(trial(2), "--only", "both")[1]


def test_rows_of_different_data_files_are_not_ranked(make, tmp_path):
    def said(*lines):
        write(tmp_path / "measured", "own", [line(label, "custom", seed, [0.1], **more) for label, seed, more in lines])
        return make(trial(2), "--only", "own")[1]

    different = "\nThe rows are of different data files, and are not ranked."
    easy, hard = ({"asked": {"train_file": f"{name}.csv"}} for name in ("easy", "hard"))
    assert different in said(("LoRA, easy", 1, easy), ("LoRA, hard", 1, hard))
    same_name = [easy | {"digests": {"train_file": digest}} for digest in "ab"]
    assert different in said(("LoRA, a", 1, same_name[0]), ("LoRA, b", 1, same_name[1]))
    assert make(trial(2))[0] == 0 and not (tmp_path / "figures/own_parameters.png").exists()
    folds = [(label, seed, fold) for label in ("a", "b") for seed, fold in ((1, easy), (2, hard))]
    assert "Highest average: a" in said(*folds)
    code, _, err = make(trial(2), "--only", "nothing")
    assert code == 2 and "--only nothing" in err


def test_rows_that_tie_are_named_together(make, tmp_path):
    lines = [line(label, "cola", 1, [score]) for label, score in (("a", 0.0), ("b", -0.1), ("c", 0.0))]
    write(tmp_path / "measured", "tied", lines)
    assert "\nHighest average: a and c, 0.00.\n" in make(trial(2), "--only", "tied")[1]
    assert make(trial(2))[0] == 0
    assert "Highest: a and c, 0.00." in (tmp_path / "README.md").read_text()


def test_only_corrects_p_for_all_claims_too(make, tmp_path):
    lines = [line("LoRA² k=8", "cola", s, [0.5 + s * s / 100]) for s in (1, 2, 3)]
    lines += [line("LoRA r=8", "cola", s, [0.45]) for s in (1, 2, 3)]
    write(tmp_path / "measured", "elsewhere", lines)
    claims = [QUESTIONS["questions"][0], {**deepcopy(QUESTIONS["questions"][0]), "experiments": ["elsewhere"]}]
    _, out, _ = make(lines, "--only", "trial", questions={"questions": claims})
    row = next(row for row in out.splitlines() if row.startswith("| LoRA² k=8 − LoRA r=8"))
    assert make(lines, questions={"questions": claims})[0] == 0
    assert row in (tmp_path / "README.md").read_text()
    make(lines, questions={"questions": claims[:1]})
    assert row not in (tmp_path / "README.md").read_text()  # one claim alone is not corrected


def test_one_failing_figure_does_not_stop_the_others(make, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("'yerr' must not contain negative values")

    monkeypatch.setattr(figures, "_parameters", fail)
    code, _, err = make(trial(2))
    assert code == 1 and "error: the figure trial_parameters was not drawn: 'yerr' must not" in err
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["trial_curves.png", "trial_rates.png"]
    assert "trial_parameters" not in (tmp_path / "README.md").read_text()


def test_experiments_of_like_names_have_tables_of_their_own_and_failures_are_counted(make, tmp_path):
    failed = [line("LoRA r=8", "cola", 1, [0.1], status="failed", error="boom")]
    low, high = ([line("LoRA r=8", "cola", 1, [score])] for score in (0.2, 0.7))
    for name, lines in (("my-exp", low), ("My exp", high), ("none", failed)):
        write(tmp_path / "measured", name, lines)
    assert make(trial(), "--format", "csv", questions={"questions": []})[0] == 0
    found = {
        path.name: float(next(csv.DictReader(path.open()))["cola"])
        for path in tmp_path.glob("tables/*y_exp*_scores.csv")
    }
    assert found == {"My_exp_1_scores.csv": 70.0, "my_exp_2_scores.csv": 20.0}
    assert make(trial(), questions={"questions": []})[0] == 0
    page = (tmp_path / "README.md").read_text()
    assert "Not measured yet. 1 run(s) failed and have no score.\n" in page  # and names no file that is not there


def test_several_experiments_are_compared_together(make, tmp_path):
    write(tmp_path / "measured", "second", [line("LoRA² k=8", "cola", s, [0.5 + s / 100]) for s in (1, 2)])
    question = {**QUESTIONS["questions"][0], "experiments": ["first", "second"]}
    lines = [line("LoRA r=8", "cola", s, [0.4 + s / 100]) for s in (1, 2)]
    code, out, _ = make(lines, "--only", "second", experiment="first", questions={"questions": [question]})
    assert code == 0 and "LoRA² k=8 − LoRA r=8: +10.00 points" in out


def test_a_run_counts_once_however_many_experiments_have_it(make, tmp_path):
    lines = [
        line(label, "cola", s, [x + s / 100]) for label, x in (("LoRA r=8", 0.4), ("LoRA² k=8", 0.5)) for s in (1, 2)
    ]
    copies = [each | {"taken_over_from": f"first/{each['run']}"} for each in lines]
    question = {**QUESTIONS["questions"][0], "experiments": ["first", "second"]}
    for second, code in ((copies, 0), (lines, 2)):
        write(tmp_path / "measured", "second", second)
        shown = make(lines, "--only", "first", experiment="first", questions={"questions": [question]})
        assert shown[0] == code
        if code == 0:
            assert re.search(r"\| all tasks +\| +\+1\.05 \| +2 \|", shown[1])
        else:
            assert "both have LoRA r=8 on cola with seed 1" in shown[2] and shown[2].count("\n") == 1


def test_a_tuning_run_counts_once_too(make, tmp_path):
    copies = [each | {"taken_over_from": f"first/{each['run']}"} for each in trial()]
    write(tmp_path / "measured", "second", copies)
    question = {"question": "Which?", "experiments": ["first", "second"]}
    for experiments in (["first"], ["first", "second"]):
        questions = {"questions": [question | {"experiments": experiments}]}
        code, out, _ = make(trial(), "--only", "first", experiment="first", questions=questions)
        assert code == 0 and re.search(r"\| LoRA r=8 .* 2 of 8 \|", out), out


def test_the_same_claim_of_two_experiments_has_a_verdict_for_each(make, tmp_path):
    """Ten points in each of three seeds hold, whatever the other experiment's runs say."""
    scores = {"LoRA r=8": (0.5, 0.51, 0.52), "LoRA² k=8": (0.6, 0.6101, 0.6199)}
    clear = [line(label, "cola", s, [each[s]]) for label, each in scores.items() for s in range(3)]
    noise = [line(label, "cola", s, [(s * k) % 3 / 10]) for k, label in enumerate(scores, 1) for s in range(3)]
    write(tmp_path / "measured", "noise", noise)
    claim = {"label": "LoRA² k=8", "against": "LoRA r=8", "expect": "higher"}
    asked = [{"question": name, "experiments": [name], "claims": [claim | {}]} for name in ("trial", "noise")]
    assert make(clear, questions={"questions": asked})[0] == 0
    answers = re.findall(r"^LoRA² k=8 − LoRA r=8: .* (holds|not shown)\.$", (tmp_path / "README.md").read_text(), re.M)
    assert answers == ["holds", "not shown"]


def test_each_row_takes_a_value_of_an_axis_by_its_loss_and_is_compared_with_one_row(make, tmp_path):
    """By hand: at the chosen rates the other row has e^-0.03 and e^-0.09 times the loss, and 10 points more."""
    lines = []
    for row, rates in (("plus", {"low": (1e-3, 1.0, 0.4), "high": (2e-3, 0.5, 0.3)}),
                       ("other", {"low": (1e-3, 0.0, 0.4), "high": (4e-3, 2.0, 0.9)})):  # fmt: skip
        for place, (rate, loss, score) in rates.items():
            for seed in (1, 2):
                for task, less in (("cola", 0.03), ("stsb", 0.09)):
                    end = loss or 0.5 * math.exp(-less + (seed - 1.5) / 100)
                    axes = {"row": row, "rate": place, "task_name": task, "seed": seed}
                    lines.append(line(f"{row}, {place}", task, seed, [score], axes=axes, tried={}))
                    lines[-1]["run"] = "-".join(map(str, axes.values()))
                    lines[-1]["asked"] |= {"method": "lora2", "head_learning_rate": 2 * rate, "learning_rate": rate}
                    lines[-1]["evaluations"]["loss"] = [end]
    question = {"question": "Which part helps?", "experiments": ["trial"], "tuned": "rate", "against": "plus"}
    assert make(lines, "--format", "csv", questions={"questions": [question]})[0] == 0
    read = {path.stem: list(csv.DictReader(path.open())) for path in (tmp_path / "tables").iterdir()}
    other, plus = sorted(read["trial_against"], key=lambda row: row["row"])
    assert plus["loss_change"] == "" and plus["runs"] == "4" and float(plus["cola"]) == 30
    changes = [float(other[name]) for name in ("loss_change", "loss_low", "loss_high", "difference")]
    # Two strata of two pairs each, ±0.005 around -0.03 and -0.09: each mean has the error 0.005.
    half = stats.t.ppf(0.975, 2) * math.hypot(0.005, 0.005) / 2
    assert changes == pytest.approx([*(100 * math.expm1(-0.06 + side * half) for side in (0, -1, 1)), 10], abs=1e-4)
    assert plus["cola_chosen"] == "head_learning_rate=0.004, learning_rate=0.002"
    assert other["cola_chosen"] == "head_learning_rate=0.002, learning_rate=0.001"
    make(lines, questions={"questions": [question]})
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["trial_against.png"]
    page = (tmp_path / "README.md").read_text()
    assert "Lowest loss: other, −5.8 % against plus (95 % interval −7.2 to −4.4)." in page
    assert "| 30.0 ± 0.0 at head_learning_rate=0.004, 0.002 |" in page and "**Tuning**" not in page
    make(lines, questions={"questions": [question | {"against": "other"}]})
    page = (tmp_path / "README.md").read_text()
    assert "No row has a lower loss than other. The nearest is plus, +6.2 %" in page and "of them: plus." in page
    make(lines, questions={"questions": [question | {"against": "plsu"}]})
    assert "No run of plsu has finished yet, only of other, plus." in (tmp_path / "README.md").read_text()
    code, _, said = make(lines, questions={"questions": [question | {"tuned": "rat"}]})
    assert code == 2 and "no run has the axis 'rat'; the axes are row, rate, task_name, seed" in said


def test_only_a_value_whose_seeds_have_all_finished_is_chosen_and_for_its_own_question_alone(make, tmp_path):
    lines = []
    for rate, loss in ((1, 0.5), (2, 0.1)):
        for seed in (1, 2):
            lost = {"status": "failed", "error": "lost"} if (rate, seed) == (2, 2) else {}
            axes = {"row": "a", "rate": rate, "seed": seed}
            lines.append(line(f"a, rate={rate}", "cola", seed, [rate / 10], axes=axes, tried={}, **lost))
            lines[-1]["run"], lines[-1]["evaluations"]["loss"] = f"a-{rate}-{seed}", [loss]
            lines[-1]["asked"]["learning_rate"] = rate / 1000
    asked = {"question": "Tuned?", "experiments": ["trial"], "tuned": "rate"}
    questions = {"questions": [asked, {"question": "How far does it matter?", "experiments": ["trial"]}]}
    assert make(lines, "--format", "csv", questions=questions)[0] == 0
    read = {path.stem: list(csv.DictReader(path.open())) for path in (tmp_path / "tables").iterdir()}
    assert [(row["row"], row["seeds_least"]) for row in read["trial_1_scores"]] == [("a", "2")]
    assert {row["row"]: row["seeds_least"] for row in read["trial_2_scores"]} == {"a, rate=1": "2", "a, rate=2": "1"}
    make(lines, questions=questions)
    assert "On the validation set, which the scores above come from too" in (tmp_path / "README.md").read_text()


ASKED, CLAIM = {"question": "a", "experiments": ["b"]}, {"label": "x", "against": "y", "expect": "level"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question": []}, "('question' was unexpected)"),
        (
            {"questions": [{"question": "a", "experiments": ["b"], "claims": [
                {"label": "x", "against": "y", "expect": "more"}]}]},
            "expect: 'more' is not one of ['higher'",
        ),
        ({"questions": [ASKED | {"tuned": "seed"}]}, "seed names no axis that can be tuned"),
        ({"questions": [ASKED | {"claims": [CLAIM | {"label": "y"}]}]}, "a claims something of y against itself"),
        ({"questions": [ASKED | {"claims": [CLAIM], "against": "x"}]}, "its table against x does not show"),
    ],
)  # fmt: skip
def test_faulty_questions_are_refused_in_one_line(make, tmp_path, content, message):
    code, _, err = make(trial(1), questions=content)
    assert code == 2 and message in err and "claims.yaml" in err and err.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"method": "lora", "cola": "69.2"}]}, "rows.0.cola: 69.2 must be a number"),
        ({"rows": [{"cola": 69.2, "avg_printed": "69.2"}]}, "rows.0.avg_printed: 69.2 must be a number"),
        ({"rows": [{"cola": 69.2, "std": {"cola": None}}]}, "rows.0.std.cola: null must be a number"),
        ({"rows": []}, "rows"),
        ({"source": ""}, "source"),
        ({"column": ["cola"]}, "'column' was unexpected"),
        (None, "is absent; restore it from the repository"),
        ("{", "cannot be read (Expecting property name enclosed in double quotes: line 1"),
        ("[]", "does not hold a JSON object; restore it from the repository"),
    ],
)
def test_a_faulty_published_table_is_refused_in_one_line(make, tmp_path, change, message):
    path = tmp_path / "published/lora2_table1_deberta_v3_base.json"
    content = {"source": "A paper", "columns": ["cola"], "rows": [{"cola": 69.2}]}
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(content | change))
    code, _, err = make(trial(1))
    assert code == 2 and message in err and path.name in err and err.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_a_label_is_no_markdown(make, tmp_path):
    lines = [each | {"label": each["label"].replace("LoRA r=8", "LoRA *r|8*")} for each in trial(2)]
    questions = deepcopy(QUESTIONS)
    questions["questions"][0]["claims"][0]["against"] = "LoRA *r|8*"
    questions["questions"][0]["question"] = "Does *it*\n# score <b>more</b>?"
    assert make(lines, questions=questions)[0] == 0
    page = (tmp_path / "README.md").read_text()
    assert r"## Does \*it\* # score \<b>more\</b>?" in page
    assert page.count(r"LoRA \*r\|8\*") > 4 and "LoRA *r|8*" not in page


def test_a_page_that_is_no_report_stays(make, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    code, _, said = make(trial())
    assert code == 2 and "is no report, and would be replaced: give another --output_dir" in said
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and not (tmp_path / "figures").exists()
    assert [make(trial(), "--format", "html")[0] for _ in range(2)] == [0, 0]  # the second replaces the first
    (tmp_path / "report.html").write_text("mine")
    assert make(trial(), "--format", "html")[0] == 2 and (tmp_path / "report.html").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    (tmp_path / "published/README.md").write_text("mine")
    code, _, said = make(trial())
    assert code == 2 and "give another --published_dir" in said and not (tmp_path / "README.md").exists()
    assert make(trial(), questions={"questions": []})[0] == 0  # cites nothing
    assert (tmp_path / "published/README.md").read_text() == "mine"


def test_figures_of_yours_stay(make, tmp_path):
    make(trial())
    (tmp_path / "figures/mine.png").touch()
    make([each for each in trial() if each["stage"] == "final"])
    assert (tmp_path / "figures/mine.png").exists() and not (tmp_path / "figures/trial_rates.png").exists()


def test_an_installed_package_has_no_published_tables(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "PUBLISHED", tmp_path / "site-packages/results/published")
    write(tmp_path / "measured", "trial", trial())
    assert report.main(["--measured_dir", str(tmp_path / "measured")]) == 0, capsys.readouterr().err
    assert not (tmp_path / "site-packages").exists()
