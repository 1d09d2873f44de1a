"""A low-rank layer does what the nn.Linear in whose place it stands does."""

import copy
import io

import pytest
import torch
from torch import nn

import loralib
from tests.loralib.small import randomise, refused


def adapted(model, *modules, kind="lora2"):
    loralib.inject(model, kind, list(modules), r=4)
    return randomise(model, 0.3, seed=2)


def two_layers():
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "0", "1").eval()


X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.mark.parametrize("kind", ["lora", "lora2"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 2, 6)])
def test_the_output_may_be_written_to_in_place(kind, shape):
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(6, 5)), "0", kind=kind)
    expected = nn.functional.relu(model(torch.ones(shape)) + 1)
    out = model(torch.ones(shape))
    out += 1
    nn.functional.relu_(out)
    torch.testing.assert_close(out, expected)
    parameters = model[0].lora_parameters()
    for mine, theirs in zip(
        torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_its_argument_has_the_same_name_and_autocast_the_same_meaning():
    """float64 stays float64, and a merge inside autocast is not rounded to bfloat16."""
    model, plain = two_layers(), nn.Linear(6, 5).double()
    assert torch.equal(model[0](input=X), model[0](X))
    double = copy.deepcopy(model[0]).double()
    expected, delta = double(X.double()), model[0].delta_weight().detach()
    before = model[0].weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(X.double()).dtype == plain(X.double()).dtype == torch.float64
        torch.testing.assert_close(double(X.double()), expected)
        model[0].merge()
    torch.testing.assert_close(model[0].weight - before, delta, rtol=0, atol=1e-6)


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("source_merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_the_base_and_the_factors_merged_or_not(merged, source_merged, assign):
    source, target = two_layers(), two_layers()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.4)
    expected, before = source(X), copy.deepcopy(source.state_dict())
    for model, merge in ((source, source_merged), (target, merged)):
        if merge:
            loralib.merge_adapter(model)
    state = pickled(source.state_dict())
    assert all(torch.equal(state[name], before[name]) for name in before) and set(state) == set(before)
    assert all(torch.equal(t, before[name]) for name, t in loralib.lora_state_dict(source).items())
    target.load_state_dict(state, assign=assign)
    torch.testing.assert_close(target(X), expected)
    loralib.merge_adapter(target)
    torch.testing.assert_close(target(X), expected)
    copies = [copy.deepcopy(target), pickled(target)]
    for model in (*copies, target):  # each unmerges by itself
        torch.testing.assert_close(model(X), expected)
        loralib.unmerge_adapter(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("padded, grad", [(False, False), (True, False), (True, True)])
def test_torchs_encoder_layer_does_not_look_past_the_adapter(padded, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = adapted(nn.TransformerEncoder(layer, 2), "linear1", "linear2")
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    outputs = []
    for mode in (True, False):
        with torch.set_grad_enabled(grad):
            outputs.append(model.train(mode)(x, src_key_padding_mask=mask if padded else None))
    torch.testing.assert_close(outputs[0][~mask], outputs[1][~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["out_proj", "self_attn.out_proj"])
def test_the_projection_that_attention_never_calls_is_refused(projection):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="never calls it"):
        loralib.inject(model, "lora2", [projection])
    assert loralib.match_modules(model, r".*(out_proj|linear1)") == ["layers.0.linear1"]


class Tied(nn.Module):
    """One linear layer under two parents."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Tanh())
        self.second.append(self.first[0])

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_under_two_parents_is_adapted_in_both(tmp_path):
    torch.manual_seed(0)
    base = Tied()
    model = adapted(copy.deepcopy(base), "first.0").eval()
    assert model.first[0] is model.second[1] and isinstance(model.first[0], loralib.LoRA2Linear)
    weight = model.first[0].weight + model.first[0].delta_weight()
    hidden = nn.functional.linear(X, weight, model.first[0].bias)
    expected = nn.functional.linear(hidden.tanh(), weight, model.first[0].bias)
    torch.testing.assert_close(model(X), expected)
    assert len(loralib.lora_layers(model)) == 1
    loralib.load_adapter(base, loralib.save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(base(X), model(X))
    loralib.merge_adapter(model)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    "change, reason",
    [
        (nn.utils.weight_norm, "1 has a hook"),
        (lambda linear: linear.register_forward_hook(lambda module, inputs, output: output + 1), "1 has a hook"),
        (lambda linear: setattr(linear, "forward", lambda x: x), "was replaced"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_that_computes_something_else_is_refused(change, reason):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    change(model[1])
    with refused(reason, model):
        loralib.inject(model, "lora2", ["0", "1"])
