"""The questions of this study (`questions.yaml`), each about one experiment.

questions:
  - question: Does LoRA² score higher than LoRA on {tasks}?   # {model}, {tasks}, {experiment}: those of the runs
    experiment: base
    against: [LoRA r=8, LoRA r=1]       # optional: each row is compared with the listed row that is closest in size
    claims:                             # optional, written down before the runs; labels as tables print them
      - {label: LoRA², expect: higher, published: 1.05, source: Table 1}   # or "not lower", "level"; against: a row
    runs: 100                           # optional: nothing is shown until exactly this many runs are there, all
                                        # finished; in a tuning every run that has ended counts
    repeat_failed: true                 # optional: a run that learned nothing counts when it was repeated with
                                        # seed + 100 (plan no such seeds)
    test: [mrpc]                        # optional: tasks that are scored on their labelled test set; nothing is shown
                                        # while a finished run lacks that score
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nlu.errors import UsageError, reason
from nlu.json_yaml import read_yaml
from results.study.inference import EXPECTED


@dataclass(frozen=True)
class Claim:
    """How the row `label` should compare with `against`; `published` is the gain in points that `source` reports."""

    label: str
    expect: str
    against: str | None = None
    published: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.expect not in EXPECTED:
            raise ValueError(f"expect: {self.expect} is none of {', '.join(EXPECTED)}")


@dataclass(frozen=True)
class Question:
    """A section of the page."""

    question: str
    experiment: str
    against: Sequence[str] = ()
    claims: Sequence[Claim] = ()
    runs: int = 0
    repeat_failed: bool = False
    test: Sequence[str] = ()


def load_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UsageError: the file cannot be read, or a key or value is unknown or missing.
    """
    content = read_yaml(path)
    try:
        return [
            Question(**raw | {"claims": [Claim(**claim) for claim in raw.get("claims", ())]})
            for raw in content["questions"]
        ]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: {reason(error, 200)}; results/study/questions.py explains the format") from None
