"""The copy of a policy that generates: a plain model with the adapter folded in."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from posttrain.kernels import attention  # noqa: F401  # registers the names with transformers
from posttrain.kernels.liger import use_liger
from posttrain.kernels.nf4 import base_weight, packed_linears


class PolicyCopy:
    """A plain model with the adapter folded in, for generation. The trained weights are never touched.

    Decoding through packed layers with an adapter beside each takes several kernels a layer and unpacks every weight at
    every token. The copy takes the memory of one weight for each adapted layer and shares everything else with the trained
    model. Folding rounds W + sBA to the copy's dtype, so the copy's log-probabilities differ from the trainer's by rounding:
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
        use_liger(self.model, getattr(base, "kernels", "torch"))
        self._adopt()
        if base.config.tie_word_embeddings:
            self.model.tie_weights()  # fold trained token rows into one matrix, not into two
        self.refresh()
        self.model.eval()
        self.model.generation_config = base.generation_config

    def _adopt(self) -> None:
        """Share the tensors that no adapter changes, and give every adapted layer a tensor of its own."""
        own = {name: _base_layer(module) for name, module in self.base.named_modules()}
        self.folded: list[tuple[nn.Module, nn.Module]] = []
        for name, module in self.model.named_modules():
            source = own[name]
            for key, buffer in list(module._buffers.items()):
                module._buffers[key] = source._buffers[key] if buffer is not None else None
            for key, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                adapted = key == "weight" and _is_adapted(self.base.get_submodule(name))
                tensor = torch.empty_like(base_weight(source)) if adapted else _shared_tensor(source, key)
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
                if adapted:
                    self.folded.append((module, self.base.get_submodule(name)))

    @torch.no_grad()
    def refresh(self) -> PreTrainedModel:
        """Fold the present adapter. Returns the model to generate with."""
        for module, source in self.folded:
            module.weight.data.copy_(_folded_weight(source))
        return self.model


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


def _shared_tensor(module: nn.Module, key: str) -> torch.Tensor:
    return base_weight(module) if key == "weight" and isinstance(module, nn.Linear) else module._parameters[key].data


def _folded_weight(module: nn.Module) -> torch.Tensor:
    if hasattr(module, "token_adapter"):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
    weight = base_weight(_base_layer(module))
    if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
        for name in module.active_adapters:
            weight = weight.float() + module.get_delta_weight(name).float()
    return weight
