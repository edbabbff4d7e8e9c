"""The copy of a policy that generates: a plain model with the adapter folded in."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.kernels import attention  # noqa: F401  # registers the names with transformers
from posttrain.kernels.fp8_linear import FP8, Fp8Linear, use_fp8
from posttrain.kernels.liger import use_liger
from posttrain.kernels.nf4 import base_weight, packed_linears
from posttrain.kernels.sharded import whole
from posttrain.models.base import base_of, compute_dtype


class PolicyCopy:
    """A plain model with the adapter folded in, for generation. The trained weights are never touched.

    Decoding through packed layers with an adapter beside each takes several kernels a layer and unpacks every weight at
    every token. The copy takes the memory of one weight for each adapted layer and shares everything else with the trained
    model. Folding rounds W + sBA to the copy's dtype, so the copy's log-probabilities differ from the trainer's by rounding:
    grpo_train.py logs that difference as `rollout/logp_difference`.

    Plain LoRA is added here. What else PEFT can merge, PEFT merges into a copy of the layer in fp32.
    With `fp8` the decoder's linear layers are rounded once more, to 8 bits, and with `fp8_cache` so are the keys and values that
    it keeps.
    """

    def __init__(self, model: nn.Module, fp8: bool = False, fp8_cache: bool = False) -> None:
        self.source, self.fp8 = model, fp8
        self.base = base = base_of(model)
        config = AutoConfig.for_model(**_plain_config(base.config))
        config._attn_implementation = base.config._attn_implementation
        with torch.device("meta"):
            self.model = type(base)._from_config(config, dtype=compute_dtype(base))
        use_liger(self.model, getattr(base, "kernels", "torch"))
        if fp8:
            assert base.dtype == torch.bfloat16, "the schema lets no other pass"
            use_fp8(self.model)
        self.model.decoding = getattr(base, "decoding", "auto")
        self.model.fp8_cache = fp8_cache
        self.folded: list[tuple[nn.Module, nn.Module]] = []
        self.merged: list[tuple[nn.Module, nn.Module]] = []
        self.rounded: list[tuple[nn.Parameter, nn.Parameter]] = []  # of a base whose weights are fp32 masters
        for name, module in self.model.named_modules():
            self._adopt(module, live_module(base, name))
        self._tie_as_in(base)
        self.refresh()
        self.model.eval()
        self.model.generation_config = base.generation_config

    def _adopt(self, module: nn.Module, source: nn.Module) -> None:
        """Share the tensors that no adapter changes, and give an adapted layer tensors of its own."""
        plain = _base_layer(source)
        if isinstance(module, Fp8Linear):
            self._make_fp8(module, source)
            return
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = plain._buffers[key] if buffer is not None else None
        merged = isinstance(source, BaseTunerLayer) and not is_plain_lora(source)
        if merged:
            self.merged.append((module, source))
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if self.base.dtype != compute_dtype(self.base):
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device=source._parameters[key].device), False)
                self.rounded.append((module._parameters[key], source._parameters[key]))
                continue
            adapted = key == "weight" and _is_adapted(source)
            tensor = torch.empty_like(base_weight(plain)) if adapted else _shared_tensor(plain, key)
            tensor = _turned(module, plain, tensor) if key == "weight" else tensor
            module._parameters[key] = nn.Parameter(tensor.clone() if merged else tensor, requires_grad=False)
            if adapted and not merged:
                self.folded.append((module, source))

    def _make_fp8(self, module: Fp8Linear, source: nn.Module) -> None:
        weight = base_weight(_base_layer(source))
        bias = _base_layer(source).bias
        for key, tensor in (("weight", torch.empty_like(weight, dtype=FP8)), ("scale", weight.new_empty(len(weight), 1).float())):
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        module._parameters["bias"] = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
        merged = isinstance(source, BaseTunerLayer) and not is_plain_lora(source)
        (self.merged if merged else self.folded).append((module, source))

    def _tie_as_in(self, base: PreTrainedModel) -> None:
        """One matrix for both ends where the policy has one. An adapter of one end alone unties them."""
        if not base.config.tie_word_embeddings:
            return
        if unties(base.get_input_embeddings(), base.get_output_embeddings()):
            self.model.config.tie_word_embeddings = False
        else:
            self.model.tie_weights()  # fold trained token rows into one matrix, not into two
            kept = {id(parameter) for parameter in self.model.parameters()}
            self.rounded = [pair for pair in self.rounded if id(pair[0]) in kept]

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """Fold the present adapter. Returns the model to generate with."""
        for module, source in self.folded:
            _set(module, "weight", _turned(module, _base_layer(source), _folded_weight(source)))
        for rounded, master in self.rounded:
            rounded.data.copy_(master)
        for module, source in self.merged:
            for key, tensor in _merged_layer(source)._parameters.items():
                if tensor is not None and module._parameters.get(key) is None:  # a bias that the base has not
                    module.register_parameter(key, nn.Parameter(tensor.to(self.model.dtype), requires_grad=False))
                elif tensor is not None:
                    _set(module, key, _turned(module, _base_layer(source), tensor) if key == "weight" else tensor)
        return self.model


def _turned(module: nn.Module, source: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the copy's layer has it: GPT-2's keep theirs the other way round, and NF4 makes linear layers of them."""
    return weight.T if isinstance(module, Conv1D) and isinstance(source, nn.Linear) else weight


