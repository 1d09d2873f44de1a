"""The regulariser against a plain loop over explicit products."""

import functools

import pytest
import torch

import loralib
from tests.loralib.small import blocks, matrices_of, trainable


def norm_of_deviation(x, squared):
    """The Frobenius norm of xᵀx − I, or its square."""
    square = (x.T @ x - torch.eye(x.shape[1])).square().sum()
    return square if squared else square.sqrt()


def loop_value(model, terms, squared):
    """Eq. 5 term by term, with P and Q multiplied out; a shared factor counts once."""
    chosen = {"uv", "UV", "PQ"} if terms == "all" else set(terms.split("+"))
    norms = {}
    for name, layer in loralib.lora_layers(model).items():
        one = len(layer.lora_B) == 1
        for term, owners, oriented in (
            ("uv", layer.lora_B, list(layer.lora_B)),
            ("UV", layer.lora_A, [a.T for a in layer.lora_A]),
        ):
            if term in chosen or (one and "PQ" in chosen):
                for owner, factor in zip(owners, oriented, strict=True):
                    tall = factor if factor.shape[0] >= factor.shape[1] else factor.T
                    norms[id(owner)] = norm_of_deviation(tall, squared)
            if "PQ" in chosen and not one:  # PᵀP is r × r for any widths
                norms[name, term] = norm_of_deviation(functools.reduce(torch.matmul, oriented), squared)
    return sum(norms.values()) / len(norms)


SHAPES = [((), False), ((2,), False), ((6,), False), ((20,), False), ((20,), True), ((3, 5), False), ((3,), True)]


@pytest.mark.parametrize("widths, share", SHAPES)
@pytest.mark.parametrize("terms", ["all", "uv", "UV+PQ"])
@pytest.mark.parametrize("squared", [False, True])
def test_value_and_gradient_equal_the_loop(widths, share, terms, squared):
    """The first and the third of the layers have the same rank, the others have other ranks."""
    model = blocks("multiscale", 4, std=1.0, seed=3, r=4, widths=widths, share_outer=share)
    for layer, pruned in zip(loralib.lora_layers(model).values(), (1, 2, 1), strict=False):
        layer.keep_singular_values(range(pruned, 4))
    value = loralib.compute_orth_regu(model, 0.3, terms, squared)
    parameters = trainable(model)
    got = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    expected = 0.3 * loop_value(model, terms, squared)
    want = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("squared", [False, True])
def test_orthonormal_factors_give_zero_and_are_not_moved_by_their_rounding_errors(squared):
    model = blocks("lora2", 1, r=4, k=4)
    for factor in matrices_of(model):
        torch.nn.init.orthogonal_(factor)
    value = loralib.compute_orth_regu(model, 1.0, squared=squared)
    value.backward()
    assert value.item() == 0 and all(torch.equal(f.grad, torch.zeros_like(f)) for f in matrices_of(model))
    matrices_of(model)[0].data *= 1 + 1e-5  # is more than rounding
    assert loralib.compute_orth_regu(model, 1.0, squared=squared) > 0
