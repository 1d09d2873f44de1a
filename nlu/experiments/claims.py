"""The questions that a report answers (`configs/experiments/claims.yaml`), each with its experiments and claims.

questions:
  - question: Does LoRA² score more than LoRA of its size?
    experiments: [evidence]             # several: their runs are compared together, label by label
    tuned: rate                         # optional: an axis of the grid; on each task a row takes the value with the
                                        # lowest mean loss at the last evaluation
    against: LoRA                       # optional: one table compares every row with this one, in place of the others
    claims:                             # optional, written down before the runs; labels as tables print them
      - {label: LoRA², against: LoRA, expect: higher, published: 1.05, source: Table 1}   # or "not lower", "level"
published:                              # the cited tables: files of results/published/
  - {file: lora2_table1_deberta_v3_base, title: "LoRA², Table 1: DeBERTaV3-base"}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.json_yaml import check, read_yaml


@dataclass(frozen=True, eq=False)  # two questions may make the same claim of different runs
class Claim:
    """`label` against `against`; `published` is the gain that a paper reports, in points, and `source` says where."""

    label: str
    against: str
    expect: str
    published: float | None
    source: str


@dataclass(frozen=True)
class Question:
    """A section of the report."""

    question: str
    experiments: list[str]
    claims: list[Claim]
    tuned: str | None = None
    against: str | None = None


def load_questions(path: Path) -> tuple[list[Question], list[dict[str, Any]]]:
    """The questions, and the published tables, of a file.

    Raises:
        UsageError: a file that cannot be read, an unknown key, a claim that expects something else or compares a row
            with itself, or claims beside `against`, whose table shows none.
    """
    content = read_yaml(path)
    check(content, "claims", str(path))
    for raw in content.get("questions") or []:
        claims, where = raw.get("claims") or [], f"{path}: {raw['question']}"
        if claims and "against" in raw:
            raise UsageError(f"{where} has claims, which its table against {raw['against']} does not show: leave one")
        if same := [claim["label"] for claim in claims if claim["label"] == claim["against"]]:
            raise UsageError(f"{where} claims something of {same[0]} against itself")
    questions = [
        Question(
            raw["question"],
            raw["experiments"],
            [Claim(**{"published": None, "source": "", **claim}) for claim in raw.get("claims") or []],
            raw.get("tuned"),
            raw.get("against"),
        )
        for raw in content.get("questions") or []
    ]
    return questions, content.get("published") or []
