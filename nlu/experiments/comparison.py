"""What a comparison prints and writes: its table, its answer, and reasons not to judge by the runs yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loralib.files import write_bytes, write_text
from nlu.experiments.figures import draw
from nlu.experiments.statistics import LEVEL, SHORT, as_frame, finished, paired, seeds_for
from nlu.experiments.tables import NONE, as_csv, markdown, number, score_frame, score_text
from nlu.experiments.tuning import tuning_runs


def write_comparison(
    lines: list[dict[str, Any]],
    tuning: list[dict[str, Any]],
    scales: dict[str, float | None],
    notes: list[str],
    folder: Path,
) -> None:
    """Print the table, the answer and the notes, and write them (comparison.md, .csv) and the figures to the folder.

    Args:
        lines: those of the comparison's runs; nothing is written if no run has finished.
        tuning: the lines of the tuning runs.
        scales: label → α/r, in the order of the rows.
    """
    frame = as_frame(lines)
    order = {label: place for place, label in enumerate(scales)}
    frame = frame.sort_values("label", key=lambda labels: labels.map(order), kind="stable")
    done = finished(frame)
    if not len(done):
        return
    scores = score_frame(frame, [done.label.iloc[0]])
    scores["scale"] = scores.row.map(scales)
    scores["seconds_per_step"] = scores.row.map(done.groupby("label").seconds_per_step.mean())
    metric = next(line["metric"] for line in lines if line["status"] == "finished")
    notes = [f"- {note}" for note in [f"Score: {metric} of the final weights, in percent.", *advice(frame), *notes]]
    table = score_text(scores)
    table.insert(2, "α/r", [NONE if pd.isna(scale) else f"{scale:g}" for scale in scores.scale])
    table["s/step"] = [number(value, 3) for value in scores.seconds_per_step]
    text = "\n".join([markdown(table), "", answer(scores, frame), "", *notes, ""])
    write_text(folder / "comparison.md", text)
    write_text(folder / "comparison.csv", as_csv(scores))
    tried = tuning_runs(as_frame(tuning))
    for drawing in draw(frame, scores, tried):
        write_bytes(folder / f"comparison_{drawing.kind}.png", drawing.png())
    print(f"\n{text}")  # after the files: a terminal without UTF-8 cannot show it
    print(f"written: {folder}/comparison.md, its figures and comparison.csv")


def answer(scores: pd.DataFrame, every: pd.DataFrame) -> str:
    """What a comparison shows: which method scores higher and by how much, or how many seeds would show it.

    Args:
        scores: see :func:`score_frame`; the first row is the reference. every: the runs.
    """
    done = finished(every)
    first, others = scores.row[0], scores[1:]
    differ = (others.low > 0) | (others.high < 0)
    sentences = []
    for row in others[differ].itertuples():
        which = "higher" if row.difference > 0 else "lower"
        low, high = sorted((abs(row.low), abs(row.high)))
        sentences.append(
            f"{row.row} scores {number(abs(row.difference))} points {which} than {first} (95 % interval {number(low)} "
            f"to {number(high)})."
        )
    if len(done) > 1 and done["last"].nunique() == 1:
        sentences.append("All runs have the same score: they have learned nothing, or the evaluation set is too small.")
    elif not differ.all():
        equal = others.row[~differ]
        needed = [seeds_for(1.0, paired(done, label, first)) for label in equal]
        hint = f"about {max(needed)} seeds would show one of 1 point" if all(needed) else "give more --seeds"
        sentences.append(f"No difference shown between {first} and {', '.join(equal)}; {hint}.")
    return " ".join(sentences)


def advice(every: pd.DataFrame) -> list[str]:
    """Why a method should not be judged by its runs yet, and what to change.

    If a low-rank method has learned nothing, Λ, the sum of the learning rates over the steps, tells whether it has
    hardly left its start or its rate is too high. Without Λ, a failure is reported without advice.
    """
    found = []
    for label, runs in finished(every).groupby("label", sort=False):
        failed = f"{runs.failed.sum()} of {len(runs)} runs of {label} learned nothing" if runs.failed.any() else ""
        rise = np.mean([scores[-1] - scores[-2] for scores in runs.scores if len(scores) > 1] or [0.0])
        sums = runs.rate_sum[runs.delta_norm.notna()]  # low-rank methods only
        if failed and (sums < SHORT).any():
            found.append(
                f"{failed} (Λ, the sum of the learning rates, is {sums.min():.2g}): train it longer, or raise its "
                "learning rate."
            )
        elif failed:
            found.append(f"{failed}{': lower its learning rate, or tune it' if sums.notna().any() else ''}.")
        elif rise > LEVEL:
            found.append(f"{label} still rose by {number(rise)} points at its last evaluation: train it longer.")
    return found
