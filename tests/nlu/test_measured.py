"""Records and folders that tables.py, plots.py and report.py refuse: one line, exit code 2, nothing changed."""

import errno
import json
import os
from pathlib import Path

import pytest

from nlu import plots, report, tables
from nlu.errors import UsageError, exit_code
from nlu.experiments.measured import load_measured, rank_pattern
from tests.nlu.records import write_record

PROGRESS = ("figures: ", "report: ")
NAN, INFINITY = float("nan"), float("inf")
COMMANDS = {"tables": (tables.main, "--output_dir"), "plots": (plots.main, "--output_dir"),
            "report": (report.main, "--output")}  # fmt: skip
commands = pytest.mark.parametrize("name", COMMANDS)


def _call(name: str, measured: Path, output: Path) -> int:
    main, flag = COMMANDS[name]
    return main(["--measured_dir", str(measured), flag, str(output)])


def _one_line(capsys, *parts: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(PROGRESS)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(part in lines[0] for part in parts), lines


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "measured"
    write_record(folder / "trial", "lora", "mrpc", 1, [0.4, 0.5])
    return folder


# ---- the folder ----------------------------------------------------------------------------------------------------


@commands
@pytest.mark.parametrize("typo", ["absent", "other", "file"])
def test_a_mistyped_folder_changes_nothing(measured, tmp_path, capsys, name, typo):
    output = tmp_path / "output"
    assert _call(name, measured, output) == 0
    (tmp_path / "other/deep").mkdir(parents=True)
    (tmp_path / "other/notes.md").write_text("no record")
    (tmp_path / "file").write_text("no folder")
    before = _contents(output)
    capsys.readouterr()
    assert _call(name, tmp_path / typo, output) == 2
    _one_line(capsys, str(tmp_path / typo))
    assert _contents(output) == before


def _contents(output: Path) -> dict[str, bytes]:
    files = output.iterdir() if output.is_dir() else [output]
    return {path.name: path.read_bytes() for path in files}


@commands
def test_an_output_that_cannot_be_written_is_one_line(measured, tmp_path, capsys, name):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / ("file" if name != "report" else "file/report.html")
    assert _call(name, measured, output) == 2
    _one_line(capsys, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@commands
def test_an_output_below_a_link_to_nothing_is_one_line(measured, tmp_path, capsys, name):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert _call(name, measured, tmp_path / "link" / "x" if name == "report" else tmp_path / "link") == 2
    _one_line(capsys, str(tmp_path / "link"), "check the path")


def test_an_error_that_no_path_explains_keeps_its_traceback():
    with pytest.raises(OSError, match="broken"):
        exit_code(OSError(errno.EIO, "broken"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@commands
def test_a_full_disk_is_one_line(measured, tmp_path, capsys, monkeypatch, name):
    def full(path, content):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(content)

    for module in ("loralib.files", "nlu.plots"):
        monkeypatch.setattr(f"{module}.write_bytes", full)
    assert _call(name, measured, tmp_path / "output") == 1
    _one_line(capsys, "No space left", "make room")


# ---- the records ---------------------------------------------------------------------------------------------------

FAULTS = {
    **{f"best {value}": ({"best": value}, "best") for value in (None, NAN, "0.5")},
    **{f"last {value}": ({"last": value}, "last") for value in (None, INFINITY, [])},
    "seed text": ({"seed": "1"}, "seed"),
    "seed true": ({"seed": True}, "seed"),
    "adapter_params nan": ({"adapter_params": NAN}, "adapter_params"),
    "adapter_params text": ({"adapter_params": "many"}, "adapter_params"),
    "adapter_params negative": ({"adapter_params": -1}, "adapter_params"),
    "adapter_params huge": ({"adapter_params": 10**400}, "adapter_params"),
    "head_params null": ({"head_params": None}, "head_params"),
    **{
        f"{key} {value}": ({key: value}, key)
        for key in ("seconds_per_step", "peak_memory_bytes", "total_params", "live_budget", "steps", "train_seconds")
        for value in (NAN, "8")
    },
    "batch text": ({"effective_batch_size": "32"}, "effective_batch_size"),
    "task a number": ({"task": 3}, "task"),
    "method a list": ({"method": ["lora"]}, "method"),
    "metric a number": ({"metric": 1}, "metric"),
    "model a list": ({"model": ["encoder"]}, "model"),
    "method_config a number": ({"method_config": 8}, "method_config"),
    "arguments a list": ({"arguments": [1]}, "arguments"),
    "learning_rate text": ({"arguments": {"learning_rate": "1e-3"}}, "arguments.learning_rate"),
    "learning_rate nan": ({"arguments": {"learning_rate": NAN}}, "arguments.learning_rate"),
    "holdout text": ({"arguments": {"holdout_fraction": "some"}}, "arguments.holdout_fraction"),
    "evaluations an object": ({"evaluations": {"step": 100}}, "evaluations"),
    "evaluations of numbers": ({"evaluations": [0.5]}, "evaluations"),
    "evaluations empty": ({"evaluations": []}, "evaluations"),
    "evaluation without step": ({"evaluations": [{"accuracy": 0.4}]}, "evaluations[0].step"),
    "history a number": ({"history": 3}, "history"),
    "history of numbers": ({"history": [3]}, "history"),
    "history without step": ({"history": [{"step": 1}, {"live": 3}]}, "history[1].step"),
    "history live text": ({"history": [{"step": 1, "live": "3"}]}, "history[0].live"),
    "spectra a list": ({"spectra": [[1.0]]}, "spectra"),
    "spectra nan": ({"spectra": {"layer": [1.0, NAN]}}, "spectra.layer"),
    "scores a list": ({"importance_scores": {"inner": [1.0]}}, "importance_scores.inner"),
    "scores null": ({"importance_scores": {"inner": {"layer": [None]}}}, "importance_scores.inner.layer"),
    "scores of other layers": (
        {"importance_scores": {"inner": {"a": [1.0]}, "full": {"b": [1.0]}}, "live_budget": 1},
        "importance_scores.inner",
    ),
    "scores, none live": (
        {"importance_scores": {"inner": {"a": [1.0]}, "full": {"a": [1.0]}}, "live_budget": None},
        "live_budget",
    ),
    "sweep null": ({"sweep": None}, "sweep"),
    "sweep a list": ({"sweep": []}, "sweep"),
    "axes a list": ({"sweep": {"axes": ["lora"]}}, "sweep.axes"),
    "axis an object": ({"sweep": {"axes": {"method": {}}}}, "sweep.axes.method"),
    "axis rate text": ({"sweep": {"axes": {"learning_rate": "1e-3"}}}, "sweep.axes.learning_rate"),
    "reference text": ({"sweep": {"reference": "no"}}, "sweep.reference"),
    "experiment a number": ({"sweep": {"experiment": 3}}, "sweep.experiment"),
    **{
        f"score {value} in evaluation {i}": (
            {"evaluations": [{"step": 100 * (j + 1), "accuracy": value if j == i else 0.5} for j in range(3)]},
            f"evaluations[{i}].accuracy",
        )
        for value in (NAN, INFINITY, None, "0.5", True)
        for i in (0, 2)
    },
    "score missing early": ({"evaluations": [{"step": 50}, {"step": 100, "accuracy": 0.5}]}, "evaluations[0].accuracy"),
}


@pytest.mark.parametrize(("changes", "field"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_field_is_named(measured, tmp_path, capsys, changes, field):
    path = write_record(measured / "trial", "lora2", "mrpc", 1, [0.5]) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert _call("tables", measured, tmp_path / "output") == 2
    _one_line(capsys, str(path), field)
    assert not (tmp_path / "output").exists()


def test_a_second_column_may_be_absent_but_not_null(tmp_path):
    write_record(tmp_path / "a", "lora", "mnli", 1, [0.8], evaluations=[{"step": 100, "accuracy": 0.8}])
    (experiment,) = load_measured(tmp_path)
    assert experiment.columns == ["mnli_m"]
    evaluations = [{"step": 100, "accuracy": 0.8, "accuracy_mm": None}]
    write_record(tmp_path / "a", "lora", "mnli", 2, [0.8], evaluations=evaluations)
    with pytest.raises(UsageError, match=r"evaluations\[0\]\.accuracy_mm is null"):
        load_measured(tmp_path)


def test_records_of_one_row_share_their_metric(measured):
    write_record(measured / "trial", "lora", "mrpc", 2, [0.5], metric="f1", evaluations=[{"step": 100, "f1": 0.5}])
    with pytest.raises(UsageError, match="differ in their metric"):
        load_measured(measured)


@pytest.mark.parametrize("status", ["failed", "running", "interrupted"])
def test_a_record_that_does_not_count_may_lack_everything(measured, status):
    (measured / "trial/other").mkdir()
    (measured / "trial/other/results.json").write_text(json.dumps({"status": status, "best": None, "evaluations": []}))
    (experiment,) = load_measured(measured)
    assert experiment.failed == 1 and len(experiment.rows) == 1


@pytest.mark.parametrize("status", ["finished", "failed"])
@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", ".hidden", "a/b", "a\\b", "a b", "a\nb", "x\0"])
def test_an_experiment_s_name_stays_in_the_output(measured, tmp_path, capsys, name, status):
    folder = write_record(measured / "trial", "lora2", "mrpc", 1, [0.5], status=status, sweep={"experiment": name})
    assert _call("tables", measured, tmp_path / "x/y/output") == 2
    _one_line(capsys, str(folder / "results.json"), "no plain name")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured"]


def test_a_folder_s_name_is_held_to_the_same(tmp_path):
    write_record(tmp_path / "a b", "lora", "mrpc", 1, [0.5], sweep="absent")
    with pytest.raises(UsageError, match="'a b' is no plain name"):
        load_measured(tmp_path)


@pytest.mark.parametrize("pattern", [{"layer.0.query": 3}, {"layer.0.query": ["yes"]}])
def test_a_faulty_rank_pattern_is_named(measured, pattern):
    (experiment,) = load_measured(measured)
    (record,) = experiment.rows[0].every
    (record.folder / "rank_pattern.json").write_text(json.dumps(pattern))
    with pytest.raises(UsageError, match=r"rank_pattern\.json: layer\.0\.query must be"):
        rank_pattern(record)


def test_a_run_whose_rate_is_not_recorded_has_none_in_the_table(measured, tmp_path):
    axes = {"method": "lora", "task_name": "mrpc", "learning_rate": 1e-3, "seed": 101}
    write_record(measured / "trial/select", "lora", "mrpc", 101, [0.5], axes, arguments={"holdout_fraction": 0.1},
                 sweep={"experiment": "trial", "axes": axes})  # fmt: skip
    write_record(measured / "trial", "lora2", "mrpc", 1, [0.5], arguments={})
    (experiment,) = load_measured(measured)
    assert tables.chosen_table(experiment).rows == [["lora", "0.001 †"], ["lora2", "–"]]
