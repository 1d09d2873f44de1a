"""README and docs: programs, flags, files and links in them exist, and their results are those of the records."""

import argparse
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

import loralib
from loralib.interop import export
from nlu import ROOT, command_line, compare, predict, report, sweep
from nlu.experiments.statistics import load_measured
from nlu.experiments.tables import number, with_interval
from results.study import make
from results.study.questions import load_questions
from results.study.runs import scored_on_test
from results.study.tables import score_table

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "nlu.run_glue": command_line.build_parser,
    "nlu/run_glue.py": command_line.build_parser,
    "nlu/predict.py": predict.build_parser,
    "nlu/sweep.py": sweep.build_parser,
    "nlu/report.py": report.build_parser,
    "results/study/make.py": make.build_parser,
    "loralib.export": export._parser,
}


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, indented or in backticks, without comments; a backslash joins lines."""
    text = re.sub(r"\\+\n", " ", page.read_text(encoding="utf-8"))
    start = r"(?:cat \S+ \| )?(?:[A-Z_]+=\S+ )*(?:python|bash) "
    lines = re.findall(rf"^    ({start}.*)$", text, re.M) + re.findall(rf"`({start}[^`]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "nlu").glob("*.py"))], ids=lambda path: path.name)
def test_commands_name_existing_programs_flags_and_files(page):
    assert commands(ROOT / "README.md") and commands(ROOT / "nlu/run_glue.py")
    for words in commands(page):
        program = next((word for word in words if word in PARSERS or (ROOT / word).is_file()), None)
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert program, words
        if program in PARSERS:
            known = flags_of(PARSERS[program]())
        elif program.startswith("scripts/run_"):
            known = flags_of(command_line.build_parser())
        elif program == "nlu/compare.py":
            known = flags_of(compare.own_parser()) | flags_of(command_line.build_parser())
        else:
            known = set(re.findall(r"--\w+", (ROOT / program).read_text()))
        assert given <= known, (words, given - known)
        rest = words[words.index(program) + 1 :]
        if program == "nlu/run_glue.py":
            command_line.parse_arguments(rest)
        elif program == "nlu/compare.py":
            own, flags = compare.own_parser().parse_known_args(rest)
            for run in compare.plan(own, compare.flag_values(flags)).runs:
                run.parse()
        elif program in PARSERS and rest:
            PARSERS[program]().parse_args(rest)
        for word in words:
            assert not re.match(r"(configs|scripts|nlu|benchmarks)/", word) or (ROOT / word).exists(), word


def prose(page: Path) -> list[str]:
    """The paragraphs, and the items of lists, of a page without its tables, headings and code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^(\||#|    |!\[).*$", "", text, flags=re.M)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", text) if part.strip()]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem not in ("README", "results", "reproduce")], ids=lambda path: path.name
)
def test_paragraphs_have_at_most_90_words_and_items_60(page):
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
    for part in prose(page):
        assert len(part.split()) <= (60 if re.match(r"(-|\d+\.) ", part) else 90), part


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_exist_and_code_compiles(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert target.startswith("http") or linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for path in re.findall(
        r"`((?:benchmarks|configs|docs|examples|loralib|nlu|results|scripts|tests)/[\w./-]*)`", text
    ):
        assert (ROOT / path).exists() or "TASK" in path or "NAME" in path, path
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        compile(code, page.name, "exec")


@pytest.fixture(scope="module")
def scores() -> dict[str, pd.DataFrame]:
    """Experiment → the scores of its committed records, by row."""
    measured = load_measured(ROOT / "results/measured")
    found = {}
    for each in load_questions(ROOT / "results/study/questions.yaml"):
        if each.experiment in measured:
            runs = scored_on_test(measured[each.experiment], each.test)
            found[each.experiment] = score_table(runs, each.against).set_index("row")
    return found


def shown(row: pd.Series, prefix: str = "", digits: int = 2) -> str:
    return with_interval(*[row[f"{prefix}{name}"] for name in ("difference", "low", "high")], digits=digits)


def test_tables_of_the_readme_match_the_records(scores):
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results so far")[2]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    base, tuned, untouched = (scores[name] for name in ("base", "evidence", "confirmation"))
    assert [row[0] for row in lines[2:6]] == list(base.index) and len(lines) >= 13
    for label, *cells in lines[2:6]:
        row = base.loc[label]
        each = [number(row[task], 1) for task in ("cola", "mrpc", "rte", "sst2", "qnli", "average")]
        assert cells == [f"{row.parameters:,.0f}", *each, shown(row), shown(row, "t_")], label
    for label, *cells in lines[8:]:
        row, other = tuned.loc[label], untouched.loc[label] if label in untouched.index else None
        expected = [f"{row.parameters:,.0f}", number(row.average, 1), shown(row), shown(row, "t_")]
        expected += ["–", "–"] if other is None else [number(other.average, 1), shown(other)]
        assert cells == expected, label


def test_findings_match_the_records(scores):
    page = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    base, evidence, confirmation = scores["base"], scores["evidence"], scores["confirmation"]
    shared = evidence.loc["LoRA² shared"]
    for figure in (
        f"LoRA² shared has {shown(base.loc['LoRA² shared'])} against LoRA r=8",
        f"as published {shown(base.loc['LoRA² k=8'])}",
        f"has {shown(base.loc['AdaLoRA'])}",
        f"shared {shown(base.loc['LoRA² shared'], 'best_')}, k=8 {shown(base.loc['LoRA² k=8'], 'best_')}",
        f"LoRA² k=8 has {shown(evidence.loc['LoRA² k=8']).replace(' (', ' against LoRA r=8 (')}",
        f"LoRA² shared {shown(shared)}",
        f"{shown(shared, 't_', 1)} on these four tasks",
        f"best evaluations, {shown(scores['fresh_seeds'].loc['LoRA² shared'], 'best_')[:-1]}; QNLI",
        f"{shown(confirmation.loc['LoRA² shared'], 't_', 1)} on SST-2 and MNLI",
        f"LoRA² k=8 has {shown(confirmation.loc['LoRA² k=8'])}, LoRA² plus {shown(confirmation.loc['LoRA² plus'])}",
    ):
        assert figure in page, figure


def test_library_page_lists_exactly_the_public_names():
    text = (ROOT / "docs/library.md").read_text()
    rows = [line for line in text[text.index("## Names") :].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(loralib.__all__)
