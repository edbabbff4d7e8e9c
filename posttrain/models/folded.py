"""A policy's weights, one tensor at a time, from the files of its base: a merged model of any size in the memory of one tensor.

The values are those of `PolicyCopy`, which answers in evaluations and in rollouts: W + scale * B @ A in fp32 by PEFT's own code,
rounded once to the run's dtype. Of a base that was packed as NF4, W is what NF4 keeps of it; `original` takes W as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.kernels.nf4 import layers_to_pack, through_nf4
from posttrain.models.adapter_kinds import ADAPTER_FILE, NEED_WEIGHTS, check_tensors, read_adapter_config
from posttrain.models.base import device
from posttrain.models.checkpoint import checkpoint_files, skeleton
from posttrain.models.policy_copy import _merged_layer, is_plain_lora, live_module, unties

# How a LoRA may begin that leaves the base's weights alone. PiSSA and its like take from the base what they begin with.
INITS = (True, False, "gaussian", "eva", "orthogonal")

BY_PEFT = "fold it with PEFT's merge_and_unload, and save that model"
DRAWN = NEED_WEIGHTS | {"OSF", "PSOFT"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the folded model before it is computed. `source` is its name in the base's files, `file` where it lies."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class FoldedWeights:
    """The tensors of a base with an adapter folded in. Nothing but the adapter is in memory until a tensor is asked for.

    `quantization` is what the base goes through before the adapter is added: "none" takes the file's own values.

    Raises:
        UserError: an adapter that cannot be folded tensor by tensor, or files that do not hold the model's tensors by name.
    """

    def __init__(self, settings: Model, quantization: str, adapter: Path | None) -> None:
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.plain = skeleton(settings)
        packed = layers_to_pack(self.plain) if quantization != "none" else []
        # By the name of its weight, whether a layer's weight is turned round before it is packed.
        self.packed = {f"{name}.weight": isinstance(self.plain.get_submodule(name), Conv1D) for name in packed}
        self.policy = _on_placeholders(skeleton(settings), adapter) if adapter else self.plain
        self.config = self.plain.config
        self.tensors = self._tensors()

    def _tensors(self) -> list[Tensor]:
        """Every tensor of the folded model, in the model's order, a tied one once."""
        there = _tensors_in_files(self.settings)
        wanted = {name: name for name, _ in self.plain.named_parameters()}
        modules = dict(self.plain.named_modules(remove_duplicate=False))
        ends = (self.plain.get_input_embeddings(), self.plain.get_output_embeddings())
        first, head = (next(f"{name}.weight" for name, module in modules.items() if module is end) for end in ends)
        if self.config.tie_word_embeddings and self._unties():
            self.config.tie_word_embeddings = False
            wanted |= {head: first}
        found = {name: there.get(source) for name, source in wanted.items()}
        if lacking := [name for name, entry in found.items() if entry is None]:
            raise UserError(
                f"{self.settings.name_or_path} has no tensor {lacking[0]} in its files ({len(lacking)} are not there by the "
                "model's names): load it with transformers, save it with save_pretrained, and train on that folder"
            )
        return [Tensor(name, wanted[name], *entry) for name, entry in found.items() if entry]

    def _unties(self) -> bool:
        """Whether the adapter gives one end of the model a matrix of its own."""
        base = self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy
        return unties(base.get_input_embeddings(), base.get_output_embeddings())

    @torch.no_grad()
    def read(self, tensor: Tensor) -> torch.Tensor:
        """The folded tensor, in the run's dtype."""
        weight = self._base(tensor)
        if not isinstance(self.policy, PeftModel):
            return weight
        owner, _, key = tensor.name.rpartition(".")
        module = live_module(self.policy.get_base_model(), owner)
        return self._folded(module, owner, key, weight).to(self.dtype).contiguous()

    def _base(self, tensor: Tensor) -> torch.Tensor:
        # Opened anew for each tensor: what is mapped of a file that stays open counts as memory of this process.
        with safe_open(tensor.file, framework="pt") as file:
            weight = file.get_tensor(tensor.source).to(self.dtype)
        if (is_turned := self.packed.get(tensor.source)) is None:
            return weight
        weight = weight.to(device())
        return (through_nf4(weight.T).T if is_turned else through_nf4(weight)).cpu()

    def _folded(self, module: nn.Module, owner: str, key: str, weight: torch.Tensor) -> torch.Tensor:
        if hasattr(module, "token_adapter"):
            adapter = module.token_adapter
            with _holding(adapter.get_base_layer(), {"weight": weight}):
                merged: torch.Tensor = adapter.get_merged_weights(adapter.active_adapters)
            return merged
        if not isinstance(module, BaseTunerLayer):
            return _trained_or(module, key, weight)
        if is_plain_lora(module):
            if key != "weight":
                return _trained_or(module.get_base_layer(), key, weight)
            for name in module.active_adapters:
                weight = weight.float() + module.get_delta_weight(name).float()
            return weight
        return self._merged(module, owner, key)

    def _merged(self, module: Any, owner: str, key: str) -> torch.Tensor:
        """What PEFT makes of a layer's tensor that is more than W + scale * B @ A."""
        layer = module.get_base_layer()
        own = {name: tensor for tensor in self.tensors for prefix, _, name in [tensor.name.rpartition(".")] if prefix == owner}
        with _holding(layer, {name: _trained_or(layer, name, self._base(tensor)) for name, tensor in own.items()}):
            merged = _merged_layer(module)._parameters[key]
        assert merged is not None
        return merged


