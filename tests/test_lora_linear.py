"""The fused LoRA layer against PEFT's: the same outputs and gradients, and PEFT's own wherever PEFT does more."""

from __future__ import annotations

import functools

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain.kernels import lora_linear


class Block(nn.Module):
    def __init__(self, packed: bool, bias: bool, storage: torch.dtype) -> None:
        super().__init__()
        nf4 = functools.partial(Linear4bit, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage)
        kind = nf4 if packed else nn.Linear
        self.up, self.gate, self.down = kind(64, 128, bias=bias), kind(64, 128, bias=bias), kind(128, 64, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def make(dtype: torch.dtype, packed: bool = False, bias: bool = False, storage=torch.uint8, **lora) -> nn.Module:
    torch.manual_seed(0)
    base = Block(packed, bias, storage).to(dtype).to("cpu").requires_grad_(False)
    assert not packed or base.up.weight.quant_state is not None
    settings = {"r": 8, "lora_alpha": 24, "target_modules": ["up", "gate", "down"], "init_lora_weights": False} | lora
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def run(model: nn.Module, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the adapter."""
    torch.manual_seed(1)
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, 64)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 for g in gradients)
    return [y, x.grad, *gradients]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize(
    "dtype, packed, autocast, rtol",
    [
        (torch.float32, False, False, 1e-6),
        (torch.float32, False, True, 2e-2),  # three roundings to 8 bits against one
        (torch.bfloat16, False, True, 2e-2),
        (torch.bfloat16, True, True, 2e-2),
    ],
)
def test_outputs_and_gradients_are_pefts(dtype, packed, autocast, rtol):
    theirs, ours = make(dtype, packed), make(dtype, packed)
    lora_linear.fuse_adapters(ours)
    for got, expected in zip(run(ours, dtype, autocast), run(theirs, dtype, autocast), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert distance(got, expected) < rtol


def test_it_rounds_less_than_peft_does():
    theirs, ours, reference = make(torch.bfloat16), make(torch.bfloat16), make(torch.bfloat16).float()
    lora_linear.fuse_adapters(ours)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = ours.base_model.model.up(x), theirs.base_model.model.up(x)
    with torch.no_grad():
        exact = reference.base_model.model.up(x.float())
    assert distance(one, exact) < distance(other, exact)


def note(called: list[str], name: str, forward, *args, **kwargs):
    called.append(name)
    return forward(*args, **kwargs)


def peft_ran(model: nn.Module, monkeypatch) -> list[str]:
    """Names of the layers whose own forward was called."""
    called: list[str] = []
    for name in ("up", "gate", "down"):
        layer = model.base_model.model.get_submodule(name)
        monkeypatch.setattr(layer, "forward", functools.partial(note, called, name, layer.forward))
    lora_linear.fuse_adapters(model)
    return called


def test_dropout_another_variant_and_a_disabled_adapter_are_left_to_peft(monkeypatch):
    x = torch.randn(2, 64)
    for settings in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}):
        model = make(torch.float32, **settings)
        called = peft_ran(model, monkeypatch)
        model(x)
        assert sorted(called) == ["down", "gate", "up"], settings
    model = make(torch.float32)
    called = peft_ran(model, monkeypatch)
    model(x)
    assert called == []
    with model.disable_adapter():
        model(x)
    assert sorted(called) == ["down", "gate", "up"]


def test_dropout_is_no_reason_once_it_is_off(monkeypatch):
    model = make(torch.float32, lora_dropout=0.5).eval()
    called = peft_ran(model, monkeypatch)
    model(torch.randn(2, 64))
    assert called == []


def test_a_bias_keeps_pefts_layer():
    model = make(torch.float32, bias=True)
    before = {name: module.forward for name, module in model.named_modules() if hasattr(module, "lora_A")}
    lora_linear.fuse_adapters(model)
    assert all(model.get_submodule(name).forward == forward for name, forward in before.items())


def test_the_adapter_that_is_active_is_the_one_that_runs():
    model = make(torch.float32)
    model.add_adapter("ref", LoraConfig(r=4, lora_alpha=4, target_modules=["up", "gate", "down"], init_lora_weights=False))
    x = torch.randn(2, 64)
    expected = {}
    for name in ("default", "ref"):
        model.set_adapter(name)
        expected[name] = model(x)
    lora_linear.fuse_adapters(model)
    for name in ("ref", "default"):
        model.set_adapter(name)
        assert torch.allclose(model(x), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected["ref"], expected["default"])
