"""The tables of a report: pandas groups and joins the runs, and prints Markdown, CSV and LaTeX."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from nlu.errors import UsageError
from nlu.experiments.questions import Question
from nlu.experiments.statistics import LEVEL, SHORT, estimate, finished, holm, paired, verdict
from nlu.json_yaml import read_json
from nlu.tasks import HEADINGS

NONE = "–"
ALL = "all tasks"
SHORT_STEPS = 1000  # a training of fewer steps ranks no methods


@dataclass(frozen=True)
class Table:
    """A table: `data` holds its figures unrounded (for CSV), `text` the same rows as printed; `notes` explain them."""

    name: str
    title: str
    data: pd.DataFrame
    text: pd.DataFrame
    notes: list[str]

    def markdown(self) -> str:
        """The title, the table and the notes."""
        cells = self.text.map(lambda cell: " ".join(str(cell).replace("|", "\\|").split()))
        sides = ["left" if i < self._words() else "right" for i in range(len(cells.columns))]
        body = cells.to_markdown(index=False, colalign=sides, disable_numparse=True, tablefmt="pipe")
        return "\n".join([f"**{self.title}**", "", body, "", *[f"- {note}" for note in self.notes], ""])

    def csv(self) -> str:
        """Figures rounded to six digits, where libraries' versions may differ: equal lines give equal bytes."""
        return self.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")

    def latex(self) -> str:
        """A `table` environment for the booktabs package; the notes follow the caption."""
        escaped = self.text.map(latex_text).rename(columns=latex_text)
        sides = "".join("l" if i < self._words() else "r" for i in range(len(escaped.columns)))
        caption = latex_text(" ".join([f"{self.title}.", *self.notes]))
        return escaped.to_latex(
            index=False, escape=False, column_format=sides, caption=caption, label=f"tab:{self.name}"
        )

    def _words(self) -> int:
        """How many leading columns hold words; the others hold figures and are set to the right."""
        figures = [all(str(c)[:1] in "0123456789+-−<–" for c in self.text[name]) for name in self.text.columns]
        return figures.index(True) if True in figures else len(figures)


def latex_text(text: Any) -> str:
    """Text with LaTeX's special characters written out; other letters are UTF-8, which LaTeX reads."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
               "²": r"\textsuperscript{2}", "−": "$-$", "Δ": r"$\Delta$", "Λ": r"$\Lambda$", "†": r"\dag{}",
               **{c: f"\\{c}" for c in "&%$#_{}"}}  # fmt: skip
    return "".join(special.get(character, character) for character in str(text))


def make(name: str, title: str, rows: list[dict[str, Any]], show: dict[str, Callable[[Any], str]], notes: list[str]):
    """A table of `rows`; each column of `show` is printed by its function of a row."""
    data = pd.DataFrame(rows)
    text = pd.DataFrame({head: [function(row) for row in rows] for head, function in show.items()})
    return Table(name, title, data, text, notes)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure with a fixed number of digits, or a dash."""
    return NONE if value is None or pd.isna(value) else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with separators, or a dash."""
    return NONE if value is None or pd.isna(value) else f"{value:,.0f}"


def spread(low: float | None, high: float | None, form: Callable[[Any], str] = count) -> str:
    """A range, or one figure where both ends print alike."""
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def rows_of(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(label, runs) in the order of the runs."""
    return [(label, runs[runs.label == label]) for label in dict.fromkeys(runs.label)]


def is_short(runs: pd.DataFrame) -> bool:
    """Whether a low-rank update was trained with Λ under `SHORT` in some run."""
    return bool((runs.delta_norm.notna() & (runs.rate_sum < SHORT)).any())


