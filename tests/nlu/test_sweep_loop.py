"""The loop of a sweep with stand-ins for started runs; test_sweep.py has real child processes."""

import os
import signal

import pytest
import yaml

from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment
from nlu.experiments.launchers import LocalLauncher
from nlu.experiments.loop import SweepLoop, run_experiment
from nlu.experiments.places import Places
from tests.nlu.sweeps import BASIC, ONE, SELECT, lines_of

THREE = BASIC | {"grid": ONE | {"seed": [1, 2, 3]}}


class Job:
    """A stand-in for a started run, which keeps what it hears; `poll` gives its exit code, or None while it runs."""

    def __init__(self, poll=lambda job: None):
        self.heard, self._poll = [], poll

    def poll(self):
        return self._poll(self)

    def stop(self):
        self.heard.append("stop")

    def kill(self):
        self.heard.append("kill")


def loop_of(tmp_path, start, content=THREE):
    """The loop of an experiment, two runs at once, in which `start` starts a run; and the three runs."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    places = Places(tmp_path / "measured/trial.jsonl", tmp_path / "output/trial", ["run"])
    launcher = LocalLauncher(2)
    launcher.start = start
    return SweepLoop(launcher, 2, places, 3), load_experiment(path).runs


def test_a_second_signal_ends_the_runs_at_once_and_the_first_one_gives_the_exit_code(tmp_path):
    def poll(job):
        looks.append(job)
        if signals and len(job.heard) + len(signals) == 2:  # the second when the first has been passed on
            os.kill(os.getpid(), signals.pop(0))
        assert len(looks) < 50, "it is not killed"
        return -9 if "kill" in job.heard else None

    signals, looks, job = [signal.SIGINT, signal.SIGTERM], [], Job(poll)
    loop, runs = loop_of(tmp_path, lambda command, log: job)
    with loop:
        loop.run(runs[:1])
    assert job.heard == ["stop", "kill"] and loop.summary() == 128 + signal.SIGINT


def test_after_a_signal_no_run_is_started_in_the_place_of_one_that_has_ended(tmp_path):
    def poll(job):
        looks.append(job)
        if len(looks) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 143 if looks.count(job) > (3 if job is started[0] else 6) else None

    looks, started = [], []
    loop, runs = loop_of(tmp_path, lambda command, log: started.append(Job(poll)) or started[-1])
    with loop:
        loop.run(runs)
    assert [job.heard for job in started] == [["stop"], ["stop"]] and not loop.failures


def test_a_run_that_cannot_be_started_stops_those_at_work(tmp_path):
    def start(command, log):
        if jobs:
            raise UsageError("cannot run it")
        jobs.append(Job())
        return jobs[0]

    jobs = []
    loop, runs = loop_of(tmp_path, start)
    with pytest.raises(UsageError, match="cannot run it"), loop:
        loop.run(runs)
    assert jobs[0].heard == ["stop"]


@pytest.mark.parametrize(("where", "handler"), [("here", signal.SIG_IGN), ("on a cluster", signal.SIG_DFL)])
def test_what_outlives_the_terminal_is_not_stopped_with_it(tmp_path, where, handler):
    """A sweep under nohup, which ignores the signal, and jobs on a cluster."""
    before = signal.signal(signal.SIGHUP, handler)
    loop, _ = loop_of(tmp_path, None)
    if where == "on a cluster":
        loop.launcher = None
    try:
        with loop:
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failed_run_has_no_line_while_it_is_made_again(run_sweep, tmp_path):
    """Were it interrupted then, the line would have it begin anew and not go on."""
    content = THREE | {"base": BASIC["base"] | {"weight_decay": 1}}
    assert run_sweep(content)[0] == 1 and len(lines_of(tmp_path)) == 3
    seen = []

    def start(command, log):
        seen.append(("--overwrite_output_dir" in command, list(lines_of(tmp_path))))
        raise UsageError("enough")

    loop, runs = loop_of(tmp_path, start, content)
    with pytest.raises(UsageError, match="enough"), loop:
        loop.run(runs)
    assert seen == [(True, ["lora-cola-seed=2", "lora-cola-seed=3"])]


def test_a_sweep_that_is_stopped_while_it_tunes_tells_of_no_failure(tmp_path, capsys):
    def poll(job):
        if not job.heard:
            os.kill(os.getpid(), signal.SIGINT)
        return 130 if job.heard else None

    loop, _ = loop_of(tmp_path, lambda command, log: Job(poll), BASIC | {"grid": ONE, "select": SELECT})
    experiment = load_experiment(tmp_path / "experiment.yaml")
    tuning, final = experiment.selection.runs, experiment.runs
    assert run_experiment(experiment, tuning, final, loop.places, loop.launcher, 1) == 130
    assert "failed" not in capsys.readouterr().err
