"""Starts against their formulas on the dense gradient and the whole inputs, in float64."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loralib
from loralib.interop.precision import cast_frozen
from tests.loralib.small import refused

KINDS = [
    ("lora", {"r": 3}),
    ("adalora", {"r": 3}),
    ("lora2", {"r": 3, "k": 4}),
    ("lora2", {"r": 4, "k": 2}),
    ("lora2", {"r": 3, "k": 4, "share_outer": True}),
    ("lora2", {"r": 3, "k": 14, "share_outer": True}),  # wider than the layer's output
    ("multiscale", {"r": 3, "widths": (5, 4)}),
]


class Net(nn.Module):
    """Layers of one shape, each between others, with dropout."""

    def __init__(self, features=(10, 7), count=3):
        super().__init__()
        self.up = nn.Linear(features[1], features[0])
        self.layer = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(*features)}) for _ in range(count))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for block in self.layer:
            x = x + self.up(self.dropout(torch.tanh(block["q"](x))))
        return x


def net(kind=None, features=(10, 7), init="orthogonal", **options):
    torch.manual_seed(0)
    model = Net(features).double()
    if kind is not None:
        init = None if kind == "lora" else init
        loralib.inject(model, kind, ["q"], init=init, lora_dropout=0.3, **options)
        loralib.mark_only_lora_as_trainable(model)
    return model


def batches(features=10, count=3):
    generator = torch.Generator().manual_seed(1)
    scale = 0.7 ** torch.arange(features, dtype=torch.float64)  # a spectrum that decays
    return [torch.randn(4, 5, features, generator=generator, dtype=torch.float64) * scale for _ in range(count)]


def loss_of(model, x):
    return model(x).sin().square().sum()


def dense_gradients(features=(10, 7)):
    """Of each layer's weight over all batches, and the layer's inputs."""
    model = net(features=features).eval()
    inputs = {block["q"]: [] for block in model.layer}
    for layer in inputs:
        layer.register_forward_hook(lambda layer, args, out: inputs[layer].append(args[0].detach().flatten(0, 1)))
    for x in batches(features[0]):
        loss_of(model, x).backward()
    return [block["q"].weight.grad for block in model.layer], [torch.cat(x) for x in inputs.values()]


def projector(columns):
    """On the span of orthonormal columns; zero columns add nothing."""
    return columns @ columns.T


def leading(matrices, width):
    """The leading eigenvectors of Σ M Mᵀ/‖M‖²."""
    total = sum(m @ m.T / m.square().sum() for m in matrices)
    return torch.linalg.eigh(total)[1].flip(1)[:, :width]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind, options", KINDS)
def test_gradient_start(kind, options):
    model = net(kind, **options)
    loralib.initialise(model, "gradient", batches(), loss_of)
    gradients, _ = dense_gradients()
    for i, layer in enumerate(loralib.lora_layers(model).values()):
        assert not layer.delta_weight().any()
        width = layer.widths[0] if layer.widths else layer.r
        sharing = gradients if options.get("share_outer") else [gradients[i]]
        right = leading([g.T for g in sharing], min(width, 7 * len(sharing), 10))
        a = layer.lora_A[0].detach()
        if kind == "lora":
            close(projector(a.T * math.sqrt(3)), projector(right))
            close((a @ a.T), torch.eye(3, dtype=a.dtype) / 3)
            continue
        if width <= 7:
            close(projector(a.T), projector(right))
            close(projector(layer.lora_B[0].detach()), projector(leading(sharing, width)))
        # P and Q: the leading singular vectors of what G is between the outer factors, as many as there are values.
        b = layer.lora_B[0].detach()
        core = b.T @ gradients[i] @ a.T
        p, q = b, a
        for inner_b, inner_a in zip(layer.lora_B[1:], layer.lora_A[1:], strict=True):
            p, q = p @ inner_b.detach(), inner_a.detach() @ q
        caught = (p.T @ gradients[i] @ q.T).diagonal()
        best = torch.linalg.svdvals(core)[: layer.r]
        if width >= layer.r:
            close(caught.abs(), best)
        else:  # the r values share the width directions
            close(caught.sum().abs(), best.sum())
            assert len({round(float(v), 9) for v in caught}) == layer.r
    if kind != "lora":
        assert loralib.update_statistics(model).deviation < 1e-9


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_a_start_is_the_same_bit_for_bit_wherever_its_memory_lies(kind):
    starts, held = set(), []
    for i in range(8):
        held.append(torch.randn(1 + 999 * i))
        model = net("lora2", r=5, k=8)
        loralib.initialise(model, kind, batches(), loss_of)
        factors = [p for layer in loralib.lora_layers(model).values() for p in (*layer.lora_A, *layer.lora_B)]
        starts.add(b"".join(factor.detach().numpy().tobytes() for factor in factors))
    assert len(starts) == 1


@pytest.mark.parametrize("kind, options", [k for k in KINDS if k[1].get("k") != 14])
def test_activation_start(kind, options):
    model = net(kind, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loralib.initialise(model, "activation", batches(), loss_of)
    _, inputs = dense_gradients()
    for i, layer in enumerate(loralib.lora_layers(model).values()):
        sharing = inputs if options.get("share_outer") else [inputs[i]]
        width = layer.widths[0] if layer.widths else layer.r
        a = layer.lora_A[0].detach() * (math.sqrt(3) if kind == "lora" else 1)
        close(projector(a.T), projector(leading([x.T for x in sharing], width)))
        assert not layer.delta_weight().any()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.endswith("lora_A.0") for name in changed)


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_the_sketch_is_close_where_the_matrix_is_larger_than_it(kind):
    """64 × 48 with a decaying spectrum, seen through 16 columns."""
    model = net("adalora", (64, 48), r=4)
    loralib.initialise(model, kind, batches(64), loss_of)
    gradients, inputs = dense_gradients((64, 48))
    for layer, g, x in zip(loralib.lora_layers(model).values(), gradients, inputs, strict=True):
        matrix = g if kind == "gradient" else x
        captured = (matrix @ layer.lora_A[0].detach().T).norm()
        assert captured > 0.98 * torch.linalg.svdvals(matrix)[:4].norm()


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_nothing_else_changes(kind):
    model = net("lora2", r=3, k=4).train()
    model.layer[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    modes = [module.training for module in model.modules()]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    state = torch.get_rng_state()
    loralib.initialise(model, kind, batches(), lambda m, x: loss_of(m, x) + torch.rand(()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.requires_grad)
    assert not any(module._forward_hooks for module in model.modules())
    again = net("lora2", r=3, k=4)
    loralib.initialise(again, kind, batches(), loss_of)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", ["gradient", "activation"])
@pytest.mark.parametrize("way", ["compiled", "another default device"])
def test_a_graph_of_before_and_the_default_device_do_not_change_the_start(kind, way):
    expected, model, given = net("lora2", r=3, k=14), net("lora2", r=3, k=14), batches()
    loralib.initialise(expected, kind, batches(), loss_of)
    if way == "compiled":
        called = torch.compile(model, backend="eager").eval()
        called(given[0])
        loralib.initialise(called, kind, given, loss_of)
    else:
        with torch.device("meta"):
            loralib.initialise(model, kind, given, loss_of)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_neither_changes_in_place_nor_keywords_nor_autocast_change_the_start(kind):
    class InPlace(Net):
        def forward(self, x):
            for block in self.layer:
                (name,) = inspect.signature(block["q"].forward).parameters
                x = x + self.up(self.dropout(block["q"](**{name: x}).tanh_()))
            return x

    plain, other = net("lora2", r=3, k=4).float(), net("lora2", r=3, k=4).float()
    other.__class__ = InPlace
    data = [x.float() for x in batches()]
    loralib.initialise(plain, kind, data, loss_of)
    with torch.autocast("cpu", torch.bfloat16):
        loralib.initialise(other, kind, data, torch.autocast("cpu", enabled=False)(loss_of))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


def test_masked_tokens_and_unused_layers_do_not_count_and_weights_may_be_bfloat16():
    plain, masked = net("lora2", r=3, k=4).float(), net("lora2", r=3, k=4).float()
    masked.unused = nn.ModuleDict({"q": nn.Linear(4, 4)})
    loralib.inject(masked.unused, "lora2", ["q"], r=2)
    before = [p.clone() for p in masked.unused["q"].lora_parameters()]
    mask = torch.tensor([1, 1, 1, 0, 0]).expand(4, 5)
    for model in (plain, masked):
        cast_frozen(model, torch.bfloat16)
    x = batches()[0].bfloat16()
    loralib.initialise(plain, "activation", [x[:, :3]], loss_of)
    loralib.initialise(masked, "activation", [{"x": x, "attention_mask": mask}], lambda m, b: loss_of(m, b["x"]))
    for layer, other in zip(plain.layer, masked.layer, strict=True):
        torch.testing.assert_close(layer["q"].lora_A[0], other["q"].lora_A[0])
    loralib.initialise(masked, "gradient", [x], loss_of)
    assert all(torch.equal(p, b) for p, b in zip(masked.unused["q"].lora_parameters(), before, strict=True))
    statistics = loralib.update_statistics(masked.layer)
    assert statistics.deviation < 1e-5 and not any(statistics.delta_norms.values())


def test_the_mask_holds_for_the_choices_that_a_model_has_flattened():
    mask = torch.arange(30).view(3, 2, 5) % 3 > 0

    def start(scale):
        x = batches(count=6)[0].new_tensor(range(300)).sin().view(3, 2, 5, 10)
        batch = {"x": torch.where(mask[..., None], x, scale * x), "attention_mask": mask.long()}
        model = net("lora2", r=3, k=4)
        loralib.initialise(model, "activation", [batch], lambda m, b: m(b["x"].view(6, 5, 10)).sum())
        return loralib.lora_layers(model)["layer.0.q"].lora_A[0]

    assert torch.equal(start(1.0), start(100.0))


def test_the_mask_of_an_encoder_says_nothing_of_a_decoder():
    plain, masked = net("lora2", r=3, k=4).float(), net("lora2", r=3, k=4).float()
    masked.config = SimpleNamespace(is_encoder_decoder=True)
    x, mask = batches()[0].float(), torch.tensor([1, 1, 1, 0, 0]).expand(4, 5)
    loralib.initialise(plain, "activation", [x], loss_of)
    loralib.initialise(masked, "activation", [{"x": x, "attention_mask": mask}], lambda m, b: loss_of(m, b["x"]))
    for layer, other in zip(plain.layer, masked.layer, strict=True):
        torch.testing.assert_close(layer["q"].lora_A[0], other["q"].lora_A[0])


def test_xlnet_computes_with_the_tokens_first():
    """Also where there are as many rows as tokens, so that the shape does not tell."""
    plain, masked = net("lora2", r=3, k=4).float(), net("lora2", r=3, k=4).float()
    masked.config = SimpleNamespace(model_type="xlnet")
    x = batches()[0].float()[:4, :4]
    mask = torch.tensor([1, 1, 1, 0]).expand(4, 4)
    loralib.initialise(plain, "activation", [x[:, :3]], loss_of)
    batch = {"x": x.transpose(0, 1), "attention_mask": mask}
    loralib.initialise(masked, "activation", [batch], lambda model, batch: loss_of(model, batch["x"]))
    for layer, other in zip(plain.layer, masked.layer, strict=True):
        torch.testing.assert_close(layer["q"].lora_A[0], other["q"].lora_A[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_one_outer_factor_that_layers_share_is_not_enough(side):
    model = net("lora2", r=3, k=4)
    first, second = (layer["q"] for layer in model.layer[:2])
    getattr(second, side)[0] = getattr(first, side)[0]
    with refused("share one of their outer factors", model):
        loralib.initialise(model, "gradient", batches(), loss_of)
    loralib.initialise(model, "activation", batches(), loss_of)  # sets A₀ alone


@pytest.mark.parametrize("kind, change, message", [
    ("svd", None, "kind must be"),
    ("gradient", "trained", "has an update already"),
    ("gradient", "empty", "no batch"),
    *((kind, "uncalled", "show nothing of any") for kind in ("gradient", "activation")),
    ("gradient", "nan", "not finite"),
    ("activation", "nan", "not finite"),
])  # fmt: skip
def test_refusals_change_nothing(kind, change, message):
    model = net("lora2", r=3, k=4)
    data = batches()
    if change == "trained":
        nn.init.ones_(model.layer[0]["q"].lora_E)
    if change == "nan":
        data[0][0, 0, 0] = math.nan
    with refused(message, model):
        loss = (lambda model, x: model.layer[0]["q"].lora_E.sum()) if change == "uncalled" else loss_of
        loralib.initialise(model, kind, [] if change == "empty" else data, loss)


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_no_sign_of_an_outer_factor_is_left_to_rounding(kind):
    model = net("lora2", r=3, k=4)
    loralib.initialise(model, kind, batches(), loss_of)
    for layer in loralib.lora_layers(model).values():
        for columns in [layer.lora_A[0].T, *(layer.lora_B if kind == "gradient" else [])]:
            assert (columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_seed_draws_the_directions_that_the_gradient_leaves_open():
    starts = []
    for seed in (0, 1):
        model = net("lora2", r=3, k=9)  # the gradient has rank 7
        loralib.initialise(model, "gradient", batches(), loss_of, seed=seed)
        starts.append(model.layer[0]["q"].lora_A[0].detach())
    torch.testing.assert_close(starts[0][:7], starts[1][:7], atol=1e-8, rtol=0)
    assert not torch.allclose(starts[0][7:], starts[1][7:], atol=1e-2)
