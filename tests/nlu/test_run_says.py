"""What a run reports: progress lines, the next commands, trackers, and its log."""

import json
import logging
import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from peft import AutoPeftModelForSequenceClassification
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from loralib import export
from nlu import predict, run_glue
from nlu.runs.console import log_to, say
from nlu.runs.record import best_and_last
from tests.nlu.tiny import write_rows


def test_progress_lines_logged_numbers_and_printed_commands(finished, tmp_path):
    """The commands that a run prints are run; the reported scores are read with tensorboard's own reader."""
    run, record, shown, _ = finished
    line = r"^step (\d)/6  loss [\d.]+(?:  matthews_correlation -?[\d.]+)?  \d\.\d GB(  0:\d\d:\d\d left)?$"
    steps = re.findall(line, shown, re.MULTILINE)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [bool(left) for _, left in steps] == [False] + [True] * 5 + [False] * 2
    assert "{" not in shown
    noted = re.findall(r"^step \d ({.*grad_norm.*})$", (run / "log/run.log").read_text(), re.MULTILINE)
    assert [json.loads(line)["loss"] for line in noted] == [row["loss"] for row in record["history"]]
    events = EventAccumulator(str(run / "log")).Reload()
    scores = {event.step: event.value for event in events.Scalars("eval/matthews_correlation")}
    assert scores == pytest.approx({e["step"]: e["matthews_correlation"] for e in record["evaluations"]})

    assert f"{record['live_adapter_params']:,} of the encoder's trained parameters remain after pruning" in shown
    rows, out, exported = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "peft"))
    text = "the good cat ran on the small mat"  # longer than --max_seq_length
    write_rows(rows, [{"sentence": text}, {"sentence": "a bad dog"}])
    commands = dict(re.findall(r"^(predict|export):\s+(.*)$", shown, re.MULTILINE))
    assert commands["predict"].startswith("python -m nlu.predict --adapter")
    assert predict.main([*shlex.split(commands["predict"].replace("FILE", str(rows)))[3:], "--output", str(out)]) == 0
    assert commands["export"].split()[4:6] == ["--to", "peft"]
    assert export.main(shlex.split(commands["export"].replace("OUT", str(exported)))[3:]) == 0
    # peft loads the exported folder alone, with a tokenizer that cuts texts as in training
    model = AutoPeftModelForSequenceClassification.from_pretrained(exported).eval()
    for place in (run / "adapter", exported):
        tokens = AutoTokenizer.from_pretrained(place)(text, truncation=True, return_tensors="pt")
        assert tokens["input_ids"].shape == (1, 8)
        answer = json.loads(out.read_text().splitlines()[0])["probabilities"]
        assert list(answer.values()) == pytest.approx(model(**tokens).logits.softmax(-1)[0].tolist(), abs=1e-5)


def test_two_runs_in_one_process_are_two_runs_of_wandb_and_a_callers_run_stays_open(base_flags, tmp_path, monkeypatch):
    """wandb is not installed: its module here notes which run each call belongs to."""
    wandb, calls = ModuleType("wandb"), []

    def begin(project=None, name=None):
        wandb.run = SimpleNamespace(name=name, summary={}, _label=lambda code: None)

    def finish(exit_code=None):
        calls.append((wandb.run.name, "finished", exit_code))
        wandb.run = None

    wandb.__spec__, wandb.run, wandb.init, wandb.finish = ModuleSpec("wandb", None), None, begin, finish
    wandb.config, wandb.log = mock.MagicMock(), lambda numbers: calls.append((wandb.run.name, "logged"))
    modules = {"wandb": wandb} | {name: mock.MagicMock() for name in ("wandb.sdk", "wandb.sdk.lib")}
    modules["wandb.sdk.lib.config_util"] = SimpleNamespace(ConfigError=KeyError)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def train(name, *flags):
        folder = ["--root_output_dir", str(tmp_path / name)]
        return run_glue.main([*base_flags, "--report_to", "wandb", "--run_name", name, *folder, *flags])

    assert train("first") == 0 and train("lost", "--learning_rate", "1e30") == 1
    assert [call for call in calls if call[1] == "finished"] == [("first", "finished", 0), ("lost", "finished", 1)]
    assert calls.index(("first", "finished", 0)) > calls.index(("first", "logged"))
    begin(name="the caller's")
    assert train("second") == 0
    assert wandb.run.name == "the caller's" and calls[-1] == ("the caller's", "logged")


# ---- log and record -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor, warned", [("avx2", True), ("avx512_bf16", False)])
def test_bfloat16_warns_on_a_processor_without_it(base_flags, tmp_path, monkeypatch, caplog, processor, warned):
    monkeypatch.setattr("nlu.fine_tuning.instructions", lambda: processor)
    flags = ["--bf16", "--use_cpu", "--max_steps", "1", "--root_output_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.WARNING, logger="nlu"):
        assert run_glue.main([*base_flags, *flags]) == 0
    assert ("no instructions for bfloat16" in caplog.text) == warned


def test_log_has_the_lines_and_warnings_of_its_block_only(tmp_path, capsys, caplog):
    caplog.set_level(logging.WARNING, "transformers")  # whatever an earlier test has set
    path = tmp_path / "log" / "run.log"
    say("before")
    with pytest.raises(KeyError), log_to(path, "the command"):
        say("a line")
        logging.getLogger("nlu.data").warning("a warning")
        assert caplog.messages == ["a warning"]  # the root's handlers do not print the line again
        logging.getLogger("transformers.trainer").warning("theirs")
        raise KeyError("end")
    say("after")
    first = path.read_text()
    with log_to(path, "the command"):  # the run resumes
        say("more")
    assert path.read_text().startswith(first + "---- ") and path.read_text().endswith("\nmore\n")
    lines = first.splitlines()
    assert lines[0].endswith(" the command")
    assert lines[1:4] == ["a line", "a warning", "theirs"] and "KeyError: 'end'" in lines
    assert "before" not in lines and "after" not in lines
    assert capsys.readouterr().out == "before\na line\nafter\nmore\n"


def test_line_reaches_the_log_if_nobody_reads_the_console_and_another_programs_rank_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "8")  # without WORLD_SIZE
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=BrokenPipeError))
    monkeypatch.setattr("nlu.runs.console.discard_output", discarded := mock.Mock())
    with log_to(tmp_path / "log" / "run.log", "the command"):
        say("a line")
    assert (tmp_path / "log/run.log").read_text().endswith("\na line\n") and discarded.called


def test_first_of_equal_scores_is_the_best():
    rows = [{"step": step, "accuracy": score} for step, score in ((2, 0.4), (4, 0.5), (6, 0.5))]
    assert best_and_last([*rows, {"step": 7, "loss": 0.1}], "accuracy") == (0.5, 4, 0.5)
