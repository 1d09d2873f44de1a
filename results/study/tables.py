"""The study's tables: scores.csv, claims.csv, and what the page prints of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nlu.experiments.statistics import Estimate, estimate, finished, paired, reference
from nlu.experiments.tables import ALL, by_task, difference, number, score_frame, score_text, with_interval
from results.study.inference import failure_interval, fitted_difference, holm, p_value, student_t, verdict
from results.study.questions import Question

_CLAIMED = {"higher": "scores higher than", "not lower": "does not score lower than", "level": "scores as"}


def score_table(every: pd.DataFrame, against: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each method: nlu's scores and paired differences with the study's further columns.

    These are `failed_low` and `failed_high`, the exact interval of the rate of failures; `TASK_validation`, where the
    score is that of the test rows; the difference by the Student-t model, with `t_`; and the paired difference of the
    best evaluations, with `best_`.
    """
    done = finished(every)
    scores, fit = score_frame(every, against), student_t(done)
    best = score_frame(every.assign(last=every.best), against)
    best = best[best.task == ALL].set_index("row")
    tables = {task: cells.assign(**_validation(done, task, cells.index)) for task, cells in by_task(scores)}
    rows = []
    for whole in scores[scores.task == ALL].to_dict("records"):
        label = whole["row"]
        row = {name: whole[name] for name in ("row", "parameters", "remaining", "runs", "failed")}
        row["failed_low"], row["failed_high"] = failure_interval(whole["failed"], whole["runs"])
        for task, cells in tables.items():
            names = {"score": task, "test": f"{task}_test", "validation": f"{task}_validation"}
            for name, column in (names | {"mismatched": "mismatched_accuracy"}).items():
                if name in cells and (name == "score" or not pd.isna(cells[name][label])):
                    row |= {column: cells[name][label], f"{column}_std": cells[f"{name}_std"][label]}
        row |= {"average": whole["score"], "best": whole["best"], "against": whole["against"]}
        row |= {name: whole[name] for name in ("difference", "low", "high")}
        pairs = paired(done, label, whole["against"])
        known = fit is not None and len(pairs)
        model = fitted_difference(fit, label, whole["against"], pairs.task.unique()) if known else Estimate()
        row |= difference(model, "t_")
        rows.append(row | {f"best_{name}": best[name][label] for name in ("difference", "low", "high")})
    return pd.DataFrame(rows).astype({"parameters": "Int64"})


def training_table(every: pd.DataFrame) -> pd.DataFrame:
    """How far each row was trained on each task: means over the seeds.

    Λ is the sum of the learning rates over the steps; ‖ΔW‖ is the Frobenius norm at the last logged step, the mean over
    the adapted layers.
    """
    done = finished(every)
    done = done.assign(minutes=done.train_seconds / 60, memory_mib=done.peak_memory_bytes / 2**20)
    done = done.rename(columns={"label": "row", "rate_sum": "Λ", "delta_norm": "‖ΔW‖"})
    grouped = done.groupby(["row", "task"], sort=False)
    names = ["Λ", "‖ΔW‖", "training_loss_end", "loss", "lowest_loss", "minutes", "memory_mib"]
    processors = grouped.processor.agg(lambda each: ", ".join(sorted({*each} - {""})))
    return grouped[names].mean().assign(processors=processors).reset_index()


def _validation(done: pd.DataFrame, task: str, labels: pd.Index) -> dict[str, pd.Series]:
    """The last evaluation's scores of a task whose runs are scored on test rows."""
    if "validation" not in done:
        return {}
    scores = done[done.task == task].groupby("label").validation
    return {"validation": scores.mean().reindex(labels), "validation_std": scores.std().reindex(labels)}


def claims_table(every: pd.DataFrame, question: Question) -> pd.DataFrame:
    """The question's claims, each with a row for all tasks and one per task; p is corrected for their number (Holm)."""
    done = finished(every)
    measured = []
    for claim in question.claims:
        against = claim.against or reference(done, claim.label, question.against)
        pairs = paired(done, claim.label, against)
        measured.append((claim, against, pairs, estimate(pairs)))
    p_values = holm([p_value(result, claim.expect) for claim, *_, result in measured])
    rows = []
    for (claim, against, pairs, result), p in zip(measured, p_values, strict=True):
        named = {"row": claim.label, "against": against, "expected": claim.expect}
        found = verdict(result, claim.expect, p) if len(pairs) else "not measured yet"
        rows.append(named | {"task": ALL, "pairs": len(pairs)} | difference(result) | {"p_holm": p})
        rows[-1] |= {"verdict": found, "published": claim.published, "source": claim.source}
        for task, own in pairs.groupby("task", sort=False) if pairs.task.nunique() > 1 else ():
            rows.append(named | {"task": task, "pairs": len(own)} | difference(estimate(own)))
    return pd.DataFrame(rows)


def printed_scores(every: pd.DataFrame, question: Question) -> pd.DataFrame:
    """nlu's printed table, without the times of a busy machine."""
    return score_text(score_frame(every, question.against)).drop(columns=["s/step"], errors="ignore")


def printed_claims(claims: pd.DataFrame) -> list[str]:
    """For each measured claim the verdict, what was claimed, the difference, and the gain in the paper."""
    found = []
    for claim in claims[(claims.task == ALL) & claims.p_holm.notna()].itertuples() if len(claims) else ():
        p = "p < 0.001" if claim.p_holm < 0.001 else f"p {number(claim.p_holm, 3)}"
        gain = f"; the paper has {number(claim.published, sign=True)}" if not pd.isna(claim.published) else ""
        shown = with_interval(claim.difference, claim.low, claim.high)
        claimed = f"{claim.row} {_CLAIMED[claim.expected]} {claim.against}"
        found.append(f"{claim.verdict.capitalize()}: {claimed}. {shown}, {p}{gain}.")
    return found
