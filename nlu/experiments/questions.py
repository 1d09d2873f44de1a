"""The questions that a report answers (`configs/experiments/claims.yaml`), each with its experiments and claims.

questions:
  - question: Does LoRA² score more than LoRA of its size?
    experiments: [evidence]             # several: their runs are compared together, label by label
    labels: [LoRA, LoRA²]               # optional: only these rows
    claims:                             # optional, written down before the runs; labels as tables print them
      - {label: LoRA², against: LoRA, expect: higher, published: 1.05, source: Table 1}   # or "not lower", "level"
published:                              # the cited tables: files of results/published/
  - {file: lora2_table1_deberta_v3_base, title: "LoRA², Table 1: DeBERTaV3-base"}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.experiments.checks import mapping, mappings, value_list
from nlu.experiments.experiment import read_yaml

EXPECTED = ("higher", "not lower", "level")


@dataclass(frozen=True)
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
    labels: list[str] | None
    claims: list[Claim]


def load_questions(path: Path) -> tuple[list[Question], list[dict[str, Any]]]:
    """The questions, and the published tables, of a file.

    Raises:
        UsageError: a file that cannot be read, an unknown key, or a claim that expects something else.
    """
    try:
        content = mapping(read_yaml(path), "the file", {"questions", "published"})
        questions = [
            _question(raw)
            for raw in mappings(content.get("questions"), "questions", {"question", "experiments", "labels", "claims"})
        ]
        return questions, mappings(content.get("published"), "published", {"file", "title"})
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _question(raw: dict[str, Any]) -> Question:
    text = raw.get("question")
    if not isinstance(text, str) or not text.strip():
        raise UsageError("every entry of questions needs a question")
    claims = [_claim(each) for each in mappings(raw.get("claims"), f"claims of {text!r}",
                                                {"label", "against", "expect", "published", "source"})]  # fmt: skip
    labels = None if raw.get("labels") is None else list(map(str, value_list(raw["labels"], f"labels of {text!r}")))
    names = list(map(str, value_list(raw.get("experiments"), f"experiments of {text!r}")))
    return Question(text, names, labels, claims)


def _claim(raw: dict[str, Any]) -> Claim:
    if not isinstance(raw.get("label"), str) or not isinstance(raw.get("against"), str):
        raise UsageError("a claim needs label and against, as tables print them")
    published = raw.get("published")
    if raw.get("expect") not in EXPECTED or not (published is None or isinstance(published, int | float)):
        raise UsageError(f"the claim on {raw['label']} must expect one of {', '.join(EXPECTED)}; published is a number")
    return Claim(raw["label"], raw["against"], raw["expect"], published, str(raw.get("source", "")))
