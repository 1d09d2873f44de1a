"""Several adapters on one base: each row is computed as with its adapter alone, and the base does not change."""

from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import loralib
from loralib.interop.multi_adapter import MultiAdapter
from tests.loralib.small import INPUTS, Net, adapted, encoder, gpt2, refused


class Pair(NamedTuple):
    first: torch.Tensor
    second: list


IDS = torch.arange(2, 50).view(12, 4)


@pytest.fixture
def three(tmp_path):
    """Name -> (folder, logits with that adapter alone): LoRA², LoRA with a pooler, and AdaLoRA with three labels."""
    wide = encoder()
    wide.classifier = nn.Linear(16, 3)
    wide.config.id2label = {0: "low", 1: "middle", 2: "high"}
    models = {
        "lora2": adapted("lora2", ["query", "key", "layer.output"], 3, encoder(), k=2),
        "lora": adapted("lora", ["query", "value"], 2, encoder(), "bert.pooler"),
        "wide": adapted("adalora", ["key"], 2, wide),
    }
    return {name: (loralib.save_adapter(model, tmp_path / name), model(IDS).logits) for name, model in models.items()}


def test_switching_and_mixing_adapters_do_not_change_the_base(three):
    base = encoder()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    types, bare = [type(m) for m in base.modules()], base(IDS).logits
    adapters = MultiAdapter(base)
    for name, (folder, _) in three.items():
        adapters.load(name, folder)
    assert adapters.names == list(three) and adapters.active is None
    assert torch.equal(base(IDS).logits, bare)
    for name in ("lora", "lora2", "wide", "lora"):
        adapters.activate(name)
        assert adapters.active == name and (base.config.id2label[0] == "low") == (name == "wide")
        classes = torch.ones(len(IDS), dtype=torch.long)
        out, logits = base(IDS, labels=classes), three[name][1]
        torch.testing.assert_close(out.logits, logits, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, classes))
    adapters.activate(None)

    mixed = adapters.run(["wide", "lora2"] * 6, input_ids=IDS).logits
    assert mixed.shape == (12, 3) and torch.isneginf(mixed[1::2, 2:]).all()
    torch.testing.assert_close(mixed[::2], three["wide"][1][::2], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2, :2], three["lora2"][1][1::2], atol=2e-6, rtol=1e-5)

    assert torch.equal(base(IDS).logits, bare)
    adapters.close()
    assert [type(m) for m in base.modules()] == types and all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert torch.equal(base(IDS).logits, bare)


def test_number_of_labels_that_is_not_the_configs_is_kept(three):
    model = encoder()
    model.num_labels = 5  # a class with a head of its own, beside the encoder's config
    loralib.load_adapter(model, three["lora"][0])
    assert model.num_labels == 5 and model.config.num_labels == 2
    del model.num_labels  # a class that reads the config's cannot be given another
    model.__class__ = type("Reader", (type(model),), {"num_labels": property(lambda self: self.config.num_labels)})
    loralib.load_adapter(model, three["lora"][0])
    assert model.num_labels == 2


def test_names_and_the_base_are_checked(three):
    adapters, other = MultiAdapter(encoder()), encoder()
    adapters.load("lora", three["lora"][0])
    with refused("loaded already", adapters.model):
        adapters.load("lora", three["lora2"][0])
    with refused("no input has 3 rows"):
        adapters.run(["lora"] * 3, IDS[:4])
    adapters.activate("lora")
    adapters.remove("lora")
    assert adapters.names == [] and adapters.active is None
    other.bert.embeddings.word_embeddings.weight.data.mul_(1.1)
    with refused("weights are not those", other):
        MultiAdapter(other).load("lora", three["lora"][0])


