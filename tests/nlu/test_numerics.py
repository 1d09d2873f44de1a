"""What must not change a number: running again, threads, checkpointed activations; and the precision of importance.

Two processes and accumulation against one batch: test_two_processes.py and test_run_glue.py. The order of modules:
tests/loralib/test_allocator.py.
"""

import pytest
import torch
from safetensors.torch import load_file

from nlu import fine_tuning
from nlu.run_glue import main
from tests.nlu.tiny import changed, read, tiny_run


def outcome(flags, folder):
    """(trained weights, masks, losses, scores) of one run in ``folder``, with dropout and pruning in it."""
    flags = changed(flags, root_output_dir=folder)
    assert main([*flags, "--mask_interval", "1", "--lora_dropout", "0.1"]) == 0
    record, masks = read(flags), read(flags, "rank_pattern.json")
    weights = load_file(folder / "model" / "checkpoint-6" / "trained.safetensors")
    assert record["live_budget"] < record["initial_budget"]
    return weights, masks, [row["loss"] for row in record["history"]], [e["loss"] for e in record["evaluations"]]


@pytest.fixture(scope="module")
def plain(encoder, tiny_glue, tmp_path_factory):
    """The outcome of the run that the others vary."""
    torch.manual_seed(111)
    folder = tmp_path_factory.mktemp("plain") / "run"
    return outcome(tiny_run(encoder, tiny_glue, folder), folder)


def assert_same_bits(first, second):
    assert first[1:] == second[1:]
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


def test_the_seed_alone_fixes_a_run(base_flags, tmp_path, plain):
    torch.manual_seed(222)
    torch.rand(5)
    assert_same_bits(plain, outcome(base_flags, tmp_path / "again"))
    other = outcome(changed(base_flags, seed=4), tmp_path / "other")
    assert other[2] != plain[2] and not all(torch.equal(other[0][n], w) for n, w in plain[0].items())


@pytest.mark.slow
def test_the_seed_fixes_a_run_in_bfloat16_whose_importance_stays_float32(base_flags, tmp_path, monkeypatch):
    trainers, build = [], fine_tuning.build_trainer
    monkeypatch.setattr(fine_tuning, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[-1])
    found = []
    for seed in (111, 222):
        torch.manual_seed(seed)
        found.append(outcome([*base_flags, "--bf16", "--length_bucketing"], tmp_path / str(seed)))
    assert_same_bits(*found)
    dtypes = {(p.requires_grad, p.dtype) for p in trainers[0].model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    allocator = trainers[0].applied.allocator
    state = allocator.state_dict()
    assert {t.dtype for t in [*state["sensitivity"], *state["uncertainty"]]} == {torch.float32}
    assert allocator.importance_scores().dtype == torch.float32
    averages = torch.cat([t.flatten() for t in state["sensitivity"]])
    assert (averages != averages.bfloat16().float()).any()  # held in float32, not merely of that type


@pytest.mark.parametrize(
    "changes, rtol", [pytest.param("the threads", 1e-3, marks=pytest.mark.slow), ("what is computed again", 1e-4)]
)
def test_another_order_of_sums_chooses_the_same_masks(base_flags, tmp_path, plain, changes, rtol):
    """Activations may be computed again: their dropout is drawn as it was."""
    before, extra = torch.get_num_threads(), ["--gradient_checkpointing"]
    try:
        if changes == "the threads":
            torch.set_num_threads(2 if before == 1 else 1)
            extra = []
        found = outcome([*base_flags, *extra], tmp_path / "other")
    finally:
        torch.set_num_threads(before)
    assert found[1] == plain[1]
    torch.testing.assert_close(found[2], plain[2], rtol=rtol / 10, atol=1e-6)
    for name, weight in plain[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=rtol, atol=rtol / 100)