def score_table(name: str, runs: pd.DataFrame) -> Table:
    """Mean ± standard deviation over seeds for each task, and the average over the tasks with its interval."""
    tasks = list(dict.fromkeys(runs.task))
    rows = []
    for label, own in rows_of(runs):
        by_task, seeds = own.groupby("task", sort=False), own.groupby("task").seed.nunique()
        whole = set(own.task) == set(tasks)
        result = estimate(own["last"], own.task) if whole else None
        row = {"row": label, "parameters": own.adapter_params.max(), "seeds_least": seeds.min(),
               "seeds_most": seeds.max(), "short": is_short(own)}  # fmt: skip
        for task in tasks:
            scores = by_task.get_group(task)["last"] if task in set(own.task) else pd.Series(dtype=float)
            row |= {task: scores.mean(), f"{task}_std": scores.std(ddof=1)}
        low, high = (result.interval if result else None) or (None, None)
        best = by_task["best"].mean().mean() if whole else None
        rows.append(row | {"average": result and result.mean, "low": low, "high": high, "best": best})
    show: dict[str, Callable[[Any], str]] = {
        "": lambda r: r["row"] + (" (short)" if r["short"] else ""),
        "parameters": lambda r: count(r["parameters"]),
        "seeds": lambda r: spread(r["seeds_least"], r["seeds_most"]),
    }
    for task in tasks:
        show[HEADINGS.get(task, task)] = lambda r, task=task: _with_deviation(r[task], r[f"{task}_std"])
    show |= {
        "average": lambda r: number(r["average"]),
        "95 % interval": lambda r: NONE if r["low"] is None else spread(r["low"], r["high"], number),
        "average of best": lambda r: number(r["best"]),
    }
    notes = [
        "Measured here: last evaluation on the validation set in percent, mean ± standard deviation over the seeds. "
        "Interval: Student's t, the tasks as strata; it shows how far the average moves with the seed. The last column "
        "takes each run's best evaluation, chosen on the validation set itself, as the papers report it.",
    ]
    if any(row["short"] for row in rows):
        notes.append(f"(short): Λ, the sum of the learning rates over the steps, ends under {SHORT:g} on some task.")
    return make(f"{name}_scores", "Score", rows, show, notes)


def comparison_table(name: str, runs: pd.DataFrame, scales: dict[str, float | None]) -> Table:
    """Methods on one task side by side, each with its paired difference from the first.

    Args:
        runs: finished runs of one task, the first label first. scales: label → α/r; None for a method without it.
    """
    labels = list(dict.fromkeys(runs.label))
    rows = []
    for label, own in rows_of(runs):
        pairs = paired(runs, label, labels[0])
        result = estimate(pairs.difference, pairs.task) if label != labels[0] and len(pairs) else None
        low, high = (result.interval if result else None) or (None, None)
        row = {"method": label, "parameters": own.adapter_params.max(), "live": own.live_adapter_params.mean()}
        row |= {"scale": scales.get(label), "seeds": own.seed.nunique()}
        for score in ("last", "best"):
            row |= {score: own[score].mean(), f"{score}_std": own[score].std(ddof=1)}
        row |= {"difference": result and result.mean, "low": low, "high": high}
        rows.append(row | {"seconds_per_step": own.seconds_per_step.mean()})
    show: dict[str, Callable[[Any], str]] = {
        "method": lambda r: r["method"],
        "adapter parameters": lambda r: count(r["parameters"]),
        "live at the end": lambda r: count(r["live"]),
        "α/r": lambda r: NONE if r["scale"] is None else f"{r['scale']:g}",
        "seeds": lambda r: str(r["seeds"]),
        "last": lambda r: _with_deviation(r["last"], r["last_std"], 2),
        "best": lambda r: _with_deviation(r["best"], r["best_std"], 2),
        f"last, against {labels[0]}": lambda r: number(r["difference"], sign=True),
        "95 % interval": lambda r: NONE if r["low"] is None else spread(r["low"], r["high"], _signed),
        "s/step": lambda r: number(r["seconds_per_step"], 3),
    }
    notes = [
        "Measured here, in percent on the evaluation set: the last evaluation, and each run's best one, which is "
        "chosen on that set itself; mean ± standard deviation over the seeds. "
        f"Against {labels[0]}: mean difference over pairs of equal seed, with its interval (Student's t)."
    ]
    tried = {label: own.tried.iloc[0] for label, own in rows_of(runs)}
    chosen = [f"{label} {own['learning_rate']:g}" for label, own in tried.items() if "learning_rate" in (own or {})]
    if chosen:
        notes.append(f"Learning rates, chosen on held-out data: {', '.join(chosen)}.")
    few, most_steps = min(row["seeds"] for row in rows), runs.steps.max()
    doubts = ["one seed"] if few < 2 else []
    doubts += ["short training"] if most_steps < SHORT_STEPS else []
    title = f"Demonstration, {', '.join(doubts)}: not a comparison" if doubts else "Comparison"
    return make(name, title, rows, show, notes)


