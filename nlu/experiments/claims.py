"""The paper's claims, each beside what was measured here: a difference with its interval, and what follows from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.measured import MeasuredExperiment, Paired, Record, Row, paired, rank_pattern
from nlu.experiments.published import published_average
from nlu.experiments.table_format import NONE, Table, number
from nlu.experiments.tuned import TUNED, scale_tuned
from nlu.readers import read_json

NO_LOSS_MARGIN = 0.5  # points: what "without loss" may lose before it is called a loss


@dataclass(frozen=True)
class Claim:
    """`row` scores more than `reference`, or with `no_loss` not less, both labels of one experiment's rows.

    `published` names a file of results/published/ and what picks the two rows in it, None without a number.
    """

    text: str
    source: str
    experiment: str
    row: str
    reference: str
    published: tuple[str, dict[str, str], dict[str, str]] | None = None
    no_loss: bool = False


_TABLE1 = "lora2_table1_deberta_v3_base"
_TABLE3 = "lora2_table3_regulariser"
_TABLE4 = "lora2_table4_modules"
_K8, _K1 = {"method": "lora2", "setting": "k=8"}, {"method": "lora2", "setting": "k=1"}
CLAIMS = (
    Claim("LoRA² k=8 over LoRA r=8, the same parameters", "Table 1", "evidence", "lora2", "lora",
          (_TABLE1, _K8, {"method": "lora", "setting": "r=8"})),
    Claim("LoRA² k=8 over AdaLoRA, the same parameters", "Table 1", "evidence", "lora2", "adalora",
          (_TABLE1, _K8, {"method": "adalora", "setting": "r=8"})),
    Claim("LoRA² k=1 over LoRA r=1, the same parameters", "Table 1", "evidence", "lora2_k1", "lora_r1",
          (_TABLE1, _K1, {"method": "lora", "setting": "r=1"})),
    Claim("LoRA² k=1 over LoRA r=8, an eighth of the parameters", "Table 1", "evidence", "lora2_k1", "lora",
          (_TABLE1, _K1, {"method": "lora", "setting": "r=8"})),
    Claim("LoRA² k=8 over LoRA r=8, each at its better scale", "Table 1", TUNED, "lora2", "lora",
          (_TABLE1, _K8, {"method": "lora", "setting": "r=8"})),
    Claim("LoRA² k=8 over AdaLoRA, each at its better scale", "Table 1", TUNED, "lora2", "adalora",
          (_TABLE1, _K8, {"method": "adalora", "setting": "r=8"})),
    Claim("LoRA² k=1 over LoRA r=1, each at its better scale", "Table 1", TUNED, "lora2_k1", "lora_r1",
          (_TABLE1, _K1, {"method": "lora", "setting": "r=1"})),
    Claim("LoRA² k=1 over LoRA r=8, each at its better scale", "Table 1", TUNED, "lora2_k1", "lora",
          (_TABLE1, _K1, {"method": "lora", "setting": "r=8"})),
    Claim("LoRA² k=8 over LoRA r=8, with twice the steps", "Table 1", "training_length", "lora2, twice", "lora, twice",
          (_TABLE1, _K8, {"method": "lora", "setting": "r=8"})),
    Claim("all terms of the regulariser over those of the factors alone", "Table 3", "table3_regulariser",
          "all", "uv_and_UV", (_TABLE3, {"regulariser": "all"}, {"regulariser": "uv+UV"})),
    Claim("all terms of the regulariser over none", "section 3.3", "table3_regulariser", "all", "none"),
    Claim("all six modules over query and key", "Table 4", "table4_modules", "all_six", "query_key",
          (_TABLE4, {"modules": "all six"}, {"modules": "query,key"})),
    Claim("scoring the inner factors alone costs nothing", "section 3.4", "importance",
          "lora2_k1, inner", "lora2_k1, full", no_loss=True),
    Claim("half of the singular values are not needed", "Figure 3", "ranks_needed", "half", "all", no_loss=True),
)  # fmt: skip


def claims_table(experiments: dict[str, MeasuredExperiment], published: Path) -> Table | None:
    """Each claim whose two rows were measured; None where none was.

    Raises:
        UsageError: a published file that lacks what a claim refers to.
    """
    cells, data = [], []
    for claim in CLAIMS:
        rows = {row.label: row for row in experiments[claim.experiment].rows} if claim.experiment in experiments else {}
        if claim.row not in rows or claim.reference not in rows:
            continue
        last, best = (paired(rows[claim.row], rows[claim.reference], which) for which in ("last", "best"))
        if last is None or best is None:
            continue
        printed = _published_difference(claim, published)
        answer = verdict(last, claim.no_loss)
        low, high = last.interval or (None, None)
        interval = NONE if last.interval is None else f"{low:+.2f} to {high:+.2f}"
        tasks = ", ".join(_common_tasks(rows[claim.row], rows[claim.reference]))
        cells.append([claim.text, claim.source, number(printed, sign=True), claim.experiment,
                      str(len(last.differences)), number(last.mean, sign=True), interval,
                      number(best.mean, sign=True), answer])  # fmt: skip
        data.append({"claim": claim.text, "source": claim.source, "published": printed, "experiment": claim.experiment,
                     "tasks": tasks, "pairs": len(last.differences), "difference_last": last.mean, "low": low,
                     "high": high, "difference_best": best.mean, "answer": answer})  # fmt: skip
    if not cells:
        return None
    notes = [
        "Published: difference of the two rows' averages over the table's tasks, best of one run on DeBERTaV3-base. "
        "Measured here: mean difference in points over the pairs of equal task and seed, at the last evaluation, with "
        "its 95 % interval (Student's t), and at the best; models, tasks and steps as in the experiment's own tables.",
        "yes / no: the whole interval lies on that side of 0; not shown: it holds 0. For a claim of no loss, yes: the "
        f"interval ends above −{NO_LOSS_MARGIN} points. Not corrected for the number of claims.",
    ]
    header = ["claim", "paper", "published", "experiment here", "pairs", "last", "95 % interval", "best", "borne out?"]
    return Table("claims", "The paper's claims, measured here", header, cells, notes, data)


def verdict(result: Paired, no_loss: bool) -> str:
    """`yes`, `no` or `not shown`, from the interval of the difference; see the table's notes."""
    if result.interval is None:
        return "not shown"
    low, high = result.interval
    if low > (-NO_LOSS_MARGIN if no_loss else 0):
        return "yes"
    return "no" if high < 0 else "not shown"


