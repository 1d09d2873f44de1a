"""Sharded frozen weights, in process groups of two and of one, against whole ones in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import loralib
from loralib.interop.precision import cast_frozen
from loralib.interop.sharding import shard_frozen
from loralib.layers import stored_form
from loralib.model import trained_tensors
from loralib.recipes.checkpoint import load_model, load_training, save_checkpoint
from loralib.recipes.exact_factors import ExactFactors
from tests.loralib.small import INPUTS, Net, adapted, decoder, encoder, randomise, trainable
from tests.nlu.tiny import SIZES

IDS = torch.arange(8 * 6).view(8, 6) * 7 % SIZES["vocab_size"]
LABELS = IDS.sum(1) % 2
HALF, STEPS = 3, 6
PRUNING = {"target_rank": 2, "init_warmup": 1, "final_warmup": 2, "mask_interval": 1, "total_steps": STEPS}


def started(case):
    """A classifier and its training: with the regulariser and pruning, or with exact factors. Nothing is random."""
    model = encoder()
    loralib.inject(model, "lora2", ["query", "value", "output.dense"], r=4, k=4, init="orthogonal")
    model.classifier.requires_grad_(True)
    for layer in loralib.lora_layers(model).values():
        torch.nn.init.uniform_(layer.lora_E, 0.1, 1, generator=torch.Generator().manual_seed(layer.in_features))
    options = PRUNING if case == "pruned" else {"constraint": ExactFactors}
    low_rank = loralib.LowRankTraining(model, **options)
    return model, low_rank, torch.optim.AdamW(trainable(model), lr=1e-2, eps=1e-3)


def train(model, low_rank, optimizer, steps, rows=slice(None), wrapped=None):
    for _ in range(steps):
        loss = (wrapped or model)(input_ids=IDS[rows], labels=LABELS[rows]).loss
        (loss + low_rank.penalty()).backward()
        low_rank.step(optimizer)


def _train_sharded(rank, folder):
    """Run by two processes, which take every other row."""
    torch.set_num_threads(1)  # renews the thread pool that a fork breaks
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in ("pruned", "exact"):
        model, low_rank, optimizer = training = started(case)
        shard_frozen(model)
        options = {"rows": slice(rank, None, 2), "wrapped": DistributedDataParallel(model)}
        train(*training, HALF, **options)
        save_checkpoint(model, low_rank, half := folder / f"{case}-half-{rank}")
        torch.save(optimizer.state_dict(), half / "optimizer.pt")
        train(*training, STEPS - HALF, **options)
        loralib.save_adapter(model, folder / case)
        held = sum(p.to_local().nbytes for p in model.parameters() if stored_form(p) == "sharded")
        end = {"trained": trained_tensors(model), "pattern": low_rank.ranks and low_rank.ranks.pattern, "bytes": held}
        torch.save(end, folder / f"{case}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_sharded_weights_train_save_and_resume_as_one(tmp_path):
    """Before the tests of a group of one: a fork inherits its group."""
    torch.multiprocessing.start_processes(_train_sharded, (tmp_path,), nprocs=2, start_method="fork")
    for case in ("pruned", "exact"):
        model, low_rank, _ = training = started(case)
        before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        train(*training, STEPS)
        trained, ranks = trained_tensors(model), low_rank.ranks
        assert all((tensor - before[name]).abs().max() > 1e-4 for name, tensor in trained.items())
        pattern = ranks and ranks.pattern
        assert pattern is None or 0 < sum(map(sum, pattern.values())) < sum(map(len, pattern.values()))
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        ends = [torch.load(tmp_path / f"{case}-{rank}.pt") for rank in (0, 1)]
        assert sum(end["bytes"] for end in ends) == frozen and max(end["bytes"] for end in ends) < 0.52 * frozen
        resumed, low_rank, optimizer = training = started(case)  # by one process
        load_model(resumed, half := tmp_path / f"{case}-half-1")
        load_training(low_rank, half)
        optimizer.load_state_dict(torch.load(half / "optimizer.pt"))
        train(*training, STEPS - HALF)
        ends.append({"trained": trained_tensors(resumed), "pattern": low_rank.ranks and low_rank.ranks.pattern})
        for end in ends:
            assert end["pattern"] == pattern
            for name, expected in trained.items():
                torch.testing.assert_close(end["trained"][name], expected, rtol=1e-5, atol=1e-6)
        loralib.load_adapter(loaded := encoder(), tmp_path / case)  # onto the same base: the fingerprint is that
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted_llama():
    model = decoder("llama", SIZES).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    loralib.inject(model, "lora2", ["q_proj", "v_proj", "down_proj"], r=4, k=4)
    return randomise(model, 0.1)


def test_sharded_decoder_trains_as_an_unsharded_one(group):
    """With tied embeddings, gradient checkpointing and bfloat16."""
    whole, sharded = adapted_llama(), adapted_llama()
    for model in (whole, sharded):
        cast_frozen(model, torch.bfloat16)
    fingerprint = loralib.base_fingerprint(sharded)
    shard_frozen(sharded)
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    for model in (whole, DistributedDataParallel(sharded)):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, expected), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert (stored_form(found) == "sharded") is not expected.requires_grad, name
        if expected.requires_grad:
            torch.testing.assert_close(found, expected)
    assert loralib.base_fingerprint(sharded) == fingerprint


def test_sharded_model_saves_its_adapter_and_refuses_to_merge(group, tmp_path):
    whole, sharded = adapted(), adapted()
    sharded.layers[0]["q"].lora_A.requires_grad_(False)  # no factor is split
    shard_frozen(sharded)
    loralib.save_adapter(sharded, tmp_path / "a")
    assert type(sharded).__name__ == "FSDPNet" and loralib.read_adapter_config(tmp_path / "a").architecture == "Net"
    model = Net()
    loralib.load_adapter(model, tmp_path / "a")
    assert torch.equal(model(INPUTS), whole(INPUTS)) and torch.equal(sharded(INPUTS), whole(INPUTS))
    with pytest.raises(ValueError, match="the weight is sharded"):
        loralib.merge_adapter(sharded)
    with pytest.raises(ValueError, match="sharded already"):
        shard_frozen(sharded)
