"""Split frozen weights in a group of one process; tests/nlu/test_two_processes.py has two."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import loralib
from loralib.interop.precision import cast_frozen
from loralib.interop.sharding import shard_frozen
from loralib.stored_weight import stored_form
from tests.loralib.small import INPUTS, Net, adapted


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def decoder(tied, checkpointing=False):
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
    loralib.inject(model, "lora2", ["q_proj", "v_proj", "down_proj"], r=4, k=4)
    loralib.mark_only_lora_as_trainable(model)
    for layer in loralib.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_E)
    return model


@pytest.mark.parametrize("tied, checkpointing, dtype", [
    (False, False, torch.float32), (True, True, torch.bfloat16),
])  # fmt: skip
def test_a_sharded_decoder_trains_as_a_whole_one(tied, checkpointing, dtype, group):
    whole, sharded = decoder(tied, checkpointing), decoder(tied, checkpointing)
    if dtype != torch.float32:
        cast_frozen(whole, dtype)
        cast_frozen(sharded, dtype)
    fingerprint = loralib.base_fingerprint(sharded)
    shard_frozen(sharded)
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    for model in (whole, DistributedDataParallel(sharded)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, expected), found in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert (stored_form(found) == "sharded") is not expected.requires_grad, name
        if expected.requires_grad:
            torch.testing.assert_close(found, expected)
    assert loralib.base_fingerprint(sharded) == fingerprint


def test_save_works_and_merge_is_refused(group, tmp_path):
    whole, sharded = adapted(), adapted()
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
