"""One table as Markdown, CSV and LaTeX."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralib.files import write_text

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    "−": "$-$",
    "–": "--",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "†": r"\dag{}",
    "Δ": r"$\Delta$",
    "Λ": r"$\Lambda$",
    "…": r"\dots{}",
}


class Bold(str):
    """A cell that stands out: the best of its column."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table of text cells. `data` holds the same figures unrounded, one dictionary a line, for the CSV file.

    `stem` names the files; `notes` say how the figures came about.
    """

    stem: str
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    data: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        """A title, the table (text left, figures right) and the notes."""
        lines = [f"### {one_line(self.title)}", "", _md_line(self.header)]
        lines.append("|" + "|".join(" ---: " if self.is_figure(i) else " --- " for i in range(len(self.header))) + "|")
        lines += [_md_line([f"**{cell}**" if isinstance(cell, Bold) else cell for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *[f"- {one_line(note)}" for note in self.notes]]) + "\n"

    def latex(self) -> str:
        """A `table` environment for the booktabs package; the notes follow the caption."""
        align = "".join("r" if self.is_figure(i) else "l" for i in range(len(self.header)))
        body = [
            " & ".join(rf"\textbf{{{latex(cell)}}}" if isinstance(cell, Bold) else latex(cell) for cell in row)
            for row in self.rows
        ]
        lines = [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{latex(' '.join([self.title + '.', *self.notes]))}}}",
            rf"\label{{tab:{self.stem}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            " & ".join(map(latex, self.header)) + r" \\",
            r"\midrule",
            *[line + r" \\" for line in body],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Unrounded figures where the table has them (an empty field: not there), else the cells."""
        output = io.StringIO()
        if self.data:
            names = list(dict.fromkeys(name for line in self.data for name in line))
            writer = csv.DictWriter(output, names, lineterminator="\n")
            writer.writeheader()
            # Rounded where libraries' versions may differ in the last bits: equal records must give equal bytes.
            writer.writerows(
                {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()} for line in self.data
            )
        else:
            csv.writer(output, lineterminator="\n").writerows([self.header, *self.rows])
        return output.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write `stem`.md, .csv and .tex."""
        contents = {"md": self.markdown(), "csv": self.csv(), "tex": self.latex()}
        paths = [folder / f"{self.stem}.{suffix}" for suffix in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            write_text(path, content)
        return paths

    def is_figure(self, column: int) -> bool:
        """Whether a column holds figures only (dashes and empty cells aside) and so is set to the right."""
        cells = [row[column] for row in self.rows if row[column] not in ("", NONE)]
        return bool(cells) and all(cell.lstrip("+-−< ")[:1].isdigit() for cell in cells)


NONE = "–"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure with a fixed number of digits, or a dash."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with separators, or a dash; a mean that is not whole keeps one digit."""
    return NONE if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def p_value(value: float | None) -> str:
    """A p value to three digits."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def bold_best(cells: list[str], values: list[float | None]) -> list[str]:
    """The same cells, those of the highest value bold (as shown: equal text counts as equal)."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return cells
    best = cells[values.index(max(known))]
    return [Bold(cell) if cell == best else cell for cell in cells]


def latex(text: str) -> str:
    """Text with LaTeX's special characters written out."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def one_line(text: str) -> str:
    """Text without line breaks, which would end a row of a table, a heading or (in LaTeX) a paragraph."""
    return " ".join(text.splitlines())


def _md_line(cells: list[str]) -> str:
    return "| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def remove_stale(page: Path, mark: str, keep: set[Path], suffixes: tuple[str, ...]) -> None:
    """Remove generated files that are generated no more from a page's folder; only if the page there bears the mark."""
    if page.exists() and page.read_text(encoding="utf-8").startswith(mark):
        for path in {path for suffix in suffixes for path in page.parent.glob(f"*.{suffix}")} - keep:
            path.unlink()
