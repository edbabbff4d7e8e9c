"""A linear layer with its LoRA adapter as one operation, where PEFT composes a dozen.

PEFT's layer (peft/tuners/lora/layer.py, `Linear.forward`) casts its input to the adapter's fp32, and autocast casts it back for
each product. PEFT scales and adds the adapter's output in passes over all activations, and keeps a copy of the input for every
layer that reads it. Here the adapter's products are added into the base's, and layers that read the same input keep it once.
The function is the same. In bf16 it rounds once where PEFT rounds three times.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from posttrain.kernels.nf4 import base_weight


def fuse_adapters(model: PeftModel) -> None:
    """Replace the forward of every LoRA layer whose base is a frozen linear layer without bias, plain or NF4."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_frozen_linear(module.get_base_layer()):
            module.forward = functools.partial(_forward, module, module.forward)


def _is_frozen_linear(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) and base.bias is None and not base.weight.requires_grad


def can_be_fused(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer on a frozen linear layer, plain or NF4, with or without bias."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else None
    return isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters(recurse=False))


def _forward(layer: Any, peft_forward: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = only_adapter(layer)
    if name is None or args or kwargs:
        return peft_forward(x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif not x.dtype == a.dtype == b.dtype:
        return peft_forward(x)  # PEFT computes the adapter in its own precision
    return _LoraLinear.apply(x, layer.get_base_layer(), a, b, layer.scaling[name])


def only_adapter(layer: Any) -> str | None:
    """The one active adapter, if this file computes all it does; None if PEFT has more to do."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    return None if drops else name


class _LoraLinear(torch.autograd.Function):
    """x W' + s (x A') B', with x (..., in), W (out, in) of `base`, A (rank, in) and B (out, rank) in their own precision.

    The backward pass unpacks an NF4 weight once more, as bitsandbytes does: the weight takes no memory in between.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.base, ctx.scaling, ctx.shape, ctx.precisions = base, scaling, x.shape, (a.dtype, b.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        down = flat @ a.T
        y = flat @ base_weight(base).to(x.dtype).T
        y.addmm_(down, b.T, alpha=scaling)
        ctx.save_for_backward(flat, down, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        flat, down, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        up = (grad @ b).mul_(ctx.scaling)
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ base_weight(ctx.base).to(grad.dtype)
            to_x = to_x.addmm_(up, a).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            to_a = (up.T @ flat).to(ctx.precisions[0])
        if ctx.needs_input_grad[3]:
            to_b = (grad.T @ down).to(ctx.precisions[1]).mul_(ctx.scaling)
        return to_x, None, to_a, to_b, None
