import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nlu.fast.dropout import FastDropout, drop_mask, enable_fast_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 3 / 2**16])
def test_share_of_dropped_is_p(p):
    count = 2_000_000
    share = drop_mask(torch.empty(count), p).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count) + 2**-17


def test_neighbours_and_draws_are_independent():
    first, second = (drop_mask(torch.empty(1_000_000), 0.3).double() for _ in range(2))
    limit = 5 / math.sqrt(first.numel())
    for other in (second, *(first.roll(shift) for shift in (1, 2, 3, 4, 7, 64))):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0, 4), (64, 33)])
def test_output_and_gradient(dtype, shape):
    x = torch.rand(shape, dtype=dtype).add_(1).requires_grad_()
    y = FastDropout(0.25)(x)
    y.sum().backward()
    kept = y != 0
    scale = torch.tensor(1 / 0.75, dtype=dtype)
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0))
    torch.testing.assert_close(x.grad, kept * scale)


def test_seed_and_checkpoint_reproduce_the_mask():
    layer, x = FastDropout(0.5), torch.rand(1000, requires_grad=True)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(y, first)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (first != 0) * 2.0)


def test_eval_extremes_and_compile_are_stock():
    x = torch.rand(100)
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)
    assert torch.equal(FastDropout(1.0)(x), torch.zeros(100))
    compiled = torch.compile(FastDropout(0.5), backend="aot_eager", fullgraph=True)
    assert 20 < (compiled(x) == 0).sum() < 80


def test_enabling_leaves_subclasses_and_names_alone():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2), Own(0.3)))
    keys = list(model.state_dict())
    assert enable_fast_dropout(model) == 2 and enable_fast_dropout(model) == 0
    assert [m.p for m in model.modules() if type(m) is FastDropout] == [0.1, 0.2]
    assert list(model.state_dict()) == keys
    assert type(model[2][1]) is Own
