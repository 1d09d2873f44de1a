"""Layers against their formulas, written out densely; and as replacements of nn.Linear."""

import copy
import io

import pytest
import torch
from torch import nn

import loralib
from tests.loralib.small import randomise, refused

# "lora", or the widths of a multi-scale layer.
SCALES = ["lora", (), (1,), (3,), (4,), (8,), (4, 2), (2, 6), (5, 4, 3), (6, 5, 7), (5, 2, 8)]


def random_layer(scales, **options):
    torch.manual_seed(0)  # with some inputs, sums of large numbers cancel
    if scales == "lora":
        return randomise(loralib.Linear(11, 7, 4, 12.0, **options))
    return randomise(loralib.MultiScaleLinear(11, 7, 4, 12.0, widths=scales, **options))


def dense_delta(layer):
    """s · B₀ … diag(e) … A₀, multiplied out from left to right in float64."""
    product = torch.eye(layer.out_features, dtype=torch.float64)
    for factor in layer.lora_B:
        product = product @ factor.double()
    if layer.lora_E is not None:
        product = product @ torch.diag(layer.lora_E.double())
    for factor in reversed(list(layer.lora_A)):
        product = product @ factor.double()
    return product * layer.lora_alpha / layer.r


@pytest.mark.parametrize("scales", SCALES)
def test_forward_and_gradients_equal_the_dense_formula(scales):
    """test_export.py and test_architectures.py compare with peft's layers with the same factors."""
    layer = random_layer(scales)
    x = torch.randn(2, 5, 11, requires_grad=True)
    weight = torch.randn(2, 5, 7)
    out = layer(x)
    (out * weight).sum().backward()
    got = [p.grad.clone() for p in layer.lora_parameters()] + [x.grad.clone()]

    layer.zero_grad()
    x64 = x.detach().double().requires_grad_()
    expected = x64 @ (layer.weight.double() + dense_delta(layer)).T + layer.bias.double()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    wanted = [p.grad for p in layer.lora_parameters()] + [x64.grad.float()]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.delta_weight().double(), dense_delta(layer), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_update_starts_at_zero_and_factors_are_gaussian_or_orthonormal(init):
    torch.manual_seed(0)
    layer = loralib.LoRA2Linear(500, 400, 8, 16, k=8, init=init)
    assert torch.equal(layer.delta_weight(), torch.zeros(400, 500))
    for factor in [*layer.lora_B, *layer.lora_A]:
        if init == "gaussian":
            if factor.numel() > 1000:
                assert abs(factor.std().item() - 0.02) < 0.001 and abs(factor.mean().item()) < 0.002
        else:
            tall = factor if factor.shape[0] >= factor.shape[1] else factor.T
            torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_explicit_and_undone_exactly(dtype):
    layer = random_layer((3,))
    layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)
    x = torch.randn(3, 11, dtype=dtype)
    before, out = layer.weight.clone(), layer(x)
    for switch in (layer.train, layer.eval):
        assert switch() is layer and not layer.merged and torch.equal(layer.weight, before)
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight, (before.float() + layer.delta_weight()).to(dtype))  # the sum is rounded, not ΔW
    error = (layer(x) - out).float().norm() / out.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.train()(x)
    layer.eval()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before) and torch.equal(layer(x), out)
    layer.merge()
    layer.double().unmerge()  # the weight from before the merge moves with the layer
    assert torch.equal(layer.weight, before.double())


@pytest.mark.parametrize("arguments", [
    {"r": 0}, {"r": 2.5}, {"k": 0}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.0}, {"init": "zeros"},
])  # fmt: skip
def test_values_out_of_range_are_refused(arguments):
    with refused():
        loralib.LoRA2Linear(4, 3, **({"r": 2, "lora_alpha": 4} | arguments))


@pytest.mark.parametrize("run", [lambda m: m, lambda m: torch.func.vmap(m, randomness="different")])
def test_dropout_acts_on_the_update_only(run):
    torch.manual_seed(0)
    layer = random_layer((3,), lora_dropout=0.5)
    x = torch.randn(4000, 11)
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    update = run(layer)(x) - frozen
    kept = nn.functional.linear(x, layer.delta_weight())
    assert not torch.allclose(update, kept, atol=1e-3)
    slope = (update * kept).sum() / (kept * kept).sum()  # dropout rescales, so the update is right on average
    assert abs(slope.item() - 1) < 0.05
    torch.testing.assert_close(layer.eval()(x) - frozen, kept, rtol=1e-4, atol=1e-4)
    nn.init.zeros_(layer.lora_E)
    torch.testing.assert_close(layer.train()(x), frozen)  # no input of the frozen weight is dropped


def test_factors_on_the_meta_device_are_not_multiplied_with_values():
    """torch would read uninitialised memory without a word."""
    with torch.device("meta"):
        layer = loralib.LoRA2Linear(11, 7, 4, 12.0)
    assert layer(torch.ones(2, 11, device="meta")).shape == (2, 7)
    layer.load_state_dict(nn.Linear(11, 7).state_dict(), strict=False, assign=True)
    with pytest.raises(RuntimeError, match="have no values"):
        layer(torch.ones(2, 11))


