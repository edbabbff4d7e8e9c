"""Liger's kernels on a GPU: norm, rotary embedding and gated MLP as one kernel each (github.com/linkedin/Liger-Kernel).

transformers composes a norm of seven operations and a rotary embedding of ten. A decoding step is then mostly small kernels,
training keeps their intermediate results until the backward pass, and launching them takes longer than they run. Liger's
kernels compute the same, in fp32 between input and output. Liger's losses are not used.
"""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from posttrain.config.schema import Kernels
from posttrain.errors import UserError

# Those that tests/test_liger.py compares with transformers' own layers. Liger's MLP for these is SwiGLU only.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def use_liger(model: PreTrainedModel, asked: Kernels) -> None:
    """Give a model the kernels that were asked for, and say in `model.kernels` which it has."""
    model.kernels = "torch"
    reason = why_not_liger(model)
    if asked == "liger" and reason:
        raise UserError(f"model.kernels liger: {reason}; use model.kernels=torch")
    if asked == "auto" and reason and model.device.type == "cuda":
        print(f"norms, rotary embedding and MLP run unfused, which is slower and takes more memory: {reason}")
    if asked == "torch" or reason:
        return
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    model.kernels = "liger"


def why_not_liger(model: PreTrainedModel) -> str | None:
    """What keeps a model from Liger's kernels; None if nothing does."""
    if model.device.type not in ("cuda", "meta"):  # PolicyCopy builds the copy that generates on meta
        return "they need CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "pip install 'posttrain[liger]'"
    if model.config.model_type not in MODEL_TYPES or model.config.hidden_act != "silu":
        return f"not tried on {model.config.model_type} with {getattr(model.config, 'hidden_act', 'its activation')}"
    return None
