"""Weights packed as NF4: which layers have them, their values, and how to unpack them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.kernels.sharded import whole


def packed_linears(model: nn.Module) -> dict[str, nn.Module]:
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def base_weight(module: nn.Module) -> torch.Tensor:
    """The weight that a linear layer's forward uses, (out_features, in_features), unpacked if it is NF4."""
    import bitsandbytes

    weight = whole(module.weight.data)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight, _state(module)).to(module.compute_dtype or weight.dtype)
    return weight


def layers_to_pack(model: PreTrainedModel) -> list[str]:
    """Names of the layers that a load as NF4 packs: all linear ones but the output head (transformers' own choice).

    GPT-2's Conv1D is a linear layer whose weight is (in, out). It is turned round before it is packed.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    linear = (name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D))
    return [name for name in linear if should_convert_module(name, kept)]


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 with double quantization keeps of a weight, in its dtype: the values of a layer that `load_base` packs."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)


def flatten_scales(model: nn.Module) -> None:
    """Hold the scale of every block of 64 weights in fp32, where double quantization packs the scales, too.

    The weights' values are the same to the bit. A weight takes 0.5625 bytes instead of 0.516, and to unpack a layer is one kernel
    where it was three. A step that waits for Python waits for their launch: EXPERIMENTS.md, 2026-11-27.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    for module in packed_linears(model).values():
        packed = _state(module)
        if packed.nested:
            scales = dequantize_blockwise(packed.absmax, packed.state2) + packed.offset
            flat = QuantState(scales, packed.shape, packed.code, packed.blocksize, packed.quant_type, packed.dtype)
            module.quant_state = module.weight.quant_state = flat


def _state(module: Any) -> Any:
    """bitsandbytes' QuantState of a packed layer. FSDP2 gathers a plain parameter without it. The module holds it, too."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def unpack_nf4(model: PreTrainedModel) -> None:
    """Replace every packed NF4 layer by a plain one with the same values: faster, at 2 bytes a weight."""
    for name, module in packed_linears(model).items():
        weight = base_weight(module)
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    forget_quantization(model)


def forget_quantization(model: PreTrainedModel) -> None:
    """Make transformers, PEFT and TRL take a model without packed layers for an ordinary one."""
    for flag in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(flag, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def pass_through_nf4(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and input gradients of a packed layer of 128 x 256, (8, 128) and (8, 256), and the same by its unpacked weight."""
    import bitsandbytes

    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=draw).bfloat16() for shape in ((128, 256), (8, 256)))
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # as in models/base.py
    packed, plain = (inputs.to(device).requires_grad_() for _ in range(2))
    outputs = layer(packed), nn.functional.linear(plain, base_weight(layer))
    for output in outputs:
        output.sum().backward()
    assert packed.grad is not None and plain.grad is not None
    made = {"outputs": outputs, "gradients": (packed.grad, plain.grad)}
    return {name: (one.detach().float().cpu(), other.detach().float().cpu()) for name, (one, other) in made.items()}
