"""The claims' table: which rows it compares, the published difference, the answer; how two orders of scores agree."""

import json
from pathlib import Path

import pytest
from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.claims import CLAIMS, agreement_table, claims_table, claims_tables, verdict
from nlu.experiments.files import load_experiment, run_label
from nlu.experiments.measured import Paired, load_measured
from nlu.experiments.tuned import TUNED, USUAL
from tests.nlu.records import write_record

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = REPOSITORY / "results/published"


def interval(low, high):
    return Paired([low, high], (low + high) / 2, (low, high), 0.5, 0.5)


@pytest.mark.parametrize(
    "bounds, no_loss, answer",
    [
        ((0.1, 2), False, "yes"), ((-0.1, 2), False, "not shown"), ((-2, -0.1), False, "no"),
        ((-0.4, 2), True, "yes"), ((-0.6, 2), True, "not shown"), ((-2, -0.1), True, "no"), ((-0.4, -0.1), True, "yes"),
    ],
)  # fmt: skip
def test_the_answer_follows_from_the_interval(bounds, no_loss, answer):
    assert verdict(interval(*bounds), no_loss) == answer


def test_one_pair_shows_nothing():
    assert verdict(Paired([3.0], 3.0, None, None, None), False) == "not shown"


def test_a_claim_has_the_published_and_the_measured_difference(tmp_path):
    scores = {"lora": (0.50, 0.52, 0.51), "lora2": (0.53, 0.54, 0.56), "adalora": (0.60, 0.40, 0.55)}
    for method, values in scores.items():
        for seed, score in enumerate(values):
            write_record(tmp_path / "evidence", method, "rte", seed, [score + 0.1, score])
    (experiment,) = load_measured(tmp_path)
    table = claims_table({"evidence": experiment}, PUBLISHED)
    first = table.data[0]
    assert (first["claim"], first["pairs"], first["tasks"]) == (CLAIMS[0].text, 3, "rte")
    differences = [3.0, 2.0, 5.0]
    low, high = stats.t.interval(0.95, 2, sum(differences) / 3, stats.sem(differences))
    assert first["difference_last"] == pytest.approx(10 / 3) == first["difference_best"]
    assert (first["low"], first["high"]) == (pytest.approx(low), pytest.approx(high))
    assert first["answer"] == "not shown" and low < 0  # 10/3 ± 3.8
    # Table 1's rows: k=8 averages 89.43 whatever is printed, LoRA r=8 88.38.
    assert first["published"] == pytest.approx(89.43 - 88.38, abs=0.02)
    assert [line["claim"] for line in table.data] == [claim.text for claim in CLAIMS[:2]]


def test_nothing_measured_is_no_table_and_a_lost_row_is_said(tmp_path):
    assert claims_tables([], PUBLISHED) == []
    for method in ("lora", "lora2"):
        write_record(tmp_path / "evidence", method, "rte", 1, [0.5])
    (experiment,) = load_measured(tmp_path)
    with pytest.raises(UsageError, match="lora2_table1"):
        claims_table({"evidence": experiment}, tmp_path)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_every_claim_names_rows_that_its_experiment_would_measure(claim):
    name = USUAL if claim.experiment == TUNED else claim.experiment  # whose rows keep their labels
    path = REPOSITORY / f"configs/experiments/{name}.yaml"
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    labels = {run_label(run.axes) for run in experiment.runs}
    assert {claim.row, claim.reference} <= labels


def test_agreement_of_two_orders(tmp_path):
    inner = {"a": [1.0, 2.0, 3.0, 4.0], "b": [0.5, 0.4, 0.3, 0.2]}
    full = {"a": [1.0, 2.0, 4.0, 3.0], "b": [9.0, 8.0, 7.0, 6.0]}
    for seed in (1, 2):
        write_record(
            tmp_path / "importance", "lora2", "rte", seed, [0.5], live_budget=4,
            importance_scores={"inner": inner, "full": full},
        )  # fmt: skip
    write_record(tmp_path / "importance", "lora2", "rte", 3, [0.5], importance_scores={"inner": inner})
    table = agreement_table(load_measured(tmp_path))
    (line,) = table.data
    assert line["runs"] == 2
    # Within a: one swap of neighbours among four, 1 − 6·2/(4·15) = 0.8; within b: 1.
    assert line["within_layers"] == pytest.approx(0.9)
    across = stats.spearmanr([*inner["a"], *inner["b"]], [*full["a"], *full["b"]]).statistic
    assert line["across_layers"] == pytest.approx(across) and across < 0
    assert line["same_survivors"] == 0  # inner keeps all of a, full all of b
    assert line["kept_by_both"] is None and table.rows[0][-1] == "–"  # no training with inner scores beside them
    assert json.dumps(table.rows)


def test_two_trainings_keep_the_same_values_or_not(tmp_path):
    scores = {"inner": {"a": [1.0, 2.0]}, "full": {"a": [2.0, 1.0]}}
    patterns = {"full": {"a": [True, True, False, False]}, "inner": {"a": [True, False, True, False]}}
    for importance in ("full", "inner"):
        axes = {"method": "lora2", "importance": importance, "task_name": "rte", "seed": 1}
        folder = write_record(
            tmp_path / "importance", "lora2", "rte", 1, [0.5], axes, live_budget=1, importance_scores=scores,
        )  # fmt: skip
        (folder / "rank_pattern.json").write_text(json.dumps(patterns[importance]))
    scored_alone = tmp_path / "importance/lora2-inner-rte-1/results.json"
    record = json.loads(scored_alone.read_text())
    del record["importance_scores"]["full"]
    scored_alone.write_text(json.dumps(record))
    (line,) = agreement_table(load_measured(tmp_path)).data
    assert line["runs"] == 1 and line["kept_by_both"] == 0.5
