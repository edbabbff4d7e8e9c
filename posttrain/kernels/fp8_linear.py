"""Linear layers with weights in 8-bit floating point (e4m3), for rollouts: half of the bytes that a decoding step reads.

A weight has a scale for each output, and an input one for each row, found as the row comes: the largest entry of either becomes
the largest number of the format. The product is torch's own, on tensor cores that have known it since Hopper. Each product is off
by 4 % (the format has 3 bits of mantissa), where bf16 is off by 0.3 %.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from posttrain.errors import UserError
from posttrain.kernels import decoding
from posttrain.kernels.decoding import Fp8Rows
from posttrain.kernels.nf4 import layers_to_pack

FP8 = decoding.FP8


class Weight(NamedTuple):
    """What a product reads of one layer, or of several whose weights lie one after the other."""

    values: torch.Tensor  # (out, in), FP8
    scale: torch.Tensor  # (out, 1), fp32
    bias: torch.Tensor | None  # (out,)


class Fp8Linear(nn.Module):
    """Stands in for nn.Linear. It has no weight until it is told one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FP8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty_like(linear.weight[:, :1], dtype=torch.float32), requires_grad=False)
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    def hold(self, weight: torch.Tensor) -> None:
        """Round a weight, (out, in), to what this layer computes with."""
        values, scale = decoding.plain_fp8_rows(weight)
        self.weight.data.copy_(values)
        self.scale.data.copy_(scale)

    def held(self) -> torch.Tensor:
        """The weight that it computes with, in fp32."""
        return self.weight.float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = product(x.reshape(-1, x.shape[-1]), Weight(self.weight, self.scale, self.bias), self.dtype)
        return flat.view(*x.shape[:-1], -1)


def product(x: torch.Tensor | Fp8Rows, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """x W' + bias, (rows, out), in `dtype`: bf16 or fp32 on a CPU, bf16 on a GPU."""
    out = decoding.whole(product_to_scale(x, weight, dtype))
    return out if weight.bias is None else out + weight.bias


def product_to_scale(x: torch.Tensor | Fp8Rows, weight: Weight, dtype: torch.dtype) -> decoding.Product:
    """The same without the bias, and where the product does not scale rows and columns itself, with that left to the reader."""
    values, scale = x if isinstance(x, Fp8Rows) else decoding.fp8_rows(x)
    if has_few_tiles(len(values), len(weight.values)):
        one, whole = _one(values.device), ScalingType.TensorWise
        out = scaled_mm(values, weight.values.T, one, whole, one, whole, output_dtype=dtype, use_fast_accum=True)
        return decoding.Scaled(out, scale, weight.scale)
    of_rows = ScalingType.RowWise
    return scaled_mm(values, weight.values.T, scale, of_rows, weight.scale.T, of_rows, output_dtype=dtype)


# On an H100 the kernel that scales rows and columns itself took 22 us for 128 rows of 8,192 by 3,072 outputs: as long as bf16.
# With one scale for all cuBLAS shares out the sum as well, and took 12.5; that is scaled afterwards. With 128 tiles, which are
# 16,384 outputs, the first took 23.4 us and the second 23.2.
TILE, FEW = 128, 64


def has_few_tiles(rows: int, outputs: int) -> bool:
    """Whether a product has too few tiles for all multiprocessors of a card, and has to be shared out otherwise."""
    return -(-rows // TILE) * -(-outputs // TILE) < FEW


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def use_fp8(model: nn.Module) -> None:
    """Put layers without a weight in the place of all linear layers of a model on "meta" but its output head.

    Raises:
        UserError: layers whose weights lie the other way round.
    """
    for name in layers_to_pack(model):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"rollouts.weights fp8: not tried on layers as {name}, {type(layer).__name__}: set it to null")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Fp8Linear(layer))
