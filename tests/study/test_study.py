"""The study's own statistics, each against a formula or SciPy, its rules, and its page."""

import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import optimize, stats

from nlu import ROOT
from nlu.experiments.experiment import load_experiment
from nlu.experiments.figures import Drawing
from nlu.experiments.statistics import Estimate, as_frame, load_measured, paired
from results.study import make as study
from results.study.inference import (
    FREEDOM,
    failure_interval,
    fitted_difference,
    holm,
    p_value,
    student_t,
    verdict,
)
from results.study.questions import load_questions
from results.study.runs import tuning_table, with_reruns
from tests.nlu.measured_lines import line, trial, write

QUESTIONS = {
    "questions": [
        {
            "question": "Does the larger one score more on {tasks}, {why}?",
            "experiment": "trial",
            "against": ["LoRA r=8", "LoRA r=1"],
            "claims": [
                {"label": "LoRA² k=8", "expect": "higher", "published": 1.05, "source": "T. 1"},
                {"label": "LoRA² k=8", "against": "LoRA r=1", "expect": "level"},
                {"label": "absent", "expect": "level"},
                {"label": "absent", "expect": "higher"},
            ],
        },
    ],
}


@pytest.fixture
def make(tmp_path, capsys, monkeypatch):
    """A function that writes lines and questions, makes the page: (exit code, stdout, stderr). Figures are empty."""
    monkeypatch.setattr(Drawing, "png", lambda _: b"")

    def call(lines, questions=QUESTIONS):
        write(tmp_path / "measured", "trial", lines)
        (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
        places = {
            "measured_dir": tmp_path / "measured",
            "output_dir": tmp_path,
            "questions": tmp_path / "questions.yaml",
        }
        return (study.main([f"--{name}={place}" for name, place in places.items()]), *capsys.readouterr())

    return call


def scores(folder):
    return pd.read_csv(folder / "tables/scores.csv")


def test_committed_page_and_tables_match_the_records(tmp_path, monkeypatch):
    """Figures are left out: their bytes depend on the version of matplotlib."""
    monkeypatch.setattr(Drawing, "png", lambda *_: b"")
    assert study.main(["--output_dir", str(tmp_path)]) == 0
    for made in [tmp_path / "README.md", *sorted((tmp_path / "tables").iterdir())]:
        committed = ROOT / "results" / made.relative_to(tmp_path)
        assert committed.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), made.name


def test_finals_of_the_base_size_have_the_learning_rates_that_its_tuning_gives():
    tuning = tuning_table(load_measured(ROOT / "results/measured")["base_tuning"])
    finals = load_experiment(ROOT / "configs/experiments/base.yaml", {"model_name_or_path": "encoder"}).runs
    chosen = tuning[tuning.chosen].set_index("row").value
    assert {run.axes["row"]: run.arguments["learning_rate"] for run in finals} == dict(chosen)


def test_every_claim_names_rows_that_its_experiment_has():
    for question in load_questions(ROOT / "results/study/questions.yaml"):
        path = ROOT / f"configs/experiments/{question.experiment}.yaml"
        runs = load_experiment(path, {"model_name_or_path": "m"}).runs
        known = {run.label for run in runs}
        asked = {name for claim in question.claims for name in (claim.label, claim.against) if name}
        assert asked | set(question.against) <= known, question.question


def test_the_tool_does_not_know_the_study():
    words = "results[./]study|holm|clopper|student_t"
    assert subprocess.run(["grep", "-rniE", "--include=*.py", words, ROOT / "nlu"]).returncode == 1  # none is found