def test_a_trained_embedding_also_changes_the_output_layer_that_is_tied_to_it(tmp_path):
    model, base = adapted(modules=["c_attn"], model=gpt2(), head="transformer.wte", k=2), gpt2()
    adapters, ids = MultiAdapter(base), IDS[:6]
    adapters.load("a", loralib.save_adapter(model, tmp_path / "a"))
    adapters.activate("a")
    torch.testing.assert_close(base(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def two(tmp_path):
    """Adapters "a" and "b" on a classifier with a cache, in float64, as rounding depends on the number of rows."""

    def base():
        return encoder("llama", pad_token_id=0, attn_implementation="eager").double()

    adapters = MultiAdapter(base())
    for r, name in enumerate("ab", 2):
        model = adapted("lora", ["q_proj", "v_proj"], r, base(), "score")
        adapters.load(name, loralib.save_adapter(model, tmp_path / name))
    return adapters


def test_every_row_of_a_mixed_batch_equals_a_run_of_that_row_alone(two):
    rows, ids = ["a", "b", "a", None, "b", "b"], torch.arange(2, 32).view(6, 5)
    options = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
    mixed = two.run(rows, input_ids=ids, **options)
    for i, name in enumerate(rows):
        alone = two.run([name], input_ids=ids[i : i + 1], **options)
        torch.testing.assert_close(mixed.logits[i], alone.logits[0])
        for kind in ("hidden_states", "attentions"):
            for joined, own in zip(mixed[kind], alone[kind], strict=True):
                assert len(joined) == 6
                torch.testing.assert_close(joined[i], own[0])


def test_a_loss_or_a_cache_needs_one_adapter_for_all_rows(two):
    rows, ids, labels = ["a", "b", "b", None], torch.arange(2, 22).view(4, 5), torch.arange(4) % 2
    cache = two.model(ids).past_key_values
    for option in ({"labels": labels, "use_cache": False}, {}):
        with pytest.raises(ValueError, match="give use_cache=False to a decoder, leave labels out, or use"):
            two.run(rows, input_ids=ids, **option)
    with pytest.raises(ValueError, match="give no past_key_values to run"):
        two.run(rows, input_ids=ids, past_key_values=cache, use_cache=False)
    two.activate("a")
    of_all = two.model(input_ids=ids, labels=labels)
    two.activate(None)
    found = two.run(["a"] * 4, input_ids=ids, labels=labels)
    assert torch.equal(found.loss, of_all.loss) and found.past_key_values.get_seq_length() == 5


@pytest.mark.parametrize(
    "of_rows", [lambda x: {1: x, "extra": [x, x.sum()]}, lambda x: x.mean(0), lambda x: x.T, lambda x: [x] * len(x)]
)
def test_output_that_cannot_be_joined_by_rows_is_refused(two, of_rows):
    two.model.forward = of_rows
    with pytest.raises(ValueError, match=r"can join only tensors|arity mismatch"):
        two.run(["a", "b", "b", "b"], torch.arange(12.0).view(4, 3))


def test_outputs_in_containers_are_joined(two):
    two.model.forward = lambda x: {1: x, "extra": Pair(x[:, 0], [x, None])}
    joined = two.run(["a", "b", "b", "b"], x := torch.arange(12.0).view(4, 3))
    pair = joined["extra"]
    assert torch.equal(joined[1], x) and isinstance(pair, Pair) and torch.equal(pair.first, x[:, 0])
    assert torch.equal(pair.second[0], x) and pair.second[1] is None


@pytest.mark.slow
def test_compiled_model_uses_the_adapter_that_is_active(tmp_path):
    compiled = torch.compile(served := Net(), backend="eager")
    compiled(INPUTS)
    adapters = MultiAdapter(served)
    adapters.load("a", loralib.save_adapter(model := adapted(), tmp_path / "a"))
    for name, expected in (("a", model), (None, Net())):
        adapters.activate(name)
        torch.testing.assert_close(compiled(INPUTS), expected(INPUTS))


def test_layers_of_the_active_adapter_are_no_others(tmp_path):
    """They are refused by another MultiAdapter and by loralib, and a replaced one is noticed."""
    folder, model = loralib.save_adapter(adapted(), tmp_path / "a"), Net()
    first, second = MultiAdapter(model), MultiAdapter(model)
    first.load("a", folder)
    first.activate("a")
    for use in (loralib.load_adapter, loralib.start_from_adapter, loralib.save_adapter):
        with refused("active adapter of a MultiAdapter", model):
            use(model, folder)
    first.activate(None)
    with refused("another MultiAdapter", model):
        second.load("a", folder)
    first.close()
    second.load("a", folder)
    second.activate("a")
    torch.testing.assert_close(model(INPUTS), adapted()(INPUTS))
    next(iter(loralib.lora_layers(model).values())).merge()
    get_peft_model(model, LoraConfig(target_modules=["q"]))
    with pytest.raises(RuntimeError, match="q was replaced while the adapter 'a' was active"):
        second.activate(None)
    assert torch.equal(model(INPUTS), Net()(INPUTS))  # the base is back
