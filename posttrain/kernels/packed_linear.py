"""Linear layers with their weights in oneDNN's own layout, while a model generates on a CPU.

oneDNN converts the weight of a plain linear layer at every call. With packed weights 16 rows take six tenths of the time and 128
rows three quarters (`python bench/cpu_kernels.py`). torch's public way, torch.utils.mkldnn, copies every input and output
and gains nothing. The two operators used here are those that torch's compiler emits for frozen weights
(torch/_inductor/fx_passes/mkldnn_fusion.py). tests/test_packed_linear.py fails when they change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the model's bf16 linear layers run on packed copies of their present weights. On a GPU, nothing changes."""
    layers = [module for module in model.modules() if _can_be_packed(module)]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data)
        layer.forward = functools.partial(_forward, weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_be_packed(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and "forward" not in vars(module)
    return plain and module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16 and _supported()


@functools.cache
def _supported() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
