"""Base models and their precision, and the copy of a policy that generates. The only file that knows bitsandbytes.

Weights live in three forms:
    nf4           packed, 0.56 bytes a weight, unpacked on every use: bitsandbytes' Linear4bit
    nf4_unpacked  the same values held as bf16: 2 bytes a weight and no unpacking, so faster and larger
    none          the checkpoint as it is
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.chat import from_hub, stop_token
from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.kernels import attention  # noqa: F401  # transformers knows it by name from here on
from posttrain.kernels.liger import fuse
from posttrain.kernels.nf4 import base_weight, packed_linears, unpack
from posttrain.runs.process import is_sharded

# --- loading ----------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """The device of this process: one GPU each under `accelerate launch`, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(
    settings: Model, quantization: str, tokenizer: PreTrainedTokenizerBase, to: torch.device | None = None
) -> PreTrainedModel:
    """The base model, frozen, its stop and pad token equal to the tokenizer's."""
    to, auto = to or device(), settings.attn_implementation == "auto"
    # cuDNN, which torch prefers on Hopper, plans its attention anew for every shape of a batch: a second each, where a step is
    # half of one (https://github.com/modelscope/FunASR/issues/3704; EXPERIMENTS.md, 2026-11-26).
    torch.backends.cuda.enable_cudnn_sdp(False)
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        # Of integers FSDP2 shards nothing; the same bytes are sharded as what they are not.
        bnb_4bit_quant_storage=getattr(torch, settings.dtype) if is_sharded() else torch.uint8,
    )
    model = from_hub(
        AutoModelForCausalLM,
        settings,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=None if auto else settings.attn_implementation,
        device_map={"": to},
        quantization_config=packed if quantization != "none" else None,
        use_safetensors=True,
    )
    if auto and model.config._attn_implementation == "sdpa":  # not eager, for want of it
        model.set_attn_implementation(fastest_attention(to))
    for module in packed_linears(model).values():
        # On AVX512 hosts an eval forward would repack the weight for a kernel without gradients, and training after it
        # would silently get none. https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804
        module.support_avx512bf16_for_cpu = False
    if quantization == "nf4_unpacked":
        unpack(model)
    model.requires_grad_(False)
    align_special_tokens(model, tokenizer)
    fuse(model, settings.kernels)
    return model


def fastest_attention(to: torch.device) -> str:
    if to.type != "cuda":
        return "matmul"
    return "varlen" if torch.cuda.get_device_capability(to) >= (8, 0) else "sdpa"  # flash attention begins with Ampere


def identity(settings: Model, quantization: str, base: PreTrainedModel) -> dict[str, Any]:
    """What a manifest says of a loaded base, with what `auto` turned out to be."""
    chosen = {"attn_implementation": base.config._attn_implementation, "kernels": base.kernels}
    return settings.model_dump() | chosen | {"quantization": quantization, "fingerprint": fingerprint(base)}


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make model config and generation config stop and pad exactly as the tokenizer does."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def check_stop_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a run in which template, tokenizer, model and generation config do not stop on one and the same token."""
    stops = {
        "chat template": tokenizer.convert_tokens_to_ids(stop_token(tokenizer)),
        "tokenizer.eos_token_id": tokenizer.eos_token_id,
        "model.config.eos_token_id": model.config.eos_token_id,
        "generation_config.eos_token_id": model.generation_config.eos_token_id,
    }
    if len({str(stop) for stop in stops.values()}) > 1:
        raise UserError(f"the parts disagree on the stop token: {stops}; align them with align_special_tokens")


def compile_layers(model: PeftModel) -> None:
    """Compile each decoder layer where it is, for any batch shape: one compilation, and every parameter keeps its name."""
    for layer in model.get_base_model().base_model.layers:
        layer.compile(dynamic=True)


def fingerprint(model: nn.Module) -> str:
    """A short identity of the base: hash of its norm weights, which no quantization or adapter touches."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "norm" in name and "lora" not in name:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- the copy that generates ------------------------------------------------------------------------------------------


class PolicyCopy:
    """A plain model with the adapter folded in, for generation; the trained weights are never touched.

    Decoding through packed layers with an adapter beside each costs several kernels a layer and unpacks every weight at
    every token. The copy costs one weight's bytes for each adapted layer and shares everything else with the trained
    model. Folding rounds W + sBA to the copy's dtype, so its log-probabilities differ from the trainer's by rounding:
    grpo_train.py logs that difference as `rollout/logp_difference`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.source = model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.base = base
        config = AutoConfig.for_model(**_plain_config(base.config))
        config._attn_implementation = base.config._attn_implementation
        with torch.device("meta"):
            self.model = type(base)._from_config(config, dtype=base.dtype)
        fuse(self.model, getattr(base, "kernels", "torch"))
        self._adopt()
        if base.config.tie_word_embeddings:
            self.model.tie_weights()  # trained token rows are folded into one matrix, not into two
        self.refresh()
        self.model.eval()
        self.model.generation_config = base.generation_config

    def _adopt(self) -> None:
        """Share the tensors that no adapter changes; give every adapted layer its own."""
        own = {name: _inner(module) for name, module in self.base.named_modules()}
        self.folded: list[tuple[nn.Module, nn.Module]] = []
        for name, module in self.model.named_modules():
            source = own[name]
            for key, buffer in list(module._buffers.items()):
                module._buffers[key] = source._buffers[key] if buffer is not None else None
            for key, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                adapted = key == "weight" and _is_adapted(self.base.get_submodule(name))
                tensor = torch.empty_like(base_weight(source)) if adapted else _raw(source, key)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
                if adapted:
                    self.folded.append((module, self.base.get_submodule(name)))

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """Fold the adapter as it is now; returns the model to generate with."""
        for module, source in self.folded:
            module.weight.data.copy_(_folded_weight(source))
        return self.model


def _plain_config(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("quantization_config", "architectures", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    return values


def _inner(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) or hasattr(module, "token_adapter") or bool(packed_linears(module))


def _raw(module: nn.Module, key: str) -> torch.Tensor:
    return base_weight(module) if key == "weight" and isinstance(module, nn.Linear) else module._parameters[key].data


def _folded_weight(module: nn.Module) -> torch.Tensor:
    if hasattr(module, "token_adapter"):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
    weight = base_weight(_inner(module))
    if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
        for name in module.active_adapters:
            weight = weight.float() + module.get_delta_weight(name).float()
    return weight
