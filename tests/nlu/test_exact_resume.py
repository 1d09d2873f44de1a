"""A run that is killed and resumed gives the same bits as an uninterrupted one: weights, ranks, scores, record."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys

import pytest

from nlu import ROOT
from nlu.run_glue import main
from tests.nlu import killed_runs
from tests.nlu.killed_runs import EVENTS, WRITES, outcome, run_broken_off, run_killed
from tests.nlu.tiny import OFFLINE, PATIENCE, changed, quick_peft_adalora, read, run_python, wait_until

TRIALS = int(os.environ.get("SOAK_TRIALS", "1"))  # each is killed twice
# 50 rows give 7 batches of 8, so 4 optimiser steps an epoch; saving, evaluation and logging are at different steps.
UNALIGNED = """--max_steps 9 --gradient_accumulation_steps 2 --save_steps 3 --eval_steps 5 --logging_steps 4
    --lora_dropout 0.2 --length_bucketing True --mask_interval 2 --save_total_limit 2 --method lora2"""
STEPS = "--max_steps 10 --save_steps 2 --eval_steps 4 --logging_steps 3"
EPOCHS = "--max_steps -1 --num_train_epochs 2 --logging_steps 3 --eval_strategy epoch"


def flags_of(base_flags, folder, options):
    flags = changed(base_flags, root_output_dir=folder, lora_r=None, lora_alpha=None)
    return [*flags, "--save_total_limit", "50", "--method", "lora2", *options.split()]


# Each case combines several options that could break a resume; the test of random points combines more.
LEAN = "--gradient_accumulation_steps 3 --gradient_checkpointing True --no_fast_attention True"
HALF = "--bf16 True --length_bucketing True --lora_dropout 0.2"
PLUS = "--method lora2_plus --head_learning_rate 1e-3"
# No step changes the score at so low a learning rate: two evaluations without a gain end the training.
STOPPED = "--method lora --max_steps 30 --learning_rate 1e-12 --save_steps 1 --early_stopping_patience 2"
SORA = "--max_steps 6 --eval_steps 3 --method sora --lora_alpha 32 --sora_lambda 8"


CASES = {
    "exact factors, own learning rate of the head": (f"{STEPS} {PLUS}", 6),
    "epochs": (f"{EPOCHS} --save_strategy epoch", 7),
    "only the best checkpoint": (f"{STEPS} --eval_steps 2 --load_best_model_at_end True --save_total_limit 1", 8),
    "early stopping at step 9": (STOPPED, 7),
}
SLOW_CASES = {
    "within an epoch, evaluation and saving at different steps": (f"{STEPS} --eval_steps 5 --value_lr_ratio 4", 8),
    "bottleneck adapters": (f"{STEPS} --method padapter", 6),
    "vectors, and matrices shared by all layers": (f"{STEPS} --method vera", 6),
    "peft's allocation": (f"{STEPS} --method peft --peft_config adalora.json", 2),
    "end of an epoch": (f"{STEPS.replace('save_steps 2', 'save_steps 7')} --method adalora", 7),
    "accumulation, activation checkpointing, stock attention": (f"{STEPS} {LEAN}", 8),
    "bfloat16, in the warm-up": (f"{STEPS} {HALF} --lr_scheduler_type cosine --warmup_steps 4", 2),
    "after the last step, SoRA": (f"{STEPS} {SORA}", 6),
    "saved before the epoch is evaluated": (f"{EPOCHS} --save_steps 7 --method lora", 7),
    "stopped early": (STOPPED, 9),
    "after the last step, best model": (f"{STEPS} --eval_steps 2 --load_best_model_at_end True", 10),
}


@pytest.mark.parametrize(
    "options, step",
    [pytest.param(*case, id=name) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items()],
)
def test_resume_from_a_checkpoint_is_exact(base_flags, tmp_path, monkeypatch, options, step):
    """Also if the run's folder was moved."""
    monkeypatch.chdir(quick_peft_adalora(tmp_path).parent)
    assert main(flags_of(base_flags, tmp_path / "whole", options)) == 0
    flags = flags_of(base_flags, tmp_path / "broken", options)
    run_broken_off(flags, step)
    before = read(flags)
    (tmp_path / "broken/results.json").write_text(json.dumps(before | {"started_at": "2020-02-02T00:00:00+00:00"}))
    (tmp_path / "broken").rename(tmp_path / "moved")
    flags = changed(flags, root_output_dir=tmp_path / "moved")
    assert main(flags) == 0
    assert outcome(tmp_path / "moved") == outcome(tmp_path / "whole")
    assert (read(flags)["resumes"], read(flags)["started_at"]) == (1, "2020-02-02T00:00:00+00:00")


def test_run_killed_at_random_points_resumes_exactly(base_flags, tmp_path):
    """Each run gets SIGKILL twice, at any event of any step or while it writes a checkpoint."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.nlu.killed_runs"])  # each process starts with all modules imported

    assert main(flags_of(base_flags, tmp_path / "whole", UNALIGNED)) == 0
    expected = outcome(tmp_path / "whole")
    source = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    for trial in range(TRIALS):
        flags = flags_of(base_flags, tmp_path / str(trial), UNALIGNED)
        first = source.randint(0, 5)
        points = [(source.choice(EVENTS + WRITES), step) for step in (first, source.randint(first, 7))]
        for point, step in points:
            process = processes.Process(target=run_killed, args=(flags, point, step))
            process.start()
            process.join(PATIENCE)
            assert process.exitcode == -signal.SIGKILL, (point, step)
        assert main(flags) == 0
        assert outcome(tmp_path / str(trial)) == expected, points
        assert not list((tmp_path / str(trial) / "model").glob(".*")), points


TWO = "--max_steps 40 --save_steps 5 --eval_steps 6 --logging_steps 3 --per_device_train_batch_size 4"
LAUNCH = [ROOT / "scripts/launch.py", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_resume_exactly(base_flags, tmp_path):
    """Row order, running loss and ranks continue exactly, in the second epoch and between two logging steps.

    Both processes stop at the same step if one of them gets a signal. A SIGTERM to the launcher stops both, and so
    does an error in both.
    """
    whole, broken, stopped = (flags_of(base_flags, tmp_path / name, TWO) for name in ("whole", "broken", "stopped"))
    command = [sys.executable, *LAUNCH, str(ROOT / "nlu" / "run_glue.py"), *stopped]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=OFFLINE, **pipes)
    wait_until((tmp_path / "stopped" / "model" / "checkpoint-5").is_dir)
    launcher.terminate()
    _, told = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 143 and re.fullmatch("stopped after step .* again", told.splitlines()[-1])
    log = (tmp_path / "stopped" / "log" / "run.log").read_text()
    assert told.count("give the same command again") == 1  # only rank 0 reports it
    assert log.count("---- ") == 1 and log.count("Interrupted: stopped after step") == 1
    assert read(stopped)["status"] == "interrupted"

    how = "break off"
    runs = [[whole, None, how], [broken, 2, "signal"], [broken, 10, how], [broken, None, how], [stopped, None, how]]
    runs += [[base_flags, None, "apart"], [[*base_flags, "--lora_module", "nothing"], None, "last"]]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    result = run_python(*LAUNCH, killed_runs.__file__, tmp_path / "runs.json")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("error: the processes of this run differ (seed)") == 2
    assert "matches no linear layer" in result.stderr
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
