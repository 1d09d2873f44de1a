"""The page of methods to choose from: its table holds the scores of the runs and the ratios of the benchmark."""

import json

import pytest

from nlu import ROOT
from results.study import choose
from results.study.runs import scored_on_test
from results.study.tables import score_table


@pytest.fixture
def arguments(tmp_path):
    """Flags of choose.py: the runs of the evidence, the cost of three methods, a page with a place for the table."""
    (tmp_path / "measured").mkdir()
    lines = (ROOT / "results/measured/evidence.jsonl").read_text(encoding="utf-8")
    (tmp_path / "measured/which_method.jsonl").write_text(lines, encoding="utf-8")
    cost = {"adapter_bytes": 1_930_184, "merges": True, "memory_bytes": 200}
    rows = [cost | {"setting": "a", "row": "LoRA r=8", "seconds": [2.0, 1.0, 3.0]},
            cost | {"setting": "a", "row": "LoRA² shared", "seconds": [2.2, 9.0, 2.0], "memory_bytes": 250},
            cost | {"setting": "a", "row": "LoRA+", "seconds": [2.0, 2.0, 2.0], "merges": False},
            cost | {"setting": "b", "row": "LoRA r=8", "seconds": [9.0]}]  # fmt: skip
    records = [{"name": "which_method", "measurements": rows[:1]}, {"name": "which_method", "measurements": rows}]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    page = "above\n<!-- table: results/study/choose.py -->\nold\n<!-- end -->\nbelow\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    flags = {"measured_dir": "measured", "benchmarks": "records.jsonl", "page": "page.md", "figure": "figure.png"}
    return [word for flag, name in flags.items() for word in (f"--{flag}", str(tmp_path / name))]


def test_table_has_the_runs_scores_and_the_last_benchmarks_ratios(arguments, tmp_path, capsys):
    assert choose.main(arguments) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("above\n") and page.endswith("<!-- end -->\nbelow\n") and "old" not in page
    assert page.count("\n| ") == 17 and (tmp_path / "figure.png").stat().st_size > 10_000
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in page.splitlines() if "|" in line
    }
    assert rows["LoRA² shared"][-3:] == ["1.10", "1.25", "yes"] and rows["LoRA+"][-3:] == ["1.00", "1.00", "no"]
    assert rows["LoRA r=8"][:2] == ["331,776", "1.9 MB"] and rows["LoRA r=8"][3:5] == ["–", "1 of 20"]
    runs = choose.load_measured(tmp_path / "measured")["which_method"]
    expected = score_table(scored_on_test(runs, ["mrpc"]), ["LoRA r=8"]).set_index("row").loc["LoRA² shared"]
    assert rows["LoRA² shared"][2] == f"{expected.average:.1f}"


def test_without_a_benchmark_of_the_name_nothing_is_written(arguments, tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text(json.dumps({"name": "other", "measurements": []}), encoding="utf-8")
    assert choose.main(arguments) == 2
    assert "benchmark which_method" in capsys.readouterr().err and not (tmp_path / "figure.png").exists()
