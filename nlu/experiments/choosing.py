"""Chooses arguments by their held-out losses, and puts them into the final runs."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from nlu.experiments.experiment import Run, Selection
from nlu.experiments.places import Places


@dataclass(frozen=True)
class Tried:
    """Values that a selection tries for one key, the runs that do, and their mean held-out loss at the end.

    `ended` says whether every run has ended; `loss` is None where one failed or has not ended.
    """

    values: dict[str, Any]
    runs: list[Run]
    ended: bool
    loss: float | None


def second_round(selection: Selection, places: Places, keys: Collection[tuple] | None = None) -> list[Run]:
    """The runs of one more value (one for each seed) where the best of the first round is the smallest or the largest.

    Args:
        keys: the keys to look at; all without it. A key whose first round has not ended has no second round yet.
    """
    extra = []
    for key, runs in selection.by_key(selection.runs).items():
        first = _tried(runs, places) if keys is None or key in keys else []
        best = _best(first)
        if best is None:
            continue
        for name, factor in selection.beyond.items():
            further = _further(best.values[name], [tried.values[name] for tried in first], factor)
            if further is not None:
                extra += [run.trying({**best.values, name: further}, extra=True) for run in best.runs]
    return extra


def possible_second_round(selection: Selection | None, runs: list[Run]) -> list[Run]:
    """Every run that :func:`second_round` may ask for after these of the first round, whichever values win."""
    possible = []
    for own in selection.by_key(runs).values() if selection else ():
        for name, factor in selection.beyond.items():
            # One for each of the values tried, however many seeds try them.
            values = [tried[name] for tried in {tuple(run.tried.items()): run.tried for run in own}.values()]
            for run in own:
                further = _further(run.tried[name], values, factor)
                if further is not None:
                    possible.append(run.trying({**run.tried, name: further}, extra=True))
    return possible


def choose(selection: Selection | None, places: Places) -> dict[tuple, dict[str, Any]]:
    """For each key whose runs of both rounds have all ended: the values with the lowest mean held-out loss.

    Values with a failed run cannot be chosen; of equal losses the first listed wins.
    """
    if selection is None:
        return {}
    runs = selection.by_key([*selection.runs, *second_round(selection, places)])
    best = {key: _best(_tried(own, places)) for key, own in runs.items()}
    return {key: tried.values for key, tried in best.items() if tried is not None}


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


def made_otherwise(waiting: list[Run], selection: Selection | None, places: Places) -> list[Run]:
    """Of final runs that wait for their choice, those that are finished with arguments that none of the values tried
    gives; each is returned with the first of them."""
    if selection is None:
        return []
    tried = selection.by_key([*selection.runs, *possible_second_round(selection, selection.runs)])
    found = []
    for run in waiting:
        key = selection.key(run)
        possible = [chosen_runs([run], selection, {key: each.tried})[0][0] for each in tried[key]]
        if all(places.state(each) == "changed" for each in possible):
            found.append(possible[0])
    return found


def not_finished(selecting: list[Run], final: list[Run], selection: Selection | None, places: Places) -> list[Run]:
    """The runs of both stages that a sweep has yet to make; a final run that waits for its choice is one of them."""
    known, waiting = chosen_runs(final, selection, choose(selection, places))
    return [run for run in [*selecting, *known] if places.state(run) != "finished"] + waiting


def _tried(runs: list[Run], places: Places) -> list[Tried]:
    """The runs of one key by the values that they try."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.tried.items()), []).append(run)
    found = []
    for values, own in groups.items():
        lines = [places.line(run) for run in own]
        losses = [line["evaluations"]["loss"][-1] for line in lines if line and line["status"] == "finished"]
        found.append(Tried(dict(values), own, None not in lines, fmean(losses) if len(losses) == len(own) else None))
    return found


def _best(tried: list[Tried]) -> Tried | None:
    """The values with the lowest loss; None where a run has not ended, or all values have a failed one."""
    usable = [each for each in tried if each.loss is not None]
    return min(usable, key=lambda each: each.loss, default=None) if all(each.ended for each in tried) else None


def _further(best: float, values: list[float], factor: float) -> float | None:
    """The value beyond the end at which the best lies, to six digits; None inside, and without a range of numbers.

    Of whole numbers it is the next whole one, and 1 at the least.
    """
    if isinstance(best, str | bool) or len(values) < 2 or best not in (min(values), max(values)):
        return None
    largest = best == max(values)
    further = float(f"{best * factor if largest else best / factor:.6g}")
    if all(isinstance(value, int) for value in values):
        further = math.ceil(further) if largest else max(math.floor(further), min(best, 1))
    return None if further in values else further  # 0 is its own multiple
