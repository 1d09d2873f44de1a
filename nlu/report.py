"""Write results/report.html: every table and figure on one self-contained page."""

import argparse
import html
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from loralib.files import write_text
from nlu.errors import UsageError, exit_code
from nlu.experiments.claims import claims_tables
from nlu.experiments.figures import Drawing, draw
from nlu.experiments.measured import load_measured
from nlu.experiments.published import PAPER_TABLES, published_table
from nlu.experiments.table_format import Bold, Table
from nlu.experiments.tuned import TUNED
from nlu.plots import image
from nlu.tables import TUNED_TITLE, measured_tables, tuned_tables

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = """\
Writes one page with all published and measured tables and all figures; it needs no network and no other file, can be
read with a screen reader and prints well. The same records give the same bytes."""

# What may stand unescaped in a data URL between double quotes; base64 would be larger, and would not compress.
PLAIN = " /:;=,()!*'<>@?|{}[]"

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #999; padding-bottom: .2rem; }
a { color: #004a80; } a:focus, .scroll:focus { outline: 3px solid #d55e00; outline-offset: 2px; }
.skip { position: absolute; left: -999rem; } .skip:focus { left: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap; }
thead th { white-space: normal; border-top: 2px solid #333; border-bottom: 1px solid #333; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 2px solid #333; }
tbody tr:nth-child(even) { background: #f3f5f7; }
th[scope=row], .text { text-align: left; font-weight: 400; }
ul.notes { font-size: .82rem; color: #444; margin: .2rem 0 1.4rem; padding-left: 1.2rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; flex: 1 1 32rem; max-width: 46rem; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .82rem; color: #444; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } nav, .skip { display: none; }
  .scroll { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; white-space: normal; }
  ul.notes, figcaption { font-size: 7pt; } .figures { display: block; }
  figure { display: inline-block; width: 48%; vertical-align: top; } figure img { max-height: 150mm; }
  table, figure { break-inside: avoid; } h2, h3, caption { break-after: avoid; }
  @page { size: A4 landscape; margin: 12mm; }
}
"""


def build_report(measured: Path, published: Path) -> str:
    """The page as text.

    Raises:
        UsageError: a damaged or missing file, which it names.
    """
    experiments = [experiment for experiment in load_measured(measured) if experiment.rows]
    titles, sections = {}, []
    for each in tqdm(experiments, desc="report", disable=not experiments):
        titles[_anchor(each.name)] = title = f"Measured: {each.name}"
        sections.append(_section(title, _anchor(each.name), measured_tables(each), draw(each)))
    if tuned := tuned_tables(experiments):
        titles[_anchor(TUNED)] = TUNED_TITLE
        sections.append(_section(TUNED_TITLE, _anchor(TUNED), tuned, []))
    claims = "\n".join(_table(table) for table in claims_tables(experiments, published))
    papers = "\n".join(_table(published_table(paper, published)) for paper in PAPER_TABLES)
    claims_section = f"""<section id="claims" aria-labelledby="claims-title">
<h2 id="claims-title">The paper's claims</h2>
{claims or "<p>None of the experiments that test them has been run.</p>"}
</section>"""
    links = '<li><a href="#claims">The paper\'s claims</a></li>' + "".join(
        f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for anchor, title in titles.items()
    )
    runs = sum(len(row.every) for experiment in experiments for row in experiment.rows)
    measured_text = f"{runs} finished runs of {len(experiments)} experiments." if experiments else "None yet."
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoRA² on GLUE: published and measured results</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>LoRA² on GLUE: published and measured results</h1>
<p>Measured here: {measured_text} Published numbers stand in tables, or (the claims) columns, of their own.
Averages, deviations, intervals and tests are computed from the records in results/measured/ by this repository.</p>
</header>
<nav aria-label="Contents"><ul>{links}<li><a href="#published">Published tables</a></li></ul></nav>
<main id="main">
{claims_section}
{"".join(sections)}
<section id="published" aria-labelledby="published-title">
<h2 id="published-title">Published tables</h2>
{papers}
</section>
</main>
</body>
</html>
"""


def _section(title: str, anchor: str, tables: list[Table], drawings: Iterable[Drawing]) -> str:
    text = "\n".join(_table(table) for table in tables)
    figures = "\n".join(
        f'<figure><img alt="{html.escape(drawing.title)}: {html.escape(drawing.text)}" '
        f'src="data:image/svg+xml,{quote(image(drawing, "svg"), safe=PLAIN)}">'
        f"<figcaption><strong>{html.escape(drawing.title)}.</strong> {html.escape(drawing.text)}</figcaption></figure>"
        for drawing in drawings
    )
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">{html.escape(title)}</h2>
{text}
<div class="figures">
{figures}
</div>
</section>
"""


def _table(table: Table) -> str:
    """An HTML table: header cells with a scope, the first column as row headers, notes below."""
    figures = [table.is_figure(i) for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{"" if figure else " class=text"}>{html.escape(name) or "configuration"}</th>'
        for name, figure in zip(table.header, figures, strict=True)
    )
    body = "\n".join(f"<tr>{_row(row, figures)}</tr>" for row in table.rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    title = html.escape(table.title)
    return f"""<div class="scroll" role="region" aria-label="{title}" tabindex="0">
<table id="{_anchor(table.stem)}"><caption>{title}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<ul class="notes">{notes}</ul>"""


def _row(row: list[str], figures: list[bool]) -> str:
    cells = [f'<th scope="row">{html.escape(row[0])}</th>']
    for cell, figure in zip(row[1:], figures[1:], strict=True):
        text = f"<strong>{html.escape(cell)}</strong>" if isinstance(cell, Bold) else html.escape(cell)
        cells.append(f"<td>{text}</td>" if figure else f'<td class="text">{text}</td>')
    return "".join(cells)


def _anchor(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "results"
    parser.add_argument("--measured_dir", type=Path, default=results / "measured", help="default: results/measured")
    parser.add_argument("--published_dir", type=Path, default=results / "published", help="default: results/published")
    parser.add_argument("--output", type=Path, default=results / "report.html", help="default: results/report.html")
    args = parser.parse_args(argv)
    try:
        write_text(args.output, build_report(args.measured_dir, args.published_dir))
    except (UsageError, OSError) as error:
        return exit_code(error)
    print(f"{args.output}: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