def _set(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    if isinstance(module, Fp8Linear) and key == "weight":
        module.hold(tensor)
    else:
        module._parameters[key].data.copy_(tensor)


class GatheredCopy:
    """`PolicyCopy` of a model that FSDP2 shards: each `refresh` gathers a whole one, which is gone with who uses it."""

    def __init__(self, model: nn.Module) -> None:
        self.source = model

    def refresh(self) -> PreTrainedModel:
        """All processes must call this."""
        return PolicyCopy(self.source).model


Copy: TypeAlias = PolicyCopy | GatheredCopy


def live_module(base: nn.Module, name: str) -> nn.Module:
    """The module that computes in the place of the base's module of this name: a trained copy, an adapted layer, itself."""
    module = base
    for part in name.split(".") if name else ():
        plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        module = getattr(plain, part)
        if isinstance(module, ModulesToSaveWrapper):
            module = _trained_copy(module)
    return module


def _trained_copy(wrapper: Any) -> nn.Module:
    chosen = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[chosen[0]] if chosen and not wrapper.disable_adapters else wrapper.original_module


def is_plain_lora(layer: nn.Module) -> bool:
    """Whether all that the layer adds to its base is scale * B @ A, on one weight."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return False
    return not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in layer.active_adapters)


def _merged_layer(layer: Any) -> nn.Module:
    """The layer's base in fp32 with the adapter in it, by PEFT's own code. The layer stays as it is."""
    if layer.disable_adapters:
        return layer.get_base_layer()
    merged = copy.deepcopy(layer).float()
    for module in merged.modules():
        for key, parameter in module.named_parameters(recurse=False):
            module._parameters[key] = nn.Parameter(whole(parameter.data), parameter.requires_grad)
    plain = merged.get_base_layer()
    adds_bias = any(getattr(layer, "lora_bias", {}).values()) or hasattr(layer, "beft_bias")
    if adds_bias and plain.bias is None:
        plain.bias = nn.Parameter(torch.zeros_like(plain.weight[:, 0]))
    merged.merge()
    return merged.get_base_layer()


def _plain_config(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("quantization_config", "architectures", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    return values


def _base_layer(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) or hasattr(module, "token_adapter") or bool(packed_linears(module))


def unties(first: nn.Module, head: nn.Module) -> bool:
    """Whether an adapter makes two matrices of the one at both ends of a tied model.

    Trained token rows of both ends are one matrix only where PEFT has tied them, which it does if both name the same rows.
    """
    rows: list[Any] = [getattr(end, "token_adapter", None) for end in (first, head)]
    if None not in rows:
        return rows[1].tied_adapter is not rows[0]
    return any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in (first, head))


def _shared_tensor(module: nn.Module, key: str) -> torch.Tensor:
    return base_weight(module) if key == "weight" and isinstance(module, nn.Linear) else whole(module._parameters[key].data)


def _folded_weight(module: nn.Module) -> torch.Tensor:
    if hasattr(module, "token_adapter"):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
    weight = base_weight(_base_layer(module))
    if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
        for name in module.active_adapters:
            weight = weight.float() + whole(module.get_delta_weight(name)).float()
    return weight
