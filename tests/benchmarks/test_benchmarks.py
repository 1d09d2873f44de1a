"""The benchmark: every peer trains and appears in the records and the table. The GPU check, on the CPU."""

import dataclasses
import json
import multiprocessing
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, peers, run
from benchmarks.peers import PEERS, Limit, Shape, build, limit_flops, make_batches, train_step
from benchmarks.report import Measurement, section
from tests.nlu.tiny import write_rows

SMALL = Shape("float32", 1, ((2, 6),), "cpu", hidden=24, intermediate=32, heads=2, vocabulary=60)
TRAINED = [key for key, peer in PEERS.items() if peer.maker != "limit"]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "precision"), [(k, ("float32", "bfloat16")[i % 2]) for i, k in enumerate(TRAINED)])
def test_every_peer_lowers_its_loss(key, precision):
    shape = dataclasses.replace(SMALL, precision=precision)
    trained, (batch,) = build(PEERS[key], shape), make_batches(shape)
    dtypes = {p.dtype for p in trained.model.parameters() if not p.requires_grad}
    assert dtypes <= {torch.bfloat16 if precision == "bfloat16" and PEERS[key].weights == "bfloat16" else torch.float32}
    losses = []
    for _ in range(12):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trained.autocast):
            losses.append(trained.model.eval()(**batch).loss.item())
        trained.model.train()
        train_step(trained, batch)
    assert losses[-1] < losses[0]
    if trained.loop is not None:
        peers.prepare_method_step(trained)
        peers.method_step(trained)


def test_adapter_peers_train_the_same_number_of_parameters():
    def count(key):
        return sum(p.numel() for n, p in build(PEERS[key], SMALL).model.named_parameters() if "lora_" in n and
                   p.requires_grad)  # fmt: skip

    assert count("peft-lora") == count("lora")
    assert count("peft-adalora") == count("adalora")


def test_limit_counts_its_floating_point_operations():
    shape = dataclasses.replace(SMALL, layers=3)
    forward = 2 * 12 * (4 * 24 * 24 + 2 * 24 * 32)
    assert limit_flops(shape) == 3 * 2 * forward
    Limit(shape).step(12)


@pytest.mark.slow
def test_run_writes_the_printed_table_and_keeps_the_records_of_other_names(tmp_path, monkeypatch, capsys):
    context = multiprocessing.get_context("forkserver")  # all peers are forked from one process
    context.set_forkserver_preload(["benchmarks.peers"])
    monkeypatch.setattr(run, "mp", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "Shape", lambda *args, **kw: dataclasses.replace(SMALL, precision=args[0]))
    (tmp_path / "records.jsonl").write_text(json.dumps(RECORD | {"name": "a"}) + "\n")
    arguments = ["--peers", "lora2,limit", "--lengths", "6", "--rounds", "2", "--threads", "1", "--name", "x"]
    assert run.main(arguments) == 0
    assert capsys.readouterr().out.strip() in (tmp_path / "README.md").read_text()
    first, record = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert first["name"] == "a" and {m["key"] for m in record["measurements"]} == {"lora2", "limit"}
    assert all(len(m["seconds"]) == 2 for m in record["measurements"])


RECORD = {"name": "x", "machine": {"device": "d", "threads": 1, "system": "s", "versions": {}}, "rounds": 3,
          "started_at": "now", "measurements": []}  # fmt: skip


def test_ratios_are_ratios_of_medians():
    def row(key, seconds, method=()):
        return asdict(Measurement("float32, s", key, key, seconds, list(method), 100.0, 2**30, None))

    text = section(RECORD | {"measurements": [row("peft-lora", [4.0, 2.0, 9.0]), row("lora2", [1.0, 3.0, 1.0], [0.5])]})
    assert "| float32, s | step, LoRA² : peft LoRA, stock attention | 0.250 |" in text
    assert "| lora2 | 1.000 | 1.000–3.000 | 100 | 0.25 |" in text


def test_lengths_of_a_task_are_bucketed_for_our_peers_only(tmp_path):
    texts = ["w " * (2 + (7 * i) % 19) for i in range(96)]
    rows = [{"sentence1": text, "sentence2": text, "label": i % 2, "idx": i} for i, text in enumerate(texts)]
    write_rows(tmp_path / "mrpc/train.jsonl", rows)
    words = ["--peers", "peft-lora,lora2", "--precisions", "bfloat16", "--batch", "8"]
    ((_, shapes),) = run.plan(run.parse(["--lengths", "mrpc", "--glue_dir", str(tmp_path), *words]))
    tokens = {key: sum(rows * n for rows, n in shapes[key].batches) for key in ("peft-lora", "lora2")}
    assert len(shapes["lora2"].batches) == 6 and tokens["lora2"] < 0.9 * tokens["peft-lora"]


# ---- the GPU check, at a small size on the CPU -----------------------------------------------------------------------


def test_skipped_check_is_not_counted_as_passed_and_checks_after_a_failed_one_run(monkeypatch, tmp_path):
    def fine():
        """Fine."""
        return "found"

    def broken():
        """Broken."""
        raise RuntimeError("no kernel")

    checks = {"broken": (broken, 1), "fine": (fine, 1), "skipped": (gpu_check.no_synchronisation, 1)}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_check, "check_apart", lambda name, seconds: gpu_check.check(name))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "gpu_check_cpu.json").read_text())["results"]
    assert [each["status"] for each in results] == ["failed", "passed", "skipped"]
    page = (tmp_path / "gpu_check_cpu.md").read_text()
    for text in ("1 passed, 1 failed, 1 skipped", "needs a CUDA device", "nothing about a GPU", "Error: no kernel"):
        assert text in page
    monkeypatch.setattr(gpu_check, "CHECKS", {name: checks[name] for name in ("fine", "skipped")})
    assert gpu_check.main(["--out", str(tmp_path)]) == 0


@pytest.mark.slow
def test_check_of_the_methods_fails_if_a_distance_exceeds_the_tolerance(monkeypatch):
    monkeypatch.setattr(gpu_check, "FEW", ("lora2",))
    assert gpu_check.check("methods")["status"] == "passed"
    monkeypatch.setattr(gpu_check, "BFLOAT16", 0.0)
    found = gpu_check.check("methods")
    assert found["status"] == "failed" and "lora2 in bfloat16" in found["found"]
