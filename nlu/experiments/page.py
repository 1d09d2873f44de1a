"""Pages of measured runs: each experiment has its answer, one table, notes and a figure; the rest is beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from loralib.files import write_bytes, write_text
from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment
from nlu.experiments.figures import Drawing, Styles, draw, styles_of
from nlu.experiments.lines import read_plan
from nlu.experiments.sentences import advice, answer, lost, not_ended, unpaired, without_rate
from nlu.experiments.statistics import as_frame, finished, load_measured, references
from nlu.experiments.tables import (
    as_csv,
    markdown,
    markdown_text,
    published_text,
    score_frame,
    score_text,
    setting,
    with_published,
)
from nlu.experiments.tuning import tried_rates, tuning_frame, tuning_text

PAGE, TITLE = "report.md", "# Measured runs"
NOTES = """\
Scores: those of the last evaluation (with --load_best_model_at_end: of the best checkpoint) on the validation set in
percent, mean ± standard deviation over the seeds. Differences: means over pairs of one task and seed; their intervals
cover the variation between seeds alone. Failed runs: those that ended early, or whose training loss at the end exceeds
0.95 of that of the best constant answer. All figures: [scores](tables/scores.csv).
"""


@dataclass(frozen=True)
class Measured:
    """The runs of an experiment and of its tuning, and the plans of both (see :attr:`Experiment.plan`)."""

    runs: pd.DataFrame
    tuning: pd.DataFrame
    plan: Mapping[str, str]
    tuning_plan: Mapping[str, str]


def experiments(folder: Path, only: Experiment | None = None) -> dict[str, Measured]:
    """The experiments in a folder of lines, by name. NAME_tuning.jsonl holds the tuning of NAME, if it is one.

    Args:
        only: the only one to return; lines of other runs, and of a tuning that it does not have, are left out.

    Raises:
        UsageError: as :func:`~nlu.experiments.statistics.load_measured`.
    """
    plans = None
    if only:
        plans = {only.name: only.plan}
        if only.tune:
            plans[f"{only.name}_tuning"] = read_plan(folder / f"{only.name}_tuning.jsonl")
    runs, none = load_measured(folder, plans), as_frame([])
    tunings = {name for name, own in runs.items() if name.endswith("_tuning") and own.held_out.all()}
    names = dict.fromkeys(name.removesuffix("_tuning") if name in tunings else name for name in runs)
    found = {}
    for name in [only.name] if only else names:
        own, tuning = runs.get(name, none), runs[f"{name}_tuning"] if f"{name}_tuning" in tunings else none
        both = name, f"{name}_tuning"
        plan, tuning_plan = (plans.get(each, {}) if plans else read_plan(folder / f"{each}.jsonl") for each in both)
        if tuning_plan:  # an earlier grid may have left lines of other runs
            tuning = tuning[tuning.run.isin(tuning_plan)]
        found[name] = Measured(own, tuning, plan, tuning_plan)
    return found


def write_report(
    measured: Path, output: Path, experiment: Experiment | None = None, reference: str | None = None
) -> str:
    """Write the page of the experiments in `measured`, report.md, with its tables and figures, to the folder `output`.

    The same lines and versions give the same files.

    Args:
        experiment: the only one to show, see :func:`experiments`.
        reference: the row that the others are compared with; None for LoRA at each of its sizes, or the first row.

    Returns:
        The text of the experiments' sections.

    Raises:
        UsageError: there is no line, or a damaged one; or as :func:`write_page`.
    """
    found = experiments(measured, experiment)
    if not found:
        raise UsageError(f"{measured}: no measured runs; nlu/run_glue.py and nlu/sweep.py write them")
    styles = styles_of(label for own in found.values() for label in own.runs.label)
    parts, files, scores = [], {}, []
    for name, own in found.items():
        text, table, drawings = section(name, own, styles, [reference] if reference else references(own.runs))
        parts.append(text)
        scores.append(table)
        files |= {file: drawing.png() for file, drawing in drawings.items()}
    files["tables/scores.csv"] = as_csv(pd.concat(scores)).encode()
    write_page(output / PAGE, "\n".join([f"{TITLE}\n", *parts, NOTES]), files)
    return "\n".join(parts)


def section(
    name: str, own: Measured, styles: Styles, against: Sequence[str]
) -> tuple[str, pd.DataFrame, dict[str, Drawing]]:
    """The section of one experiment: the answer, the table, what to know about the runs, a figure, published scores.

    Args:
        styles: see :func:`~nlu.experiments.figures.styles_of`. against: labels of the reference rows.

    Returns:
        The text; the scores without rounding; the figures by the names of their files.
    """
    runs, scores = own.runs, pd.DataFrame()
    tried, chosen = tried_rates(own.tuning), tuning_frame(own.tuning, own.tuning_plan)
    answered, setup, sources = ["No run has finished."], [], []
    if len(finished(runs)):
        scores, sources = with_published(score_frame(runs, against), runs)
        answered, setup = [answer(scores, runs), markdown(score_text(scores))], [f"Measured: {setting(runs)}."]
    undecided = without_rate(row for row, rates in chosen.groupby("row") if not rates.chosen.any())
    lacking = [*undecided, *not_ended(runs, own.plan), *not_ended(own.tuning, own.tuning_plan, "tuning ")]
    sentences = [*setup, *lost(runs), *unpaired(scores, runs), *advice(runs), *lacking, *sources]
    drawings = {f"figures/{name}_{each.kind}.png": each for each in draw(runs, scores, tried, styles)}
    notes = "\n".join(f"- {markdown_text(each)}" for each in sentences)
    parts = [f"## {markdown_text(name)}", *answered, notes, *figure_text(drawings)]
    for heading, table in published_text(scores):
        parts += [f"### {heading}", markdown(table)]
    if len(chosen):
        parts += ["### Learning rates, by their scores on held-out rows", markdown(tuning_text(chosen))]
    scores.insert(0, "experiment", name)
    return "\n\n".join(filter(None, parts)) + "\n", scores, drawings


# ---- for every page --------------------------------------------------------------------------------------------------


def figure_text(drawings: Mapping[str, Drawing]) -> list[str]:
    """The first figure, with its text, and links to the others."""
    if not drawings:
        return []
    shown, *others = drawings
    alternative = re.sub(r"([\[\]])", r"\\\1", drawings[shown].text)  # a bracket would end the text
    links = ", ".join(f"[{drawings[file].kind}]({file})" for file in others)
    return [f"![{alternative}]({shown})", *([f"More figures: {links}."] if links else [])]


def earlier_page(page: Path, first_line: str) -> str:
    """The text of a page that is to be replaced; empty if there is none.

    Raises:
        UsageError: it begins with another line: a person or another program wrote it.
    """
    text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
    if text and text.partition("\n")[0] != first_line:
        raise UsageError(f"{page} is not of this program and would be replaced: move it, or give another --output_dir")
    return text


def write_page(page: Path, text: str, files: Mapping[str, bytes]) -> None:
    """Write a page and the files beside it, and remove the figures and tables that only the earlier page showed.

    Raises:
        UsageError: as :func:`earlier_page`.
    """
    earlier = earlier_page(page, text.partition("\n")[0])
    for old in set(re.findall(r"\(((?:figures|tables)/[^/)]+)\)", earlier)) - {*files}:
        (page.parent / old).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(page.parent / name, content)
    write_text(page, text)
    print(f"written: {page}, with {len(files)} tables and figures beside it")
