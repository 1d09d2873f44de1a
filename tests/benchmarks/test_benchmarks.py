"""The benchmark measures what it says: every peer steps, learns and is put into the table."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.lengths import epoch_batches
from benchmarks.peers import PEERS, Limit, Shape, build, make_batches, method_step, prepare_method_step, train_step
from benchmarks.report import Measurement, markdown

SMALL = Shape("float32", 1, ((2, 6),), "cpu", hidden=24, intermediate=32, heads=2, vocabulary=60)
# The flash peers need CUDA and packages of their own; benchmarks/gpu_check.py lists them where they are missing.
TRAINED = [key for key, peer in PEERS.items() if not (peer.maker == "limit" or peer.compiled or peer.package)]


@pytest.mark.parametrize(("key", "precision"), [(k, ("float32", "bfloat16")[i % 2]) for i, k in enumerate(TRAINED)])
def test_every_peer_lowers_its_loss(key, precision):
    shape = dataclasses.replace(SMALL, precision=precision)
    trained, (batch,) = build(PEERS[key], shape), make_batches(shape)
    before = {n: p.detach().clone() for n, p in trained.model.named_parameters() if p.requires_grad}
    dtypes = {p.dtype for p in trained.model.parameters() if not p.requires_grad}
    assert dtypes <= {torch.bfloat16 if precision == "bfloat16" and PEERS[key].weights == "bfloat16" else torch.float32}
    losses = []
    for _ in range(12):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trained.autocast):
            losses.append(trained.model.eval()(**batch).loss.item())
        trained.model.train()
        train_step(trained, batch)
    assert losses[-1] < losses[0]
    changed = [n for n, p in trained.model.named_parameters() if n in before and not torch.equal(before[n], p)]
    assert changed
    if trained.loop is not None:
        prepare_method_step(trained)
        method_step(trained)


@pytest.mark.parametrize("key", ["lora2", "lora2-stock"])
@pytest.mark.slow
def test_a_compiled_peer_takes_the_same_step(key, monkeypatch):
    """Traced, not generated: no C++ compiler is needed for that."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled, (batch,) = build(PEERS[key], SMALL), build(PEERS[f"{key}-compiled"], SMALL), make_batches(SMALL)
    assert type(compiled.model) is not type(plain.model)
    losses = [[trained.model.eval()(**batch).loss.item() for _ in range(2)] for trained in (plain, compiled)]
    for trained in (plain, compiled):
        train_step(trained, batch)
    after = [trained.model(**batch).loss.item() for trained in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and after[0] == pytest.approx(after[1], rel=1e-5)
    assert after[0] < losses[0][0]


def test_adapter_peers_train_the_same_number_of_parameters():
    def count(key):
        return sum(p.numel() for n, p in build(PEERS[key], SMALL).model.named_parameters() if "lora_" in n and
                   p.requires_grad)  # fmt: skip

    assert count("peft-lora") == count("lora")
    assert count("peft-adalora") == count("adalora")


def test_the_limit_counts_its_own_operations():
    limit = Limit(dataclasses.replace(SMALL, layers=3))
    forward = 2 * 12 * (4 * 24 * 24 + 2 * 24 * 32)
    assert limit.flops(12) == 3 * 2 * forward
    limit.step(12)


def test_epoch_batches_hold_every_example_and_bucketing_saves_padding():
    lengths = [5 + (37 * i) % 90 for i in range(130)]
    plain, bucketed = (epoch_batches(lengths, 16, flag) for flag in (False, True))
    assert sum(rows for rows, _ in plain) == sum(rows for rows, _ in bucketed) == 130
    assert max(t for _, t in plain) == max(t for _, t in bucketed) == max(lengths)
    assert sum(r * t for r, t in bucketed) < 0.8 * sum(r * t for r, t in plain)


@pytest.fixture
def small_runs(tmp_path, monkeypatch):
    """Runs of benchmarks/run.py measure the small shape and write here; all peers are forked from one process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers"])
    monkeypatch.setattr(run, "mp", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "Shape", lambda *args, **kw: dataclasses.replace(SMALL, precision=args[0]))


@pytest.mark.usefixtures("small_runs")
@pytest.mark.slow
def test_one_run_writes_what_it_prints(tmp_path, capsys):
    arguments = ["--peers", "lora2,limit", "--lengths", "6", "--rounds", "2", "--threads", "1", "--name", "x"]
    assert run.main(arguments) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "x.md").read_text().strip()
    record = json.loads((tmp_path / "x.json").read_text())
    assert {m["key"] for m in record["measurements"]} == {"lora2", "limit"}
    assert all(len(m["seconds"]) == 2 for m in record["measurements"])
    assert record["machine"]["versions"]["torch"] == torch.__version__


@pytest.fixture
def ctrl_c():
    """Python's own reaction to SIGINT: what runs in the background (nohup, &) inherits that it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c", "small_runs")
@pytest.mark.parametrize(
    "how, peers, code, says",
    [
        ("killed", "lora,limit", 1, "the process of limit ended"),
        ("stopped before it answers", "limit", 1, "the process of limit ended"),
        ("Ctrl-C", "limit", 130, "length 7: stopped"),
    ],
)
def test_what_ends_a_run_leaves_what_was_measured_before(tmp_path, monkeypatch, capsys, how, peers, code, says):
    measure, processes = run.measure, []

    def second_ends(workers, name, shapes, rounds):
        processes[:] = workers.processes
        if "length 7" in name and how == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        elif "length 7" in name and how == "killed":
            processes[-1].kill()
            processes[-1].join()
        elif "length 7" in name:
            os.kill(processes[-1].pid, signal.SIGSTOP)
            threading.Timer(0.3, processes[-1].kill).start()
        return measure(workers, name, shapes, rounds)

    monkeypatch.setattr(run, "measure", second_ends)
    flags = ["--precisions", "float32", "--rounds", "1", "--threads", "1", "--name", "x"]
    assert run.main(["--peers", peers, "--lengths", "6,7", *flags]) == code
    out, err = capsys.readouterr()
    assert says in err.strip().splitlines()[-1] and "length 7" in err and "Traceback" not in err
    record = json.loads((tmp_path / "x.json").read_text())
    assert len(record["measurements"]) == len(peers.split(",")) and record["failure"]
    assert {m["setting"] for m in record["measurements"]} == {"float32, 12 layers, batch 32, length 6"}
    assert "Ended early" in (tmp_path / "x.md").read_text() and "length 6" in out
    assert processes and not any(process.is_alive() for process in processes)


@pytest.mark.usefixtures("ctrl_c", "small_runs")
def test_a_stop_before_anything_was_measured_keeps_the_earlier_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text("earlier")
    monkeypatch.setattr(run, "measure", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run.main(["--peers", "limit", "--lengths", "6", "--name", "x"]) == 130
    assert "nothing was measured" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.slow
def test_peers_ignore_the_terminals_ctrl_c():
    workers = run.Workers(["limit"], 1)
    try:
        os.kill(workers.processes[0].pid, signal.SIGINT)
        workers.ask("limit", "build", SMALL)
        assert workers.processes[0].is_alive() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        workers.close()


def test_ratios_are_medians_over_medians():
    def row(key, seconds, method=()):
        return Measurement("float32, s", key, key, seconds, list(method), 100.0, 2**30, None)

    found = [row("peft-lora", [4.0, 2.0, 9.0]), row("lora2", [1.0, 3.0, 1.0], [0.5])]
    text = markdown({"machine": {"device": "d", "threads": 1, "system": "s", "versions": {}}, "rounds": 3,
                     "started_at": "now"}, found)  # fmt: skip
    assert "| float32, s | step, LoRA² : peft LoRA, stock attention | 0.250 |" in text
    assert "| lora2 | 1.000 | 1.000–3.000 | 100 | 0.25 |" in text
