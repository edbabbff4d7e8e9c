"""Base models, with their weights in one of three forms:

nf4           packed by bitsandbytes' Linear4bit: 0.52 bytes a weight, 0.56 in training, unpacked on every use
nf4_unpacked  the same values held as bf16: 2 bytes a weight and no unpacking, so faster and larger
none          the checkpoint as it is
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import Model
from posttrain.kernels import attention  # noqa: F401  # registers the names with transformers
from posttrain.kernels.liger import use_liger
from posttrain.kernels.nf4 import packed_linears, unpack_nf4
from posttrain.models.base_tensors import check_loaded
from posttrain.models.chat import from_hub
from posttrain.models.checkpoint import weights_hash
from posttrain.models.special_tokens import align_special_tokens
from posttrain.runs.process import is_sharded


def device() -> torch.device:
    """The device of this process: one GPU each under `accelerate launch`, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(
    settings: Model, quantization: str, tokenizer: PreTrainedTokenizerBase, to: torch.device | None = None
) -> PreTrainedModel:
    """The base model, frozen, with the tokenizer's stop and pad token."""
    to, auto = to or device(), settings.attn_implementation == "auto"
    # torch prefers cuDNN on Hopper, and cuDNN plans its attention anew for every shape of a batch. That takes a second, a step
    # half of one (https://github.com/modelscope/FunASR/issues/3704; EXPERIMENTS.md, 2026-11-26).
    torch.backends.cuda.enable_cudnn_sdp(False)
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        # FSDP2 shards only floating-point tensors, so the packed bytes are stored under a float dtype.
        bnb_4bit_quant_storage=getattr(torch, settings.dtype) if is_sharded() else torch.uint8,
    )
    model, loading = from_hub(
        AutoModelForCausalLM,
        settings,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=None if auto else settings.attn_implementation,
        device_map={"": to},
        quantization_config=packed if quantization != "none" else None,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, in one line
    )
    check_loaded(settings, model, *(loading[f"{what}_keys"] for what in ("missing", "mismatched", "unexpected")))
    if auto and model.config._attn_implementation == "sdpa":  # a model without SDPA loads as eager: leave it so
        model.set_attn_implementation(fastest_attention(to))
    for module in packed_linears(model).values():
        # On AVX512 hosts bitsandbytes repacks the weight in an eval forward, for a kernel without gradients. Training after it
        # would silently get none. https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804
        module.support_avx512bf16_for_cpu = False
    if quantization == "nf4_unpacked":
        unpack_nf4(model)
    model.requires_grad_(False)
    align_special_tokens(model, tokenizer)
    use_liger(model, settings.kernels)
    model.decoding = settings.decoding
    return model


def base_of(model: nn.Module) -> PreTrainedModel:
    """The plain model: what an adapter lies on, or the model itself where all of its weights train."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def train_all_weights(base: PreTrainedModel) -> PreTrainedModel:
    """Make every weight trainable, as an fp32 master. Autocast rounds it to `compute_dtype` for the matrix products."""
    base.compute_dtype = base.dtype
    for parameter in base.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return base


def compute_dtype(base: PreTrainedModel) -> torch.dtype:
    """What a base computes in. Its weights may be fp32 masters of that."""
    return getattr(base, "compute_dtype", base.dtype)


def fastest_attention(to: torch.device) -> str:
    if to.type != "cuda":
        return "matmul"
    return "varlen" if torch.cuda.get_device_capability(to) >= (8, 0) else "sdpa"  # flash attention begins with Ampere


def model_identity(settings: Model, quantization: str, base: PreTrainedModel) -> dict[str, Any]:
    """What a manifest says of a loaded base. `auto` is replaced by what it chose."""
    chosen = {"attn_implementation": base.config._attn_implementation, "kernels": base.kernels}
    said = {"quantization": quantization, "fingerprint": fingerprint(base), "weights": weights_hash(settings)}
    same = {"same_base": True} if settings.same_base else {}
    return settings.model_dump(exclude={"same_base"}) | chosen | said | same


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer in place, for any batch shape: torch compiles once, and every parameter keeps its name."""
    for layer in base_of(model).base_model.layers:
        layer.compile(dynamic=True)


def fingerprint(model: nn.Module) -> str:
    """A short hash that identifies the base: over its norm weights, which no quantization and no adapter touches."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "norm" in name and "lora" not in name:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
