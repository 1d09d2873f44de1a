"""Sharded frozen weights in a process group of one; tests/nlu/test_two_processes.py has a group of two."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import loralib
from loralib.interop.precision import cast_frozen
from loralib.interop.sharding import shard_frozen
from loralib.layers import stored_form
from tests.loralib.small import INPUTS, Net, adapted, decoder, randomise, trainable
from tests.nlu.tiny import SIZES


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted_llama(tied, checkpointing):
    model = decoder("llama", SIZES, tie_word_embeddings=tied).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    loralib.inject(model, "lora2", ["q_proj", "v_proj", "down_proj"], r=4, k=4)
    return randomise(model, 0.1)


@pytest.mark.parametrize("tied, checkpointing, dtype", [
    (False, False, torch.float32), (True, True, torch.bfloat16),
])  # fmt: skip
def test_sharded_decoder_trains_as_an_unsharded_one(tied, checkpointing, dtype, group):
    whole, sharded = adapted_llama(tied, checkpointing), adapted_llama(tied, checkpointing)
    if dtype != torch.float32:
        cast_frozen(whole, dtype)
        cast_frozen(sharded, dtype)
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
