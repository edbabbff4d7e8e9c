"""Weights packed as NF4: which layers have them, their values, and how to unpack them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def packed_linears(model: nn.Module) -> dict[str, nn.Module]:
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def base_weight(module: nn.Module) -> torch.Tensor:
    """The weight that a linear layer's forward uses, (out_features, in_features), unpacked if it is NF4."""
    import bitsandbytes

    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        # FSDP2 gathers a plain parameter without its state. The module holds the state, too.
        state = getattr(weight, "quant_state", None) or module.quant_state
        return bitsandbytes.functional.dequantize_4bit(weight.data, state).to(module.compute_dtype or weight.dtype)
    return weight.data


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
