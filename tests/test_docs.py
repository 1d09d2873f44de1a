"""README and docs: their commands name programs, flags and files that there are, their links lead somewhere."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from loralib.interop import export
from nlu import arguments, compare, predict, report, sweep
from nlu.experiments.cells import number
from nlu.experiments.statistics import (
    averages,
    estimate,
    finished,
    load_measured,
    mean_of_medians,
    paired,
    tuned_over,
)
from nlu.experiments.tables import against_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "nlu/run_glue.py": arguments.build_parser,
    "nlu/predict.py": predict.build_parser,
    "nlu/sweep.py": sweep.build_parser,
    "nlu/report.py": report.build_parser,
    "loralib.export": export._parser,
}


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, indented or in backticks, without comments; a backslash joins lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    start = r"(?:[A-Z_]+=\S+ )*(?:python|bash) "
    lines = re.findall(rf"^    ({start}.*)$", text, re.M) + re.findall(rf"`({start}[^`]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_name_what_there_is(page):
    for words in commands(page):
        program = next((word for word in words if word in PARSERS or (ROOT / word).is_file()), None)
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert program, words
        if program in PARSERS:
            known = flags_of(PARSERS[program]())
        elif program.startswith("scripts/run_"):
            known = flags_of(arguments.build_parser())
        elif program == "nlu/compare.py":
            known = flags_of(compare.own_parser()) | flags_of(arguments.build_parser())
        else:
            known = set(re.findall(r"--\w+", (ROOT / program).read_text()))
        assert given <= {*known, "--help"}, (words, given - known)
        for word in words:
            assert not re.match(r"(configs|scripts|nlu|benchmarks)/", word) or (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_code_are_whole(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
        target = link[0] or link[1]
        assert target.startswith("http") or (page.parent / target).exists(), target
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        compile(code, page.name, "exec")
    assert page.name != "README.md" or text.count("\n") <= 150


def with_interval(mean: float, low: float, high: float, digits: int = 2) -> str:
    mean, low, high = (number(value, digits, sign=True) for value in (mean, low, high))
    return f"{mean} ({low} to {high})"


def test_the_table_of_the_recipe_is_that_of_the_records():
    """Row by row; the page describes in words what the file calls by a name."""
    runs = load_measured(ROOT / "results/measured")
    runs = runs[runs.experiment == "screening"]
    compared = against_table("", tuned_over(runs, "rate"), "plus").data.set_index("row")
    expected = []
    for row, own in runs.groupby(runs["axes"].map(lambda axes: axes["row"])):
        scores = own.groupby(["task", own["axes"].map(lambda axes: axes["rate"])])["last"].mean()
        cells = [
            ", ".join(number(scores[task, rate], 1) for rate in ("low", "middle", "high")) for task in ("cola", "stsb")
        ]
        change = compared.loc[row]
        changes = [
            with_interval(*change[list(names)], digits=1)
            for names in (("loss_change", "loss_low", "loss_high"), ("difference", "low", "high"))
        ]
        expected.append(("–", "–", *cells) if row == "plus" else (*changes, *cells))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8").partition("### What each part does")[2]
    table = [re.split(r" (?<!\\)\| ", line.strip("| "))[1:] for line in page.splitlines() if line.startswith("| ")]
    assert sorted(map(tuple, table[2:])) == sorted(expected)


def readme_rows() -> list[tuple[str, ...]]:
    """What README's table of results must hold: of every row with all tasks."""
    runs = finished(load_measured(ROOT / "results/measured"))
    tuned, untouched = (runs[runs.experiment == name] for name in ("evidence", "confirmation"))
    rows = []
    variants = ["LoRA² plus, half the steps", "LoRA² k=8, full importance"]  # of rows that are there
    for label, own in tuned[~tuned.label.isin(variants)].groupby("label", sort=False):
        size = own.adapter_params.max()
        against = min(
            ("LoRA r=8", "LoRA r=1"), key=lambda name: abs(size - tuned[tuned.label == name].adapter_params.max())
        )
        cells = [label, f"{size:,.0f}"]
        for part in (tuned, untouched):
            pairs = paired(part, label, against)
            result = estimate(pairs.difference, pairs.task)
            figures = [result.mean, *result.interval] if label != against and len(pairs) else []
            average = averages(part).get(label)
            cells += [number(average and average.mean, 1)]
            cells += [with_interval(*figures) if figures else "–"]
            if part is tuned:
                cells += [number(mean_of_medians(pairs.difference, pairs.task), sign=True) if figures else "–"]
        rows.append((*cells,))
    return sorted(rows, key=lambda row: len(row[1]), reverse=True)


def test_the_table_of_differences_is_that_of_the_records():
    """A lost run ends more than 25 points below the median of its row and task."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8").partition("### Score")[2]
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    runs = finished(load_measured(ROOT / "results/measured"))
    runs = runs[runs.experiment == "evidence"]
    lost = runs["last"] < runs.groupby(["label", "task"])["last"].transform("median") - 25
    assert [f"{run.label}, {run.task}, {run.last:.1f}" for run in runs[lost].itertuples()] == [
        "LoRA r=8, qnli, 49.5",
        "AdaLoRA, stsb, 44.7",
    ]
    against, expected = "LoRA r=8", []
    for label, *_ in table:
        against = "LoRA r=1" if label in ("LoRA² k=1", "BitFit") else against
        every, kept = (paired(part, label, against) for part in (runs, runs[~lost]))
        changes = [estimate(pairs.difference, pairs.task) for pairs in (every, kept)]
        texts = [with_interval(change.mean, *change.interval) for change in changes]
        if texts[0] == texts[1]:
            texts[1] = "the same"
        seeds = f"{every.seed.nunique()}"
        expected.append([label, seeds, *texts, number(mean_of_medians(every.difference, every.task), sign=True)])
    assert len(table) >= 13 and table == expected


def test_the_table_of_the_readme_is_that_of_the_records():
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results so far")[2]
    runs = finished(load_measured(ROOT / "results/measured"))
    remains = (100 * runs.live_adapter_params / runs.adapter_params)[runs.experiment == "evidence"].groupby(runs.label)
    shares = [f"{remains.mean()[label]:.0f}" for label in ("LoRA² k=8", "LoRA² k=1")]
    assert f"which leaves {' and '.join(shares)} % of their parameters" in page
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [tuple(line.strip("| ").split(" | ")) for line in table[2:]] == readme_rows()