def _signed(value: float) -> str:
    return number(value, sign=True)


def training_table(name: str, runs: pd.DataFrame) -> Table:
    """How far each row was trained: Λ, ‖ΔW‖, live singular values, and the validation loss beside the score."""
    tasks = list(dict.fromkeys(runs.task))
    rows = []
    for label, own in rows_of(runs):
        means = own.groupby("task", sort=False)[["rate_sum_pruning", "rate_sum", "delta_norm"]].mean()
        row: dict[str, Any] = {"row": label}
        for column in means:
            row |= {f"{column}_least": means[column].min(), f"{column}_most": means[column].max()}
        row |= {"live": own.live_budget.mean(), "initial": own.initial_budget.mean()}
        for task in tasks:
            losses = own[own.task == task][["loss", "lowest_loss"]].mean()
            row |= {f"{task}_loss": losses["loss"], f"{task}_lowest_loss": losses["lowest_loss"]}
        rows.append(row)

    def ranged(column: str) -> Callable[[Any], str]:
        return lambda r: spread(r[f"{column}_least"], r[f"{column}_most"], number)

    show: dict[str, Callable[[Any], str]] = {"": lambda r: r["row"], "Λ at pruning": ranged("rate_sum_pruning")}
    show |= {"Λ at the end": ranged("rate_sum"), "‖ΔW‖": ranged("delta_norm")}
    show["live values"] = lambda r: NONE if pd.isna(r["live"]) else f"{count(r['live'])} of {count(r['initial'])}"
    for task in tasks:
        show[f"{HEADINGS.get(task, task)} loss"] = lambda r, task=task: (
            f"{number(r[f'{task}_loss'], 3)} ({number(r[f'{task}_lowest_loss'], 3)})"
        )
    notes = [
        "Measured here, means over the seeds; a range spans the tasks. Λ: sum of the learning rates over the steps, "
        "when pruning starts and at the end. ‖ΔW‖: Frobenius norm over all adapted layers at the end. Loss: validation "
        "cross-entropy, or squared error, at the last evaluation (the lowest of all evaluations)."
    ]
    return make(f"{name}_training", "How far it was trained", rows, show, notes)


def cost_table(name: str, runs: pd.DataFrame) -> Table:
    """Parameters, time and memory of each row."""
    rows = []
    for label, own in rows_of(runs):
        step = own.groupby("task").seconds_per_step.mean()
        rows.append(
            {"row": label, "adapter": own.adapter_params.max(), "live": own.live_adapter_params.mean(),
             "head_least": own.head_params.min(), "head_most": own.head_params.max(), "step_least": step.min(),
             "step_most": step.max(), "minutes": own.train_seconds.mean() / 60,
             "memory_mib": own.peak_memory_bytes.mean() / 2**20}
        )  # fmt: skip
    show: dict[str, Callable[[Any], str]] = {
        "": lambda r: r["row"],
        "adapter": lambda r: count(r["adapter"]),
        "live at the end": lambda r: count(r["live"]),
        "head": lambda r: spread(r["head_least"], r["head_most"]),
        "seconds a step": lambda r: spread(r["step_least"], r["step_most"], lambda v: number(v, 3)),
        "minutes a run": lambda r: number(r["minutes"], 1),
        "peak memory, MiB": lambda r: count(r["memory_mib"]),
    }
    notes = [
        "Measured here: trained parameters and times; a range spans the tasks. Runs of a sweep may share a machine, "
        "so the times are no benchmark; benchmarks/ measures the methods side by side."
    ]
    return make(f"{name}_cost", "Cost", rows, show, notes)


