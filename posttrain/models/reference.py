"""A model as transformers alone computes it: the standard that decoding is held to, in the run itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from posttrain.kernels.fp8_linear import Fp8Linear
from posttrain.models.policy_copy import _plain_config


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in layers as transformers wrote them, with its own attention ("eager"). Those in 8 bits are copied."""
    model_class = _class_read_anew(type(model)) if getattr(model, "kernels", "torch") == "liger" else type(model)
    config = AutoConfig.for_model(**_plain_config(model.config))
    with torch.device("meta"):
        plain = model_class._from_config(config, dtype=model.dtype, attn_implementation="eager")
    for name, module in plain.named_modules():
        if not module._parameters and not module._buffers:
            continue  # an activation, say, which Liger's layers do not have
        source = model.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
        if isinstance(source, Fp8Linear):
            module._parameters["weight"] = nn.Parameter(source.held().to(model.dtype), requires_grad=False)
        for key in module._buffers:
            module._buffers[key] = source._buffers[key]
    plain.generation_config = model.generation_config
    return plain.eval()


def _class_read_anew(model_class: type[PreTrainedModel]) -> Any:
    """The class from its source once more: Liger's kernels take the place of names in the module that is in use, for good.

    Not where it is not needed. A second class of the name replaces the first in transformers' table of the outputs that layers
    record (utils/output_capturing.py), which mixtures of experts use; Liger is not used on them.
    """
    spec = importlib.util.find_spec(model_class.__module__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, model_class.__name__)