def _published_difference(claim: Claim, folder: Path) -> float | None:
    if claim.published is None:
        return None
    stem, *selectors = claim.published
    path = folder / f"{stem}.json"
    content = read_json(path) or {}
    averages = []
    for selector in selectors:
        found = [row for row in content.get("rows", []) if selector.items() <= row.items()]
        averages.append(published_average(found[0], content["columns"]) if len(found) == 1 else None)
    if None in averages:
        raise UsageError(
            f"{path} is absent or lacks a row that nlu/experiments/claims.py refers to; restore it from the repository"
        )
    return averages[0] - averages[1]


def _common_tasks(row: Row, reference: Row) -> list[str]:
    return [task for task in row.records if task in reference.records]


def agreement_table(experiments: Iterable[MeasuredExperiment]) -> Table | None:
    """How far the inner factors' scores order the singular values as all factors' do; None where no run has both."""
    cells, data = [], []
    for experiment in experiments:
        for row in experiment.rows:
            both = [r for r in row.every if {"inner", "full"} <= set(r.raw.get("importance_scores") or {})]
            if not both:
                continue
            every = [record for other in experiment.rows for record in other.every]
            found = [_agreement(record) | {"kept_by_both": _kept_by_both(record, every)} for record in both]
            means = {key: _mean_of_known([f[key] for f in found]) for key in found[0]}
            cells.append([experiment.name, row.label, str(len(both)), *[number(mean, 3) for mean in means.values()]])
            data.append({"experiment": experiment.name, "row": row.label, "runs": len(both), **means})
    if not cells:
        return None
    notes = [
        "Measured here: the last scores of runs that scored all factors. Spearman's rank correlation of the two "
        "orders, within each layer (mean over the layers) and over all singular values of the model, where the "
        "threshold lies; same survivors: share of the values kept by the full scores that the inner ones would keep, "
        "after a training that the full scores pruned.",
        "Kept by both: share of the values live at the end that a training of its own, pruned by the inner scores from "
        "the same seed, kept too. A choice by lot would share the fraction that is kept.",
        "The paper argues that the outer factors add the same to every singular value, which holds within a layer.",
    ]
    header = ["experiment", "", "runs", "within layers", "across layers", "same survivors", "kept by both"]
    title = "Do the inner factors rank the singular values as all factors do?"
    return Table("claims_importance", title, header, cells, notes, data)


def _agreement(record: Record) -> dict[str, float]:
    inner, full = (record.raw["importance_scores"][kind] for kind in ("inner", "full"))
    within = [_spearman(inner[name], full[name]) for name in full]
    flat = [(i, f) for name in full for i, f in zip(inner[name], full[name], strict=True)]
    kept = record.raw["live_budget"]
    survivors = [set(sorted(range(len(flat)), key=lambda j, k=k: flat[j][k])[-kept:]) for k in (0, 1)]
    return {
        "within_layers": _mean_of_known(within),
        "across_layers": _spearman(*zip(*flat, strict=True)),
        "same_survivors": len(survivors[0] & survivors[1]) / kept,
    }


def _kept_by_both(record: Record, every: Iterable[Record]) -> float | None:
    """Share of the run's live values that the run with inner importance has too, all else equal; None without one."""

    def rest(other: Record) -> dict[str, Any]:
        return {name: value for name, value in other.axes.items() if name != "importance"}

    for other in every:
        if rest(other) == rest(record) and set(other.raw.get("importance_scores") or {}) == {"inner"}:
            ours, theirs = rank_pattern(record), rank_pattern(other)
            if ours and theirs and ours.keys() == theirs.keys():
                live = [(name, i) for name, alive in ours.items() for i, kept in enumerate(alive) if kept]
                return fmean(theirs[name][i] for name, i in live) if live else None
    return None


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _spearman(first: Any, second: Any) -> float | None:
    """None where one side is constant: it has no order."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)


def claims_tables(experiments: Iterable[MeasuredExperiment], published: Path) -> list[Table]:
    """Both tables, where there is something to show."""
    experiments = list(experiments)
    by_name = {experiment.name: experiment for experiment in experiments}
    if tuned := scale_tuned(experiments):
        by_name[TUNED] = tuned
    return list(filter(None, chain([claims_table(by_name, published)], [agreement_table(experiments)])))