def claims_table(name: str, runs: pd.DataFrame, question: Question, corrected: dict[Any, float | None]) -> Table | None:
    """The question's claims with a row for all tasks and one for each; None where no claim has both its rows."""
    rows = []
    for claim in question.claims:
        pairs = paired(runs, claim.label, claim.against)
        tasks = list(dict.fromkeys(pairs.task))
        for task in [ALL, *(tasks if len(tasks) > 1 else [])] if len(pairs) else []:
            own = pairs if task == ALL else pairs[pairs.task == task]
            result, p = estimate(own.difference, own.task), corrected[claim] if task == ALL else None
            low, high = result.interval or (None, None)
            answer = verdict(result, claim.expect, p) if task == ALL else ""
            rows.append(
                {"claim": f"{claim.label} − {claim.against}", "expected": claim.expect, "source": claim.source,
                 "published": claim.published if task == ALL else None, "task": task, "pairs": result.count,
                 "difference": result.mean, "low": low, "high": high, "p_holm": p, "verdict": answer}
            )  # fmt: skip
    show: dict[str, Callable[[Any], str]] = {
        "claim": lambda r: r["claim"] if r["task"] == ALL else "",
        "expected": lambda r: r["expected"] if r["task"] == ALL else "",
        "verdict": lambda r: f"**{r['verdict']}**" if r["verdict"] else "",
        "task": lambda r: HEADINGS.get(r["task"], r["task"]),
        "published": lambda r: number(r["published"], sign=True),
        "pairs": lambda r: str(r["pairs"]),
        "difference": lambda r: number(r["difference"], sign=True),
        "95 % interval": lambda r: (
            NONE if r["low"] is None else f"{number(r['low'], sign=True)} to {number(r['high'], sign=True)}"
        ),
        "p (Holm)": lambda r: (
            NONE if r["p_holm"] is None else "< 0.001" if r["p_holm"] < 0.001 else f"{r['p_holm']:.3f}"
        ),
    }
    notes = [
        "Measured here: differences of the last evaluation in points over pairs of equal task and seed, the tasks as "
        "strata; p is corrected for the number of all claims. The published column is cited.",
        f"holds: p < 0.05 and the expected direction. level: the whole interval lies within ±{LEVEL}. contradicted: as "
        "clear in the other direction. not shown: neither.",
    ]
    return make(f"{name}_claims", "Claims", rows, show, notes) if rows else None


def correct_claims(runs: pd.DataFrame, questions: Iterable[Question]) -> dict[Any, float | None]:
    """Claim → its p value, corrected over the claims of all questions."""
    claims, raw = [], []
    for question in questions:
        for claim in question.claims:
            pairs = paired(finished(runs, question.experiments), claim.label, claim.against)
            claims.append(claim)
            raw.append(estimate(pairs.difference, pairs.task).p_value(claim.expect) if len(pairs) else None)
    return dict(zip(claims, holm(raw), strict=True))


