"""Packed linear layers against plain ones: the same outputs, from the present weights, and plain layers afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.kernels import packed_linear
from posttrain.kernels.packed_linear import packed_weights

pytestmark = pytest.mark.skipif(not packed_linear._supported(), reason="oneDNN has no bf16 products on this processor")


def make(bias=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.SiLU(), nn.Linear(96, 40, bias=bias)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (3, 7, 64), (200, 1, 64)])
def test_outputs_are_those_of_the_plain_layers(bias, shape):
    model, x = make(bias), torch.randn(shape).bfloat16()
    plain = model(x)
    with packed_weights(model):
        assert "forward" in vars(model[0]) and "forward" not in vars(model[1])
        assert torch.allclose(model(x), plain, rtol=2e-2, atol=2e-3)
    assert "forward" not in vars(model[0]) and torch.equal(model(x), plain)


def test_the_weights_are_those_of_now():
    model, x = make(), torch.randn(4, 64).bfloat16()
    with packed_weights(model):
        before = model(x)
    model[0].weight.mul_(2)
    with packed_weights(model):
        assert not torch.allclose(model(x), before, rtol=0.1)
        after = model(x)
    assert torch.allclose(after, model(x), rtol=2e-2, atol=2e-3)


def test_an_error_inside_leaves_plain_layers():
    model = make()
    with pytest.raises(ZeroDivisionError), packed_weights(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model[0])


def test_what_is_not_a_plain_bf16_layer_is_left_alone():
    class Other(nn.Linear):
        pass

    other = Other(8, 8).bfloat16()
    wrapped = nn.Linear(8, 8).bfloat16()
    wrapped.forward = lambda x: x
    for model in (make(dtype=torch.float32), other, wrapped):
        before = [module.forward for module in model.modules()]
        with packed_weights(model):
            assert [module.forward for module in model.modules()] == before
