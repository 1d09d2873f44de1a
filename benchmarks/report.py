"""The table of a benchmark run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One peer in one setting. Times are in seconds per step: one each round, and two for the method's own part."""

    setting: str
    key: str
    title: str
    seconds: list[float]
    method_seconds: list[float]
    tokens: float
    memory_bytes: int
    flops: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def method_median(self) -> float | None:
        return statistics.median(self.method_seconds) if self.method_seconds else None


def _rows(rows: dict[str, Measurement]) -> list[str]:
    limit, base = rows.get("limit"), rows.get("peft-lora")
    lines = [
        "| | s a step | range | tokens/s | of peft LoRA | of the limit | peak memory | regulariser + allocator |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, m in rows.items():
        # With the lengths of a task, peers pad differently, but their steps have the same number of examples.
        ratio = f"{m.median / base.median:.2f}" if base and key != "limit" else ""
        share = f"{limit.median / m.median:.0%}" if limit and key != "limit" else ""
        extra = f"{m.method_median * 1e3:.2f} ms ({m.method_median / m.median:.1%})" if m.method_median else ""
        title = f"{m.title} ({m.flops / m.median / 1e9:.0f} GFLOP/s)" if m.flops else m.title
        lines.append(
            f"| {title} | {m.median:.3f} | {min(m.seconds):.3f}–{max(m.seconds):.3f} | {m.tokens / m.median:.0f} "
            f"| {ratio} | {share} | {m.memory_bytes / 2**30:.2f} GiB | {extra} |"
        )
    return lines


def targets(settings: dict[str, dict[str, Measurement]]) -> list[str]:
    """The ratios for which the project has targets, if the run measured both sides."""
    lines = []

    def say(
        setting: str, what: str, upper: Measurement | None, lower: Measurement | None, field: str = "median"
    ) -> None:
        values = [getattr(m, field) if m else None for m in (upper, lower)]
        if all(values):
            lines.append(f"| {setting} | {what} | {values[0] / values[1]:.3f} |")

    for name, rows in settings.items():
        get = rows.get
        say(name, "step, LoRA² : peft LoRA, stock attention", get("lora2"), get("peft-lora"))
        say(name, "step, LoRA² : peft LoRA, bfloat16 weights", get("lora2"), get("peft-lora-bf16"))
        say(name, "step, LoRA² : LoRA here", get("lora2"), get("lora"))
        say(name, "step, LoRA² : AdaLoRA here", get("lora2"), get("adalora"))
        say(name, "regulariser + allocator, LoRA² : peft AdaLoRA", get("lora2"), get("peft-adalora"), "method_median")
        say(name, "an epoch, LoRA² : as first published", get("lora2"), get("published"))
        say(name, "peak memory, LoRA² : peft LoRA", get("lora2"), get("peft-lora"), "memory_bytes")
        other = settings.get(name.replace("bfloat16", "float32", 1)) if name.startswith("bfloat16") else None
        if other:
            say(name, "LoRA² step, bfloat16 : float32", get("lora2"), other.get("lora2"))
    return ["| setting | ratio | |", "| --- | --- | ---: |", *lines] if lines else []


def section(record: dict[str, Any]) -> str:
    """A record as Markdown: the machine, a table for each setting, and the ratios."""
    settings: dict[str, dict[str, Measurement]] = {}
    for each in record["measurements"]:
        settings.setdefault(each["setting"], {})[each["key"]] = Measurement(**each)
    machine = record["machine"]
    names = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"## {record['name']}",
        "",
        f"{machine['device']}, {machine['threads']} threads, {machine['system']}; {names}; {record['started_at']}; "
        f"medians of {record['rounds']} rounds.",
        "",
    ]
    for name, rows in settings.items():
        lines += [f"### {name}", "", *_rows(rows), ""]
    if record.get("failure"):
        lines += [f"Ended early: {record['failure']}", ""]
    ratios = targets(settings)
    return "\n".join([*lines, *(["### Ratios", "", *ratios, ""] if ratios else [])])