def tuning_table(name: str, runs: pd.DataFrame) -> Table | None:
    """What the tuning stage chose, and what a user gets without it; `runs` are all of the question's, both stages."""
    tuning = runs[runs.stage == "select"]
    if not len(tuning):
        return None
    tasks, rows = list(dict.fromkeys(tuning.task.dropna())), []
    for label, own in rows_of(tuning):
        usual = own[~own.extra].fillna({"last": 0.0})
        final = runs[(runs.stage == "final") & (runs.label == label)]
        row: dict[str, Any] = {"row": label, "untuned": usual.groupby("task")["last"].mean().mean(),
                               "failed": int((own.status == "failed").sum()), "runs": len(own)}  # fmt: skip
        tuned = []
        for task in tasks:
            of_task = own[(own.task == task) & (own.status == "finished")]
            chosen = next(iter(final[final.task == task].tried), None) or {}
            ends = {k for k in chosen if chosen[k] in (_values(of_task, k)[:1] + _values(of_task, k)[-1:])}
            row[task] = ", ".join(f"{k}={v:g}" if isinstance(v, int | float) else f"{k}={v}" for k, v in chosen.items())
            row[f"{task}_at_end"] = any(len(_values(of_task, name)) > 1 for name in ends)
            tuned.append(of_task[[tried == chosen for tried in of_task.tried]]["last"].mean())
        rows.append(row | {"tuned": fmean(tuned) if tuned and not pd.isna(tuned).any() else None})
    show: dict[str, Callable[[Any], str]] = {"": lambda r: r["row"]}
    for task in tasks:
        show[HEADINGS.get(task, task)] = lambda r, task=task: (
            (r[task].replace("learning_rate=", "") or NONE) + (" †" if r[f"{task}_at_end"] else "")
        )
    show |= {
        "mean of the values tried": lambda r: number(r["untuned"]),
        "at the chosen values": lambda r: number(r["tuned"]),
        "failed": lambda r: f"{r['failed']} of {r['runs']}",
    }
    notes = [
        "Measured here on a held-out part of the training set, at the tuning stage's length: the learning rate (and "
        "what else was tried) with the lowest loss at the last evaluation. Mean of the values tried: the score in "
        "percent that a user gets without tuning, over the values that every task tries; a failed run counts as 0.",
        "† an end of what was tried: a better value may lie beyond.",
    ]
    return make(f"{name}_tuning", "Tuning", rows, show, notes)


def _values(runs: pd.DataFrame, name: str) -> list[Any]:
    return sorted({tried[name] for tried in runs.tried if name in tried})


def _with_deviation(mean: float, deviation: float, digits: int = 1) -> str:
    return number(mean, digits) if pd.isna(deviation) else f"{number(mean, digits)} ± {number(deviation, digits)}"


def published_table(folder: Path, file: str, title: str) -> Table:
    """A table of a paper, with each average computed again beside the printed one.

    Raises:
        UsageError: its file is absent, damaged, or without source or rows.
    """
    path = folder / f"{file}.json"
    content = read_json(path) or {}
    if not all(content.get(key) for key in ("source", "rows")):
        raise UsageError(f"{path} is absent or lacks its source or rows; restore it from the repository")
    columns, rows = content.get("columns", []), [dict(row) for row in content["rows"]]
    digits = max((len(str(row[c]).partition(".")[2]) for row in rows for c in columns if c in row), default=2)
    words = [
        key for key in dict.fromkeys(k for row in rows for k in row) if key not in (*columns, "std", "avg_printed")
    ]
    show: dict[str, Callable[[Any], str]] = {}
    for key in words:
        show[key] = lambda r, key=key: HEADINGS.get(r.get(key), str(r.get(key, "")))
    for key in columns:
        show[HEADINGS.get(key, key)] = lambda r, key=key: (
            number(r.get(key), digits) + (f" ± {r['std'][key]}" if key in r.get("std", {}) else "")
        )
    notes = [f"Published, not measured here. Source: {content['source']}."]
    notes += [f"{content[key]}" for key in ("protocol", "note", "unit") if content.get(key)]
    if columns:
        for row in rows:
            row["avg_computed"] = published_average(row, columns)
        show["average, printed"] = lambda r: number(r.get("avg_printed"), digits)
        show["average, computed"] = lambda r: number(r["avg_computed"]) + (" †" if _differs(r, digits) else "")
        notes.append("Averages: over the tasks, a task with two columns counting once. † does not follow from its row.")
    return make(file, title, rows, show, notes)


def published_average(row: dict[str, Any], columns: list[str]) -> float | None:
    """Mean over tasks, a task with two columns counting once; None where a column is missing."""
    tasks: dict[str, list[float]] = {}
    for column in columns:
        tasks.setdefault(column.partition("_")[0], []).append(row.get(column))
    if any(value is None for values in tasks.values() for value in values):
        return None
    return fmean(fmean(values) for values in tasks.values())


def _differs(row: dict[str, Any], digits: int) -> bool:
    """Whether rounding cannot explain a printed average: off by 0.02, or by 0.06 where one decimal is printed."""
    printed, computed = row.get("avg_printed"), row["avg_computed"]
    return None not in (printed, computed) and abs(printed - computed) > (0.06 if digits == 1 else 0.02)
