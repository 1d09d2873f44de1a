"""README and docs: programs, flags, files and links in them exist, and their results are those of the records."""

import argparse
import html
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

import loralib
from loralib import export
from nlu import ROOT, command_line, compare, predict, report, sweep
from nlu.experiments.experiment import load_experiment
from nlu.experiments.statistics import load_measured
from nlu.experiments.tables import number, with_interval
from results.study import make
from results.study.questions import load_questions
from results.study.runs import scored_on_test
from results.study.tables import score_table
from scripts import draw_terminal

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/study/PROTOCOL.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
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
            own = PARSERS[program]().parse_args(rest)
            if getattr(own, "only", None):
                names = [run.name for run in load_experiment(ROOT / own.experiment).runs]
                assert 0 < len([name for name in names if re.search(own.only, name)]) < len(names), words
        for word in words:
            assert not re.match(r"(configs|scripts|nlu|benchmarks)/", word) or (ROOT / word).exists(), word


def prose(page: Path) -> list[str]:
    """The paragraphs, and the items of lists, of a page without its tables, headings and code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^(\||#|    |!\[).*$", "", text, flags=re.M)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", text) if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
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


def test_files_and_folders_of_the_contributors_tree_exist():
    tree = re.search(r"^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S).group(1)
    paths, folder = [], ""
    for indent, words in re.findall(r"^( *)(\S.*)$", tree, re.M):
        names = re.findall(r"\w+(?:\.py\b|/)", words)
        folder = folder if indent else names[0]
        paths += [folder + name for name in names] if indent else names
    missing = [path for path in paths if not (ROOT / path).exists() and not (ROOT / "results" / path).exists()]
    assert len(paths) > 35 and not missing


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


def rows_of_table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading, without its head."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = re.search(r"^\|[^\n]*\n\|[^\n]*\n((?:\|[^\n]*\n)+)", text, re.M)[1].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_table_of_the_readme_matches_the_records(scores):
    rows = rows_of_table("README.md", "Results so far")
    assert [label for label, *_ in rows] == list(scores["base"].index)
    for label, *cells in rows:
        row = scores["base"].loc[label]
        each = [number(row[task], 1) for task in ("cola", "mrpc", "rte", "sst2", "qnli", "average")]
        assert cells == [f"{row.parameters:,.0f}", *each, shown(row)], label


def test_table_of_methods_to_choose_from_matches_the_records(scores):
    rows = rows_of_table("docs/choose.md", "What was measured?")
    assert len(rows) > 10
    for label, parameters, size, score, difference, *_ in rows:
        row = scores["evidence"].loc[label]
        expected = f"{row.parameters:,.0f}", f"{row.remaining * 4 / 1e6:.1f} MB", number(row.average, 1)
        assert (parameters, size, score) == expected, label
        assert difference.removesuffix(", from r=8") == shown(row), label


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_findings_match_the_records(page, scores):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    base, evidence, confirmation, fresh = (scores[name] for name in ("base", "evidence", "confirmation", "fresh_seeds"))
    figures = [shown(fresh.loc["LoRA² shared"])[:-1]]
    if page == "docs/results.md":
        figures += [f"shared {shown(base.loc['LoRA² shared'], 'best_')}, k=8 {shown(base.loc['LoRA² k=8'], 'best_')}"]
        figures += [shown(base.loc[label]) for label in base.index[1:]]
        figures += [
            shown(evidence.loc["LoRA² k=8"]).replace(" (", " against LoRA r=8 ("),
            shown(evidence.loc["LoRA² shared"]),
        ]
        figures += [shown(confirmation.loc[f"LoRA² {name}"]) for name in ("k=8", "plus", "shared")]
    for figure in figures:
        assert figure in text, figure


def test_code_of_the_readme_runs(encoder_path, tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(code.replace("demo/minilm", str(encoder_path)), variables)
    assert variables["low_rank"].ranks.live < variables["low_rank"].ranks.initial
    assert loralib.read_adapter_config(tmp_path / "my-adapter").ranks


def test_picture_of_the_terminal_is_what_its_script_draws(capsys):
    picture = (ROOT / "docs/quickstart.svg").read_text(encoding="utf-8")
    lines = {int(y): html.unescape(text) for y, text in re.findall(r'y="(\d+)" fill="#\w+">(.*)</text>', picture)}
    every = [lines.get(y, "") for y in range(min(lines), max(lines) + 1, draw_terminal.HEIGHT)]
    assert draw_terminal.draw(every[0].removeprefix("$ "), every[1:]) == picture and len(lines) > 10


def test_library_page_lists_exactly_the_public_names():
    text = (ROOT / "docs/library.md").read_text()
    rows = [line for line in text[text.index("## Names") :].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(loralib.__all__)
