"""The benchmark: every row trains and appears in the records and the table. The GPU check, on the CPU."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import gpu_check, rows, run
from benchmarks.report import Measurement, section
from benchmarks.rows import Limit, Shape, Sizes, build, make_batch, row_named, train_step
from nlu import CONFIGS
from nlu.errors import UsageError

SMALL = Shape("float32", Sizes("deberta", 2, 32, 32, 2, 60), 2, 6)
WHICH_METHOD = rows.experiment_rows(CONFIGS / "experiments/which_method.yaml")


def small_row(row):
    """The row with a size that fits the small encoder."""
    return replace(row, flags=tuple(f.replace("adapter_size=35", "adapter_size=4") for f in row.flags))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft", "lora2_k1", "lora2_plus", "lora2-stock", *WHICH_METHOD])
@pytest.mark.parametrize("precision", run.PRECISIONS)
def test_every_row_lowers_its_loss(name, precision):
    shape = replace(SMALL, precision=precision, sizes=replace(SMALL.sizes, kind="bert"))
    row = small_row(WHICH_METHOD[name] if name in WHICH_METHOD else row_named(name))
    trained, batch, losses = build(row, shape), make_batch(shape), []
    for group in trained.optimizer.param_groups:
        group["lr"] *= 10
    for _ in range(15):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trained.autocast):
            losses.append(trained.model.eval()(**batch).loss.item())
        trained.model.train()
        train_step(trained, batch)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["LoRA² shared", "SoRA", "DoRA", "MiSS", "IA³", "VeRA", "BitFit", "Houlsby adapters"])
def test_row_merges_if_the_merged_model_gives_the_same_logits(name):
    trained, batch = build(small_row(WHICH_METHOD[name]), SMALL), make_batch(SMALL)
    for _ in range(3):
        train_step(trained, batch)
    before = trained.model.eval()(**batch).logits
    assert rows.trained_parameters(trained) > 0 and rows.adapter_bytes(trained) > 4 * rows.trained_parameters(trained)
    assert rows.can_merge(trained) == (name != "Houlsby adapters")
    torch.testing.assert_close(trained.model(**batch).logits, before, rtol=1e-4, atol=1e-4)


def test_bfloat16_casts_frozen_weights_as_run_glue_does():
    shape = replace(SMALL, precision="bfloat16")
    kinds = {name: build(row_named(name), shape) for name in ("lora2", "peft")}
    frozen = {name: {p.dtype for p in t.model.parameters() if not p.requires_grad} for name, t in kinds.items()}
    assert frozen == {"lora2": {torch.bfloat16}, "peft": {torch.float32}}
    assert not kinds["lora2"].autocast and kinds["peft"].autocast


def test_row_without_a_technique_or_with_an_unknown_one():
    assert type(build(row_named("lora-dropout"), SMALL).model.dropout) is torch.nn.Dropout
    for name in ("lora-magic", "magic"):
        with pytest.raises(UsageError, match="magic"):
            row_named(name)


def test_limit_multiplies_every_frozen_weight_twice():
    limit = Limit(replace(SMALL, sizes=replace(SMALL.sizes, layers=3)))
    limit.step()
    assert [tuple(w.shape) for w in limit.weights] == 4 * [(32, 32)] + [(32, 32), (32, 32)] and limit.layers == 3


RECORD = {"name": "x", "machine": {"device": "d", "instructions": "i", "threads": 1, "system": "s", "versions": {}},
          "rounds": 3, "started_at": "now", "reference": "lora", "failure": None}  # fmt: skip


@pytest.mark.slow
def test_run_writes_the_printed_table_and_keeps_the_records_of_other_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "ROUNDS_OF_A_PROCESS", 1)
    monkeypatch.setitem(run.ENCODERS, "minilm", SMALL.sizes)
    (tmp_path / "records.jsonl").write_text('{"name": "a"}\n{"name": "x"}\n')
    (tmp_path / "README.md").write_text("# Measured steps\n\n## a\n\nkept\n\n## x\n\nold\n")
    words = ["--rows", "lora2,lora,limit", "--encoders", "minilm", "--precisions", "float32", "--batch", "2"]
    assert run.main([*words, "--lengths", "6", "--rounds", "2", "--threads", "1", "--name", "x"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out.strip() in page and "## a\n\nkept\n" in page and "old" not in page
    first, record = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert first["name"] == "a" and record["reference"] == "lora"
    assert [(m["row"], len(m["seconds"])) for m in record["measurements"]] == [("lora2", 2), ("lora", 2), ("limit", 2)]


def test_ratios_are_of_medians_and_their_range_is_of_the_rounds():
    def row(name, seconds, memory, left=(None, None, None)):
        return asdict(Measurement("float32, s", name, seconds, 100, memory, *left))

    found = [row("lora", [4.0, 2.0, 9.0], 2**21, (10, 2_000_000, True)), row("lora2", [1.0, 3.0, 1.8], 2**20)]
    text = section(RECORD | {"measurements": found})
    assert "| lora | 4.000 | 1.000 (1.00–1.00) | 2 MiB | 1.00 | 10 | 2.00 | yes |" in text
    assert "| lora2 | 1.800 | 0.450 (0.20–1.50) | 1 MiB | 0.50 |  |  |  |" in text


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


def test_check_of_the_techniques_names_those_that_do_not_pay(monkeypatch):
    def measured(names, settings, title):
        times = {"lora2": 1.0, "lora2-deberta_attention": 2.0, "lora2-first_token": 1.0}
        return [Measurement(setting, name, [times[name]], 1, 1) for setting in settings for name in names], "tables"

    monkeypatch.setattr(gpu_check, "SMALL", False)
    monkeypatch.setattr(gpu_check, "_measured", measured)
    found = gpu_check.check("techniques")
    assert found["status"] == "failed" and "do not pay on this device: first_token\n" in found["found"]


@pytest.mark.slow
def test_check_of_the_methods_fails_if_a_distance_exceeds_the_tolerance(monkeypatch):
    monkeypatch.setattr(gpu_check, "FEW", ("lora2",))
    assert gpu_check.check("methods")["status"] == "passed"
    monkeypatch.setattr(gpu_check, "BFLOAT16", 0.0)
    found = gpu_check.check("methods")
    assert found["status"] == "failed" and "lora2 in bfloat16" in found["found"]
