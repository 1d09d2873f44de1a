"""What a selection chooses from its held-out scores, put into the runs that need it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.experiments.files import Run, Selection
from nlu.experiments.places import Places, model_name
from nlu.readers import read_json
from nlu.runs.digests import model_digest


def choose(selection: Selection | None, places: Places) -> dict[tuple, dict[str, Any]]:
    """For each key whose candidates have all ended: the value with the highest mean held-out score.

    A value with a failed run, or one without a score (a diverged loss, say), cannot be chosen. `edge` says that the
    winner is the smallest or largest value tried, so a better one may lie beyond. What another experiment chose is read
    from its records.
    """
    if selection and selection.taken_from:
        return _taken_choices(selection, places.measured.parent / selection.taken_from / "selection.json")
    chosen = {}
    for key, values in (selection.candidates if selection else {}).items():
        scores: dict[Any, float | None] = {}
        for value, runs in values.items():
            records = [read_json(places.record(run)) for run in runs]
            if any(record is None for record in records):
                break
            scores[value] = _mean_score(records)
        usable = {value: score for value, score in scores.items() if score is not None}
        if len(scores) < len(values) or not usable:
            continue
        best = max(usable, key=lambda value: usable[value])
        chosen[key] = {
            **dict(zip(selection.per, key, strict=True)),
            "chosen": best,
            "edge": len(values) > 1 and best in (min(values), max(values)),
            "held_out_scores": [{"value": value, "score": score} for value, score in scores.items()],
            "seeds": [run.arguments["seed"] for run in next(iter(values.values()))],
        }
    return chosen


def _mean_score(records: list[dict[str, Any]]) -> float | None:
    scores = [record.get("last") if record.get("status") == "finished" else None for record in records]
    numbers = [score for score in scores if isinstance(score, int | float) and math.isfinite(score)]
    return sum(numbers) / len(numbers) if len(numbers) == len(scores) else None


def _taken_choices(selection: Selection, path: Path) -> dict[tuple, dict[str, Any]]:
    """What selection.json of another experiment says, where that experiment still asks the same question."""
    made = read_json(path)
    if made is None:
        return {}
    found: dict[tuple, dict[str, Any]] = {}
    try:
        same = made["argument"] == selection.argument
        for entry in made["choices"]:
            key = tuple(entry[axis] for axis in selection.per)
            same = same and key not in found and entry["chosen"] in selection.values.get(key, [entry["chosen"]])
            digests = made.get("model_digests", [])  # older files have none
            found[key] = {"chosen": entry["chosen"], "models": list(made["models"]), "digests": list(digests)}
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{path} is not what {selection.taken_from} chooses now; run that experiment again")
    return {key: entry for key, entry in found.items() if key in selection.values}


def chosen_runs(
    final: list[Run], selection: Selection | None, choice: dict[tuple, dict[str, Any]]
) -> tuple[list[Run], list[Run]]:
    """The final runs with the chosen argument put in, and those for which there is no choice.

    Raises:
        UsageError: the choice was made by another experiment for another model.
    """
    if selection is None:
        return final, []
    ready = [run for run in final if selection.key(run) in choice]
    for run in ready if selection.taken_from else ():
        model, made = model_name(run), choice[selection.key(run)]
        models, digest = made["models"], model_digest(run.arguments.get("model_name_or_path"))
        if model in models and digest is not None and made["digests"] and digest not in made["digests"]:
            raise UsageError(
                f"{selection.taken_from} chose {selection.argument} for another model of the name {model}: run that "
                f"experiment with this one first (another --measured_dir), or pass --set {selection.argument}=VALUE"
            )
        if model not in models:
            raise UsageError(
                f"{selection.taken_from} chose {selection.argument} for {', '.join(models)}, not for {model}: run that "
                f"experiment with {model} first (another --measured_dir), or pass --set {selection.argument}=VALUE"
            )
    filled = [
        replace(run, arguments={**run.arguments, selection.argument: choice[selection.key(run)]["chosen"]})
        for run in ready
    ]
    return filled, [run for run in final if selection.key(run) not in choice]