def test_student_t_maximises_the_likelihood_and_a_failed_run_has_little_weight():
    scores = {"LoRA r=8": [0.50, 0.52, 0.49, 0.51, 0.10], "LoRA² k=8": [0.53, 0.55, 0.51, 0.54, 0.52]}
    runs = as_frame(line(name, "cola", i, [each]) for name, own in scores.items() for i, each in enumerate(own, 1))
    fit = student_t(runs)
    values = 100 * np.array(list(scores.values()))

    def loss(centres):  # at the scale of the fit
        scale = (5 * fit.variance.iloc[0] * (FREEDOM + 1) / (FREEDOM + 3)) ** 0.5
        return -stats.t.logpdf(values, FREEDOM, np.array(centres)[:, None], scale).sum()

    best = optimize.minimize(loss, np.median(values, axis=1)).x
    assert list(fit.centre) == pytest.approx(list(best), abs=1e-3) and list(fit.freedom) == [10 - 2] * 2
    result = fitted_difference(fit, "LoRA² k=8", "LoRA r=8", ["cola"])
    normal = (2 * np.var(values, axis=1, ddof=1).mean() / 5) ** 0.5
    assert result.mean == pytest.approx(2.5, abs=0.3) and result.error < normal / 3
    assert student_t(runs[runs.seed == 1]) is None


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    unknown = holm([0.02, np.nan, np.nan])  # claims without runs count too
    assert unknown == pytest.approx([0.06, np.nan, np.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("mean", "error", "expect", "answer"),
    [
        (2.0, 0.5, "higher", "holds"),
        (-2.0, 0.5, "higher", "contradicted"),
        (0.1, 0.1, "higher", "no gain of 0.5"),
        (0.3, 1.0, "higher", "not shown"),
        (0.1, 0.1, "level", "holds"),
        (-2.0, 0.5, "level", "contradicted"),
        (0.5, 0.3, "not lower", "holds"),
        (-0.4, 0.3, "not lower", "not shown"),
        (2.0, np.nan, "higher", "not shown"),
    ],
)
def test_verdict_of_a_claim(mean, error, expect, answer):
    result = Estimate(mean, error, 12.0)
    assert verdict(result, expect, p_value(result, expect)) == answer


def test_rerun_gives_its_score_to_the_seed_of_the_failed_run():
    def run(label, seed, score, loss):
        return line(label, "cola", seed, [score], training_loss=[loss], constant_loss=0.6)

    scores = [(1, 0.5, 0.3), (2, 0.0, 0.6), (102, 0.52, 0.3)]
    planned = as_frame([run("LoRA r=8", *each) for each in scores] + [run("LoRA² k=8", s, 0.5, 0.3) for s in (1, 2)])
    assert set(planned.seed) == {1, 2, 102}  # where reruns are not part of the protocol
    runs = with_reruns(planned)
    assert list(runs[runs.failed].seed) == [2]  # it counts as failed, and keeps its rerun's score
    pairs = paired(runs, "LoRA r=8", "LoRA² k=8")
    assert dict(zip(pairs.seed, pairs.difference, strict=True)) == {1: 0.0, 2: 2.0}


def test_claims_are_listed_with_their_verdicts_and_those_not_measured_once(make, tmp_path):
    assert make(trial())[0] == 0
    page = (tmp_path / "README.md").read_text()
    # By hand: in both tasks 1.9, 2.0 and 2.1 points, so a standard error of 0.1 / √6, 4 degrees of freedom, t = 2.776.
    expected = "Holds: LoRA² k=8 scores higher than LoRA r=8. +2.00 (+1.89 to +2.11), p < 0.001; the paper has +1.05."
    assert f"## Does the larger one score more on CoLA and STS-B, {{why}}?\n\n- {expected}\n" in page
    assert "- Contradicted: LoRA² k=8 scores as LoRA r=1. −1.00 (" in page and "| claim |" not in page
    assert page.count("absent") == 1 and "Claimed and not measured yet: absent." in page


def test_failure_interval_by_the_beta_distribution():
    assert failure_interval(2, 4) == pytest.approx(stats.beta.ppf([0.025, 0.975], [2, 3], [3, 2]))


def test_question_has_no_table_before_its_last_run_has_ended_and_failed_ones_were_repeated(make, tmp_path):
    question = QUESTIONS["questions"][0] | {"runs": 12, "repeat_failed": True, "against": ["LoRA r=8"], "claims": []}
    lines = [each for each in trial() if each["label"] in ("LoRA r=8", "LoRA² k=8")]
    make(lines[:-1], questions={"questions": [question]})  # without the last seed of one row and task
    page = (tmp_path / "README.md").read_text()
    assert "score more on CoLA and STS-B, {why}? Measured so far: 11 of 12 runs (`" in page and "| LoRA" not in page
    assert not (tmp_path / "tables").exists()
    lost = lines[-1] | {"training_loss": [0.6] * 20, "constant_loss": 0.6}
    again = line("LoRA² k=8", "stsb", 103, [0.8], run="again")
    for more in ([], [again | {"status": "failed"}]):  # not repeated yet, and the repetition ended early
        make([*lines[:-1], lost, *more], questions={"questions": [question]})
        page = (tmp_path / "README.md").read_text()
        repeat = "" if more else f" To be repeated with seed + 100: {lost['run']}."
        assert f"11 of 12 runs (`configs/experiments/trial.yaml`). 1 run(s) failed.{repeat}\n" in page
        assert "| LoRA" not in page
    for more, shown in (([], True), ([line("LoRA r=8", "cola", 4, [0.5])], False)):  # another seed has begun
        make([*lines[:-1], lost, again, *more], questions={"questions": [question]})
        assert ("| LoRA² k=8 |" in (tmp_path / "README.md").read_text()) == shown


def test_an_experiment_that_is_being_tuned_is_an_open_question_without_a_score(make, tmp_path):
    question = {"question": "Which on {model}, on {tasks}?", "experiment": "which_method", "runs": 320}
    axes = {"task_name": "cola", "row": "BitFit", "learning_rate": 8e-4, "seed": 101}
    tried = line("BitFit, learning_rate=0.0008", "cola", 101, [0.4], run="cola-BitFit-learning_rate=0.0008-seed=101",
                 axes=axes, arguments={"learning_rate": 8e-4, "holdout_fraction": 0.1})  # fmt: skip
    further = tried | {"run": "cola-BitFit-learning_rate=0.0128-seed=101", "label": "BitFit, learning_rate=0.0128"}
    for lines, counts in (([tried], "1 of 256"), ([tried, further], "2 of 257")):  # of a grid that has grown
        write(tmp_path / "measured", "which_method_tuning", lines)
        assert make([], {"questions": [question]})[0] == 0
        page = (tmp_path / "README.md").read_text()
        assert f"- Which on minilm, on CoLA? Measured so far: {counts} tuning runs (`configs/" in page
        assert "40.0" not in page and not (tmp_path / "tables").exists()


def test_question_whose_runs_have_all_failed_is_open(make, tmp_path):
    make([line("LoRA r=8", "cola", 1, [0.5], status="failed")])
    page = (tmp_path / "README.md").read_text()
    assert "score more on its tasks, {why}? Measured so far: 0 of 1 runs (`" in page and "1 run(s) failed." in page


def test_claim_that_expects_something_unknown_is_refused(make):
    claims = [{"label": "LoRA² k=8", "expect": "lower"}]
    code, _, said = make(trial(), questions={"questions": [QUESTIONS["questions"][0] | {"claims": claims}]})
    assert code == 2 and "expect: lower is none of higher, not lower, level" in said


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
    lines[0]["arguments"]["max_predict_samples"] = 10
    code, _, said = make(lines, questions={"questions": [question]})
    assert code == 2 and "mrpc: the runs have test scores of different rows" in said
    del lines[0]["test_scores"]
    make(lines, questions={"questions": [question]})
    assert "Measured so far: 3 of 4 runs" in (tmp_path / "README.md").read_text()