def check_foldable(folder: Path) -> PeftConfig:
    """Refuse an adapter that needs the base's weights in memory to be read.

    Raises:
        UserError: the text names its kind, and what folds it.
    """
    config = read_adapter_config(folder)
    kind, init = str(getattr(config.peft_type, "value", config.peft_type)), getattr(config, "init_lora_weights", True)
    adds_bias = getattr(config, "lora_bias", False) or kind == "BEFT"
    parameters = getattr(config, "target_parameters", None)
    why = (
        f"peft_type {kind}, which is drawn from the base's weights" if kind in DRAWN
        else f"init_lora_weights {init}, which changes the base's weights" if init not in INITS
        else "biases, which a model folder has no place for" if adds_bias
        else "target_parameters, which are not the weights of layers" if parameters
        else None
    )  # fmt: skip
    if why:
        raise UserError(f"adapter {folder} has {why}: {BY_PEFT}")
    return config


def _on_placeholders(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter's own tensors on a base whose weights have shapes and take no memory."""
    config = check_foldable(folder)
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # fp32: PEFT casts an adapter to the dtype of its base
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
    base.tie_weights()
    model = PeftModel(base, config)
    if any(isinstance(end, LoraLayer) for end in (base.get_input_embeddings(), base.get_output_embeddings())):
        raise UserError(f"adapter {folder} adapts the model's first or last matrix: {BY_PEFT}")
    check_tensors(folder, model)
    peft.set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE), low_cpu_mem_usage=True)
    return model.eval()


def _trained_or(module: nn.Module, key: str, weight: torch.Tensor) -> torch.Tensor:
    """What the adapter's file holds of the base's own tensor, as a bias or a whole copied module, or `weight`."""
    own = module._parameters[key]
    assert own is not None
    return weight if _is_placeholder(own) else own


def _is_placeholder(parameter: torch.Tensor) -> bool:
    return parameter.numel() > 1 and not any(parameter.stride())


@contextmanager
def _holding(layer: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give a layer its weights for the time of a computation."""
    before = {name: layer._parameters[name] for name in weights}
    layer._parameters.update({name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()})
    try:
        yield
    finally:
        layer._parameters.update(before)


def _tensors_in_files(settings: Model) -> dict[str, tuple[Path, tuple[int, ...]]]:
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in checkpoint_files(settings):
        with safe_open(path, framework="pt") as file:
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    if packed := next((name for name in found if name.endswith(".absmax")), None):
        raise UserError(
            f"{settings.name_or_path} holds packed weights ({packed}): train on the unquantized original, or fold the adapter "
            "into that with model.name_or_path"
        )
    return found
