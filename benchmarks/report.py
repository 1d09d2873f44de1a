"""The tables of the measured steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One row in one setting.

    Attributes:
        seconds: of a step, one value a round; value i of all rows is of the same round.
        tokens: of a step. memory_bytes: peak of the process above that of one with the libraries loaded, or on the
            CUDA device.
        trained_parameters: without the head. adapter_bytes: of the saved weights, the head among them. merges: whether
            the trained model becomes a plain one. None for the limit, which trains nothing.
    """

    setting: str
    row: str
    seconds: list[float]
    tokens: int
    memory_bytes: int
    trained_parameters: int | None = None
    adapter_bytes: int | None = None
    merges: bool | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Measurement) -> str:
        """The ratio of the medians, and the range of the rounds' ratios."""
        rounds = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return f"{self.median / other.median:.3f} ({min(rounds):.2f}–{max(rounds):.2f})"


def table(rows: dict[str, Measurement], reference: str) -> list[str]:
    """The Markdown table of one setting; ratios are to the row `reference`, and to peft's LoRA if it was measured."""
    base, peft, limit = rows[reference], rows.get("peft"), rows.get("limit")
    heads = ["", "s a step", f"of {reference}"]
    heads += ["of peft"] if peft and reference != "peft" else []
    heads += ["limit, of the step"] if limit else []
    heads += ["peak memory", f"of {reference}", "trained parameters", "saved MB", "merges"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, m in rows.items():
        cells = [name, f"{m.median:.3f}", m.ratio(base)]
        cells += [f"{m.median / peft.median:.3f}"] if peft and reference != "peft" else []
        cells += [f"{limit.median / m.median:.0%}"] if limit else []
        cells += [f"{m.memory_bytes / 2**20:,.0f} MiB", f"{m.memory_bytes / max(base.memory_bytes, 1):.2f}"]
        if m.trained_parameters is None:
            cells += ["", "", ""]
        else:
            cells += [f"{m.trained_parameters:,}", f"{m.adapter_bytes / 1e6:.2f}", "yes" if m.merges else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(record: dict[str, Any]) -> str:
    """A record as Markdown: the machine, and a table for each setting."""
    settings: dict[str, dict[str, Measurement]] = {}
    for each in record["measurements"]:
        settings.setdefault(each["setting"], {})[each["row"]] = Measurement(**each)
    machine = record["machine"]
    names = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"## {record['name']}", "",
        f"{machine['device']} ({machine['instructions']}), {machine['threads']} threads, {machine['system']}; {names}; "
        f"{record['started_at']}. Medians of {record['rounds']} interleaved rounds; in brackets the range of the "
        "rounds' ratios. The saved weights include the head.", "",
    ]  # fmt: skip
    for name, rows in settings.items():
        reference = record["reference"] if record["reference"] in rows else next(iter(rows))
        lines += [f"### {name}", "", *table(rows, reference), ""]
    if record["failure"]:
        lines += [f"Ended early: {record['failure']}", ""]
    return "\n".join(lines)
