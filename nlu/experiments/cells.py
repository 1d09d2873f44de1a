"""A table, its cells, and how they are printed: figures with a fixed number of digits, in Markdown, CSV and LaTeX."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nlu.experiments.statistics import Change, Estimate

NONE = "–"
Cell = tuple[str, dict[str, Any]]  # what is printed, and the figures behind it by their names


@dataclass(frozen=True)
class Table:
    """A table: rows of cells under their headings; `notes` explain them."""

    name: str
    title: str
    rows: list[dict[str, Cell]]
    notes: list[str]

    @property
    def text(self) -> pd.DataFrame:
        """What is printed."""
        return pd.DataFrame([{head: text for head, (text, _) in row.items()} for row in self.rows])

    @property
    def data(self) -> pd.DataFrame:
        """The figures, unrounded."""
        return pd.DataFrame([{k: v for _, figures in row.values() for k, v in figures.items()} for row in self.rows])

    def markdown(self) -> str:
        """The title, the table and the notes."""
        cells = self.text.map(markdown_text).rename(columns=markdown_text)
        if "verdict" in cells:
            cells["verdict"] = cells["verdict"].map(lambda answer: answer and f"**{answer}**")
        sides = ["left" if i < self._words() else "right" for i in range(len(cells.columns))]
        body = cells.to_markdown(index=False, colalign=sides, disable_numparse=True, tablefmt="pipe")
        return "\n".join([f"**{markdown_text(self.title)}**", "", body, "", *[f"- {note}" for note in self.notes], ""])

    def csv(self) -> str:
        """Figures rounded to six digits, where libraries' versions may differ: equal lines give equal bytes."""
        return self.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")

    def latex(self) -> str:
        """A `table` environment for the booktabs package; the notes follow the caption."""
        escaped = self.text.map(latex_text).rename(columns=latex_text)
        sides = "".join("l" if i < self._words() else "r" for i in range(len(escaped.columns)))
        caption = latex_text(" ".join([f"{self.title}.", *self.notes]))
        return escaped.to_latex(
            index=False, escape=False, column_format=sides, caption=caption, label=f"tab:{self.name}"
        )

    def _words(self) -> int:
        """How many leading columns hold words; the others hold figures and are set to the right."""
        figures = [all(cell[:1] in "0123456789+-−<–" for cell in column) for _, column in self.text.items()]
        return figures.index(True) if True in figures else len(figures)


def markdown_text(text: str) -> str:
    """Text on one line, with a backslash before what Markdown would not print; an underscore inside a word stays."""
    marks = r"[\\`*|]|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters written out; other letters are UTF-8, which LaTeX reads."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
               "²": r"\textsuperscript{2}", "−": "$-$", "Δ": r"$\Delta$", "Λ": r"$\Lambda$", "†": r"\dag{}",
               "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
               **{c: f"\\{c}" for c in "&%$#_{}"}}  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure with a fixed number of digits, or a dash."""
    return NONE if value is None or pd.isna(value) else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A figure with its sign."""
    return number(value, sign=True)


def signed_percent(value: float) -> str:
    """A change in percent."""
    return number(value, 1, sign=True)


def count(value: float | None) -> str:
    """A whole number with separators, or a dash."""
    return NONE if value is None or pd.isna(value) else f"{value:,.0f}"


def spread(low: float | None, high: float | None, form: Callable[[Any], str] = count) -> str:
    """A range, or one figure where both ends print alike."""
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def cell(text: str, **figures: Any) -> Cell:
    """One place of a table."""
    return text, figures


def counted(name: str, value: float | None) -> Cell:
    return count(value), {name: value}


def rounded(name: str, value: float | None, digits: int = 2, sign: bool = False) -> Cell:
    return number(value, digits, sign), {name: value}


def ranged(name: str, values: pd.Series, form: Callable[[Any], str] = count) -> Cell:
    """From the least to the most of some values."""
    least, most = values.min(), values.max()
    return spread(least, most, form), {f"{name}_least": least, f"{name}_most": most}


def with_deviation(name: str, values: pd.Series, digits: int = 1) -> Cell:
    """Mean ± standard deviation."""
    mean, deviation = values.mean(), values.std(ddof=1)
    text = number(mean, digits) if pd.isna(deviation) else f"{number(mean, digits)} ± {number(deviation, digits)}"
    return text, {name: mean, f"{name}_std": deviation}


def interval(result: Estimate | Change | None, form: Callable[[Any], str] = number, of: str = "") -> Cell:
    """The 95 % interval of an estimate, where there is one; `of` begins the names of its figures."""
    low, high = (result.interval if result else None) or (None, None)
    return NONE if low is None else spread(low, high, form), {f"{of}low": low, f"{of}high": high}
