"""Chooses arguments by their held-out losses, and puts them into the final runs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from nlu.experiments.experiment import Run, Selection
from nlu.experiments.places import Places


@dataclass(frozen=True)
class Tried:
    """Values that a selection tries for one key, and their mean held-out loss at the last evaluation.

    `ended` says whether every run has ended; `loss` is None where one failed or has not ended.
    """

    values: dict[str, Any]
    ended: bool
    loss: float | None


def second_round(selection: Selection, places: Places, keys: Iterable[tuple] | None = None) -> list[Run]:
    """The runs of one more value (one for each seed) where the best of the first round is the smallest or the largest.

    Args:
        keys: the keys to look at; all without it. A key whose first round has not ended has no second round yet.
    """
    extra = []
    for key in selection.candidates if keys is None else keys:
        first = _first_round(selection, places, key)
        best = _best(first)
        if best is None or not all(tried.ended for tried in first):
            continue
        for name, factor in selection.beyond.items():
            values = selection.candidates[key].values.get(name, [])
            further = _further(best.values[name], values, factor)
            if further is not None:
                extra += selection.runs_of(key, {**best.values, name: further}, extra=True)
    return extra


def choose(selection: Selection | None, places: Places) -> dict[tuple, dict[str, Any]]:
    """For each key whose runs of both rounds have all ended: the values with the lowest mean held-out loss.

    Values with a failed run cannot be chosen; of equal losses the first listed wins.
    """
    chosen = {}
    for key in selection.candidates if selection else ():
        extra: dict[tuple, list[Run]] = {}
        for run in second_round(selection, places, [key]):
            extra.setdefault(tuple(run.tried.items()), []).append(run)
        tried = _first_round(selection, places, key)
        tried += [_tried(dict(values), runs, places) for values, runs in extra.items()]
        best = _best(tried)
        if best is not None and all(each.ended for each in tried):
            chosen[key] = best.values
    return chosen


def chosen_runs(
    final: list[Run], selection: Selection | None, choice: dict[tuple, dict[str, Any]]
) -> tuple[list[Run], list[Run]]:
    """The final runs with the chosen arguments put in, and those for which there is no choice."""
    if selection is None:
        return final, []
    ready, waiting = [], []
    for run in final:
        values = choice.get(selection.key(run))
        if values is None:
            waiting.append(run)
        else:
            ready.append(replace(run, arguments={**run.arguments, **values}, tried=values))
    return ready, waiting


def _first_round(selection: Selection, places: Places, key: tuple) -> list[Tried]:
    every = selection.candidates[key].combinations()
    return [_tried(values, selection.runs_of(key, values), places) for values in every]


def _tried(values: dict[str, Any], runs: list[Run], places: Places) -> Tried:
    lines = [places.line(run) for run in runs]
    losses = [line["evaluations"]["loss"][-1] for line in lines if line and line["status"] == "finished"]
    mean = sum(losses) / len(losses) if len(losses) == len(runs) else None
    return Tried(values, None not in lines, mean)


def _best(tried: list[Tried]) -> Tried | None:
    usable = [each for each in tried if each.loss is not None]
    return min(usable, key=lambda each: each.loss, default=None)


def _further(best: float, values: list[float], factor: float) -> float | None:
    """The value beyond the end at which the best lies, to six digits; None inside, and without a range."""
    if len(values) < 2 or best not in (min(values), max(values)):
        return None
    return float(f"{best * factor if best == max(values) else best / factor:.6g}")