def test_factors_that_leave_the_meta_device_without_values_are_drawn(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda old, device: torch.full_like(old, torch.nan, device=device))
    with torch.device("meta"):
        model = nn.Sequential(loralib.LoRA2Linear(11, 7, 4, 12.0), loralib.Linear(7, 5, 4, 12.0))
    model.to_empty(device="cpu")
    for layer in model:
        assert layer.weight.isnan().all() and torch.equal(layer.delta_weight(), torch.zeros(layer.weight.shape))
        assert all(factor.std() > 0 for factor in layer.lora_A)


@pytest.mark.parametrize("kind, names", [("lora", ["lora_B", "lora_A"]), ("adalora", ["lora_B", "lora_E", "lora_A"])])
def test_states_of_microsofts_and_adaloras_loralib_load(kind, names):
    model = nn.Sequential(nn.Linear(6, 5))
    loralib.inject(model, kind, "0", r=3, lora_alpha=12)
    factors = [torch.randn(5, 3), *([torch.randn(3, 1)] if kind == "adalora" else []), torch.randn(3, 6)]
    state = {f"0.{name}": factor for name, factor in zip(names, factors, strict=True)}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    b, *e, a = factors
    torch.testing.assert_close(model[0].delta_weight(), 4 * b @ (e[0] * a if e else a))


# ---- in place of an nn.Linear ---------------------------------------------------------------------------------------


def with_factors(model, *modules, kind="lora2"):
    loralib.inject(model, kind, list(modules), r=4)
    return randomise(model, 0.3, seed=2)


def two_layers():
    torch.manual_seed(0)
    return with_factors(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "0", "1").eval()


X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.mark.parametrize("kind", ["lora", "lora2"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 2, 6)])
def test_the_output_may_be_written_to_in_place(kind, shape):
    torch.manual_seed(0)
    model = with_factors(nn.Sequential(nn.Linear(6, 5)), "0", kind=kind)
    expected = nn.functional.relu(model(torch.ones(shape)) + 1)
    out = model(torch.ones(shape))
    assert out.shape == (*shape[:-1], 5)
    out += 1
    nn.functional.relu_(out)
    torch.testing.assert_close(out, expected)
    mine, theirs = (torch.autograd.grad(each.sum(), model[0].lora_parameters()) for each in (out, expected))
    torch.testing.assert_close(mine, theirs)


def test_argument_name_and_autocast_are_those_of_nn_linear():
    """Under autocast float64 stays float64, and a merge is not rounded to bfloat16."""
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
def test_state_dict_of_a_merged_or_unmerged_model_loads_into_either(merged, source_merged, assign):
    source, target = two_layers(), two_layers()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.4)
    expected, before = source(X), copy.deepcopy(source.state_dict())
    for model, merge in ((source, source_merged), (target, merged)):
        if merge:
            loralib.merge_adapter(model)
    state = pickled(source.state_dict())
    assert all(torch.equal(state[name], before[name]) for name in before) and set(state) == set(before)
    target.load_state_dict(state, assign=assign)
    torch.testing.assert_close(target(X), expected)
    loralib.merge_adapter(target)
    torch.testing.assert_close(target(X), expected)
    copies = [copy.deepcopy(target), pickled(target)]
    for model in (*copies, target):  # each can be unmerged alone
        torch.testing.assert_close(model(X), expected)
        loralib.unmerge_adapter(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("padded, grad", [(False, False), (True, False), (True, True)])
def test_fused_path_of_torchs_encoder_layer_does_not_skip_the_update(padded, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = with_factors(nn.TransformerEncoder(layer, 2), "linear1", "linear2")
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    outputs = []
    for mode in (True, False):
        with torch.set_grad_enabled(grad):
            outputs.append(model.train(mode)(x, src_key_padding_mask=mask if padded else None))
    torch.testing.assert_close(outputs[0][~mask], outputs[1][~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["out_proj", "self_attn.out_proj"])
def test_projection_that_attention_never_calls_is_refused(projection):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="never calls it"):
        loralib.inject(model, "lora2", [projection])
    assert loralib.match_modules(model, r".*(out_proj|linear1)") == ["layers.0.linear1"]


def test_a_module_under_two_parents_is_adapted_in_both(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(linear := nn.Linear(6, 6), nn.Sequential(nn.Tanh(), linear))
    model = with_factors(copy.deepcopy(base), "0").eval()
    layer = model[0]
    assert layer is model[1][1] and isinstance(layer, loralib.LoRA2Linear)
    weight = layer.weight + layer.delta_weight()
    hidden = nn.functional.linear(X, weight, layer.bias)
    expected = nn.functional.linear(hidden.tanh(), weight, layer.bias)
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
def test_layer_with_a_hook_or_a_replaced_forward_is_refused(change, reason):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    change(model[1])
    with refused(reason, model):
        loralib.inject(model, "lora2", ["0", "1"])
