"""The tables of a report: pandas groups and joins the runs."""

from statistics import fmean
from typing import Any

import pandas as pd

from loralib.checks import is_number
from nlu.experiments.cells import (
    NONE,
    Cell,
    Table,
    cell,
    count,
    counted,
    interval,
    number,
    ranged,
    rounded,
    signed,
    signed_percent,
    with_deviation,
)
from nlu.experiments.claims import Claim, Question
from nlu.experiments.statistics import (
    LEVEL,
    SHORT,
    averages,
    common_seeds,
    compared,
    estimate,
    finished,
    mean_losses,
    mean_of_medians,
    paired,
    percent,
    verdict,
)
from nlu.tasks import HEADINGS

ALL = "all tasks"
LOSS_CHANGE = "Loss: the change at the last evaluation, as a geometric mean of ratios; less is better."
AT_END = "† an end of the values tried: the best value may lie outside."
SHORT_STEPS = 1000  # a training of fewer steps ranks no methods


def rows_of(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(label, runs) in the order of the runs."""
    return [(label, runs[runs.label == label]) for label in dict.fromkeys(runs.label)]


def is_short(runs: pd.DataFrame) -> bool:
    """Whether a low-rank update was trained with Λ under `SHORT` in some run."""
    return bool((runs.delta_norm.notna() & (runs.rate_sum < SHORT)).any())


def are_held_out(runs: pd.DataFrame) -> bool:
    """Whether all of them were scored on a part of the training set."""
    return all((asked or {}).get("holdout_fraction") for asked in runs.asked)


def score_table(name: str, runs: pd.DataFrame) -> Table:
    """Mean ± standard deviation over seeds for each task, and the average over the tasks with its interval.

    Where rows have different seeds, a column has the averages over those that all have: the others do not compare.
    """
    tasks, known, shared = list(dict.fromkeys(runs.task)), averages(runs), averages(common_seeds(runs))
    seeds_differ = any(known[label] != average for label, average in shared.items())
    rows = []
    for label, own in rows_of(runs):
        result = known.get(label)
        row = {
            "": cell(label + (" (short)" if is_short(own) else ""), row=label, short=is_short(own)),
            "parameters": counted("parameters", own.adapter_params.max()),
            "seeds": ranged("seeds", own.groupby("task").seed.nunique()),
        }
        for task in tasks:
            of_task, heading = own[own.task == task], HEADINGS.get(task, task)
            row[heading] = with_deviation(task, of_task["last"])
            if runs[runs.task == task].test.notna().any():
                row[f"{heading} test"] = with_deviation(f"{task}_test", of_task.test)
        row |= {
            "average": rounded("average", result and result.mean),
            "95 % interval": interval(result),
            **({"average, common seeds": rounded("common", result and shared[label].mean)} if seeds_differ else {}),
            "average of medians": rounded("medians", result and mean_of_medians(own["last"], own.task)),
            "average of best": rounded("best", result and own.groupby("task")["best"].mean().mean()),
        }
        rows.append(row)
    notes = [
        "Last evaluation on the validation set in percent, mean ± standard deviation over the seeds. "
        "Interval: Student's t, the tasks as strata; it covers the variation between seeds only. Average of medians: "
        "over the tasks, of the medians over the seeds, which one lost run does not move. The last column takes each "
        "run's best evaluation, chosen on the validation set itself, as the papers report it.",
    ]
    if runs.test.notna().any():
        notes.append("Test: the model at the end on the task's labelled test set, which is not part of the average.")
    if seeds_differ:
        notes.append(
            "Common seeds: the average over the seeds that every row has. Averages over other seeds do not compare: "
            "one lost run moves them by points."
        )
    if len(known) > 1 and not shared:
        notes.append("No seed is common to all rows: their averages do not compare.")
    if any(is_short(own) for _, own in rows_of(runs)):
        notes.append(f"(short): Λ, the sum of the learning rates over the steps, ends under {SHORT:g} on some task.")
    return Table(f"{name}_scores", "Score", rows, notes)


def comparison_table(name: str, runs: pd.DataFrame, scales: dict[str, float | None]) -> Table:
    """Methods on one task side by side, each with its paired difference from the first.

    Args:
        runs: finished runs of one task, the first label first. scales: label → α/r; None for a method without it.
    """
    first = runs.label.iloc[0]
    rows = []
    for label, own in rows_of(runs):
        pairs, scale, seeds = paired(runs, label, first), scales.get(label), own.seed.nunique()
        result = estimate(pairs.difference, pairs.task) if label != first and len(pairs) else None
        rows.append(
            {
                "method": cell(label, method=label),
                "adapter parameters": counted("parameters", own.adapter_params.max()),
                "remaining": counted("live", own.live_adapter_params.mean()),
                "α/r": cell(NONE if scale is None else f"{scale:g}", scale=scale),
                "seeds": counted("seeds", seeds),
                "last": with_deviation("last", own["last"], 2),
                "best": with_deviation("best", own["best"], 2),
                f"last, against {first}": rounded("difference", result and result.mean, sign=True),
                "95 % interval": interval(result, signed),
                "s/step": rounded("seconds_per_step", own.seconds_per_step.mean(), 3),
            }
        )
    notes = [
        "In percent on the evaluation set: the last evaluation, and each run's best one, which is "
        "chosen on that set itself; mean ± standard deviation over the seeds. "
        f"Against {first}: mean difference over pairs of equal seed, with its interval (Student's t)."
    ]
    tried = {label: own.tried.iloc[0] for label, own in rows_of(runs)}
    chosen = [f"{label} {own['learning_rate']:g}" for label, own in tried.items() if "learning_rate" in (own or {})]
    if chosen:
        notes.append(f"Learning rates, chosen on held-out data: {', '.join(chosen)}.")
    doubts = ["one seed"] if runs.groupby("label").seed.nunique().min() < 2 else []
    doubts += ["short training"] if runs.steps.max() < SHORT_STEPS else []
    title = f"Demonstration, {', '.join(doubts)}: not a comparison" if doubts else "Comparison"
    return Table(name, title, rows, notes)


def against_table(name: str, every: pd.DataFrame, against: str) -> Table:
    """Every row beside one of them: scores, ‖ΔW‖, and the paired changes of loss and score; `every` has both stages."""
    runs, tried = finished(every), every[(every.stage == "select") & (every.status == "finished")]
    tasks, changes = list(dict.fromkeys(runs.task)), compared(runs, against)
    rows = []
    for label, own in rows_of(runs):
        loss, score = changes.get(label, (None, None))
        row = {"": cell(label, row=label), "runs": counted("runs", len(own))}
        for task in tasks:
            of_task = own[own.task == task]
            text, figures = with_deviation(task, of_task["last"])
            chosen = next(filter(None, of_task.tried), {})
            tuning = tried[(tried.task == task) & (tried.label == label)]
            shown, chosen_figures = _chosen(task, chosen, tuning)
            row[HEADINGS.get(task, task)] = cell(f"{text} at {shown}" if chosen else text, **figures, **chosen_figures)
        rows.append(
            row
            | {
                "‖ΔW‖": ranged("delta_norm", own.groupby("task").delta_norm.mean(), number),
                "loss, %": rounded("loss_change", loss and loss.mean, 1, sign=True),
                "95 % interval (loss)": interval(loss, signed_percent, "loss_"),
                "score": rounded("difference", score and score.mean, sign=True),
                "95 % interval": interval(score, signed),
            }
        )
    notes = [
        "Last evaluation in percent, mean ± standard deviation over the seeds. ‖ΔW‖: Frobenius norm "
        f"at the last logged step, the mean over the adapted layers. The last four columns compare with {against} over "
        "pairs of equal task and seed, the tasks as strata. " + LOSS_CHANGE,
    ]
    if any(runs.tried):
        notes += [
            "At: the learning rate (and other tuned settings) with the lowest loss at the last evaluation.",
            AT_END,
        ]
    return Table(f"{name}_against", f"Comparison with {against}", rows, notes)


def training_table(name: str, runs: pd.DataFrame) -> Table:
    """How far each row was trained: Λ, ‖ΔW‖, remaining singular values, the losses behind the score, and the time."""
    rows = []
    for label, own in rows_of(runs):
        means = own.groupby("task", sort=False)[["rate_sum_pruning", "rate_sum", "delta_norm"]].mean()
        live, initial = own.live_budget.mean(), own.initial_budget.mean()
        row = {
            "": cell(label, row=label),
            "Λ at pruning": ranged("rate_sum_pruning", means.rate_sum_pruning, number),
            "Λ at the end": ranged("rate_sum", means.rate_sum, number),
            "‖ΔW‖": ranged("delta_norm", means.delta_norm, number),
            "remaining values": cell(
                NONE if pd.isna(live) else f"{count(live)} of {count(initial)}", live=live, initial=initial
            ),
        }
        for task in dict.fromkeys(runs.task):
            last, lowest = own[own.task == task][["loss", "lowest_loss"]].mean()
            row[f"{HEADINGS.get(task, task)} loss"] = cell(
                f"{number(last, 3)} ({number(lowest, 3)})", **{f"{task}_loss": last, f"{task}_lowest_loss": lowest}
            )
        row["minutes a run"] = rounded("minutes", own.train_seconds.mean() / 60, 1)
        row["peak memory, MiB"] = counted("memory_mib", own.peak_memory_bytes.mean() / 2**20)
        rows.append(row)
    notes = [
        "Means over the seeds; a range spans the tasks. Λ: sum of the learning rates over the steps, "
        "when pruning starts and at the end. ‖ΔW‖: Frobenius norm at the last logged step, the mean over the adapted "
        "layers. Loss: validation cross-entropy, or squared error, at the last evaluation (the lowest of all "
        "evaluations). Runs of a sweep may share a machine, so the minutes are no benchmark; benchmarks/ measures the "
        "methods side by side."
    ]
    return Table(f"{name}_training", "Training", rows, notes)


def claims_table(
    name: str, runs: pd.DataFrame, question: Question, corrected: dict[Claim, float | None]
) -> Table | None:
    """The question's claims with a row for all tasks and one for each; None where no claim has both its rows."""
    rows = []
    for claim in question.claims:
        pairs = paired(runs, claim.label, claim.against)
        tasks = list(dict.fromkeys(pairs.task))
        joint = ALL if set(tasks) == set(runs.task) else ", ".join(HEADINGS.get(task, task) for task in tasks)
        for task in [ALL, *(tasks if len(tasks) > 1 else [])] if len(pairs) else []:
            whole, own = task == ALL, pairs if task == ALL else pairs[pairs.task == task]
            result, loss = estimate(own.difference, own.task), percent(estimate(own.loss_ratio, own.task))
            p = corrected[claim] if whole else None
            answer, title = verdict(result, claim.expect, p) if whole else "", f"{claim.label} − {claim.against}"
            rows.append(
                {
                    "claim": cell(title if whole else "", claim=title),
                    "expected": cell(claim.expect if whole else "", expected=claim.expect, source=claim.source),
                    "verdict": cell(answer, verdict=answer),
                    "task": cell(joint if whole else HEADINGS.get(task, task), task=joint if whole else task),
                    "published": rounded("published", claim.published if whole else None, sign=True),
                    "pairs": counted("pairs", result.count),
                    "difference": rounded("difference", result.mean, sign=True),
                    "95 % interval": interval(result, signed),
                    "median": rounded("median", mean_of_medians(own.difference, own.task), sign=True),
                    "p (Holm)": cell("< 0.001" if p is not None and p < 0.001 else number(p, 3), p_holm=p),
                    "loss, %": rounded("loss_change", loss.mean, 1, sign=True),
                    "95 % interval (loss)": interval(loss, signed_percent, "loss_"),
                }
            )
    notes = [
        "Differences of the last evaluation in points over pairs of equal task and seed, the tasks as "
        "strata; p is corrected for the number of all claims. Median: of the differences (all tasks: the mean of the "
        "tasks' medians), which one lost run does not move. The published column cites the paper, which has another "
        "model and more tasks. " + LOSS_CHANGE,
        "holds: p < 0.05 and the difference lies as expected. contradicted: p < 0.05 and it lies otherwise. Higher is "
        f"tested against 0, not lower against −{LEVEL}, level against ±{LEVEL}. level: higher was "
        f"expected, and the whole interval lies within ±{LEVEL}; this comes first. not shown: none of these.",
    ]
    shown = {row["claim"][1]["claim"] for row in rows}
    titles = [f"{claim.label} − {claim.against}" for claim in question.claims]
    if unknown := [title for title in titles if title not in shown]:
        notes.append(f"Claims without pairs of finished runs, which count in the correction: {'; '.join(unknown)}.")
    return Table(f"{name}_claims", "Claims", rows, notes) if rows else None


def _values(tried: dict[str, Any], short: bool = False) -> str:
    """What was tried, in one line; in short the learning rate goes without its name."""
    values = {name: f"{value:g}" if is_number(value) else str(value) for name, value in tried.items()}
    named = (value if short and name == "learning_rate" else f"{name}={value}" for name, value in values.items())
    return ", ".join(named)


def _chosen(task: str, chosen: dict[str, Any], tuning: pd.DataFrame) -> Cell:
    """The values that tuning chose for a row and a task, with a mark behind each that is an end of those it tried."""
    ends = {}
    for name, value in chosen.items():
        values = {tried[name] for tried in tuning.tried if is_number(tried.get(name))}
        ends[name] = len(values) > 2 and value in (min(values), max(values))  # of two values each is an end
    marked = [_values({name: value}, short=True) + " †" * ends[name] for name, value in chosen.items()]
    return ", ".join(marked) or NONE, {f"{task}_chosen": _values(chosen), f"{task}_at_end": any(ends.values())}


def _is_stale(tuning: pd.DataFrame, chosen: dict[str, Any]) -> bool:
    """Whether another value than the chosen one has the lowest mean loss among a row's runs on one task by now."""
    losses = mean_losses(tuning, tuning.tried.map(_key))
    return bool(chosen) and len(losses) > 0 and _key(chosen) not in losses.index[losses == losses.min()]


def _key(tried: dict[str, Any]) -> str:
    return repr(sorted(tried.items()))


def tuning_table(name: str, runs: pd.DataFrame) -> Table | None:
    """What the tuning stage chose, and what a user gets without it; `runs` are all of the question's, both stages."""
    tuning = runs[runs.stage == "select"]
    where = (
        "On a held-out part of the training set, at the tuning stage's length"
        if are_held_out(tuning) else "On the validation set, which the scores above come from too"
    )  # fmt: skip
    rows, tasks, stale = [], list(dict.fromkeys(tuning.task.dropna())), False
    for label, own in rows_of(tuning):
        usual = own[~own.extra].fillna({"last": 0.0}).groupby("task")["last"].mean()
        final = runs[(runs.stage == "final") & (runs.label == label)]
        row, tuned, failed = {"": cell(label, row=label)}, [], int((own.status == "failed").sum())
        for task in tasks:
            of_task = own[(own.task == task) & (own.status == "finished")]
            chosen = next(iter(final[final.task == task].tried), None) or {}
            text, figures = _chosen(task, chosen, of_task)
            stale |= (other := _is_stale(own[own.task == task], chosen))
            row[HEADINGS.get(task, task)] = text + " ‡" * other, figures
            tuned.append(of_task["last"][[tried == chosen for tried in of_task.tried]].mean())
        row |= {
            "mean of the values tried": rounded("untuned", usual.mean() if len(usual) == len(tasks) else None),
            "at the chosen values": rounded("tuned", fmean(tuned) if tuned else None),
            "crashed": cell(f"{failed} of {len(own)}", failed=failed, runs=len(own)),
        }
        rows.append(row)
    notes = [
        f"{where}: the learning rate (and other tuned settings) with the lowest loss at the last evaluation. Mean of "
        "the values tried: the mean score in percent over the values of the grid, without one more beyond its end: "
        "what a user gets on average with an untuned value of this grid. A crashed run counts as 0.",
        AT_END,
    ]
    if stale:
        notes.append("‡ by now another value has the lowest loss; the final runs were made before it was measured.")
    return Table(f"{name}_tuning", "Tuning", rows, notes) if rows else None
