"""Learning rates of parts, and the first Adam step they lead to."""

import math

import pytest
import torch
from torch import nn

import loralib
from loralib.learning_rates import matching_value_ratio


def one_layer(kind, features, init=None, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(*features), "head": nn.Linear(features[1], 2)})
    loralib.inject(model, kind, ["q"], lora_alpha=16, init=init, **options)
    loralib.mark_only_lora_as_trainable(model)
    return model


def first_step(model, groups):
    """‖ΔW‖_F after one Adam step on a loss whose gradient in ΔW has independent normal entries."""
    generator = torch.Generator().manual_seed(1)
    layer = model["q"]
    direction = torch.randn(layer.out_features, layer.in_features, generator=generator)
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    (layer.delta_weight() * direction).sum().backward()
    optimizer.step()
    return float(torch.linalg.matrix_norm(layer.delta_weight().detach()))


@pytest.mark.parametrize("features", [(768, 768), (768, 3072), (3072, 768)])
@pytest.mark.parametrize("kind, options, rank", [
    ("lora2", {"k": 12}, 8), ("adalora", {}, 8), ("lora2", {"k": 1, "r": 1}, 1), ("lora2", {"k": 1}, 1),
])  # fmt: skip
def test_auto_makes_the_first_step_as_long_as_loras(features, kind, options, rank):
    plain = one_layer("lora", features, r=rank)
    model = one_layer(kind, features, "orthogonal", **options)
    layer = model["q"]
    if rank == layer.r:
        assert matching_value_ratio(layer) == pytest.approx(math.sqrt(layer.out_features / 3), rel=1e-4)
    ratio = plain["q"].scaling / layer.scaling  # α is the same, so α/r is not
    theirs = first_step(plain, loralib.parameter_groups(plain, 1e-4))
    ours = first_step(model, loralib.parameter_groups(model, 1e-4, value_lr_ratio="auto"))
    assert ours * ratio == pytest.approx(theirs, rel=0.05)


def test_auto_between_1_and_r_is_right_on_average():
    """k = 3 < r = 8: over random gradients, the mean square of the norm is LoRA's of rank 3."""
    model = one_layer("lora2", (24, 40), "orthogonal", k=3, r=8)
    layer = model["q"]
    p, q = (layer.lora_B[0] @ layer.lora_B[1]).detach(), (layer.lora_A[1] @ layer.lora_A[0]).detach()
    directions = torch.randn(4000, 40, 24, generator=torch.Generator().manual_seed(2))
    signs = torch.einsum("or,noi,ri->nr", p, directions, q).sign()
    squares = torch.einsum("or,nr,ri->noi", p, signs, q).square().sum((1, 2))
    expected = math.sqrt(40 * 3 / 3) / float(squares.mean().sqrt())
    assert matching_value_ratio(layer) == pytest.approx(expected, rel=0.02)


def test_auto_where_some_singular_values_move_nothing():
    """As after a gradient start with r beyond the layer's side: by hand, five of eight orthonormal pairs are left."""
    layer = one_layer("lora2", (24, 40), "orthogonal", k=8, r=8)["q"]
    with torch.no_grad():
        layer.lora_B[1][:, 5:] = 0
    assert matching_value_ratio(layer) == pytest.approx(math.sqrt(40 * 8 / 3 / 5), rel=1e-4)


def rates(groups):
    return {id(p): group["lr"] for group in groups for p in group["params"]}


def test_every_trainable_parameter_once_with_its_rate():
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.ModuleDict({"q": nn.Linear(6, 6)}) for i in range(3)} | {"head": nn.Linear(6, 2)})
    loralib.inject(model, "lora2", ["q"], r=2, k=3, share_outer=True)
    loralib.mark_only_lora_as_trainable(model)
    model["head"].requires_grad_(True)
    groups = loralib.parameter_groups(model, 1e-3, value_lr_ratio=4, head_lr=5e-4)
    listed = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    found = rates(groups)
    layer = model["0"]["q"]
    assert found[id(layer.lora_E)] == pytest.approx(4e-3)
    assert found[id(layer.lora_B[0])] == found[id(layer.lora_A[1])] == pytest.approx(1e-3)
    assert found[id(model["head"].weight)] == pytest.approx(5e-4)


def test_lora_plus():
    model = one_layer("lora", (6, 6))
    found = rates(loralib.parameter_groups(model, 1e-3, b_lr_ratio=16))
    assert found == {id(model["q"].lora_B[0]): pytest.approx(1.6e-2), id(model["q"].lora_A[0]): pytest.approx(1e-3)}


@pytest.mark.parametrize(
    "kind, init, options, message",
    [
        ("lora2", None, {"value_lr_ratio": "auto"}, "orthonormal"),
        ("lora2", "orthogonal", {"value_lr_ratio": "Auto"}, "positive number"),
        ("lora2", "orthogonal", {"value_lr_ratio": 0}, "positive number"),
        ("lora2", "orthogonal", {"b_lr_ratio": 2}, "b_lr_ratio is for LoRA"),
        ("lora", None, {"value_lr_ratio": 4}, "singular values"),
        ("lora", None, {"head_lr": -1}, "head_lr must be a positive number"),
        ("lora", None, {"b_lr_ratio": 0}, "b_lr_ratio must be a positive number"),
        ("lora", None, {"head_lr": 1e-3}, "unfreeze the head"),
    ],
)
def test_what_means_nothing_is_refused(kind, init, options, message):
    with pytest.raises(ValueError, match=message):
        loralib.parameter_groups(one_layer(kind, (6, 6), init), 1e-3, **options)


def test_a_rate_of_nothing_is_refused():
    model = one_layer("lora", (6, 6))
    with pytest.raises(ValueError, match="lr must be a positive number"):
        loralib.parameter_groups(model, 0)
    with pytest.raises(ValueError, match="nothing trains"):
        loralib.parameter_groups(model.requires_grad_(False), 1e-3)
