"""A policy as a model folder that transformers and vLLM load: weights in parts, configs, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.models.checkpoint import INDEX, WHOLE
from posttrain.models.folded import FoldedWeights, Tensor
from posttrain.models.special_tokens import generation_config, special_roles

PART_BYTES = 2**29  # of one file. Writing takes twice that of memory, and twice the largest tensor: safetensors copies a part


def write_merged(weights: FoldedWeights, tokenizer: PreTrainedTokenizerBase, folder: Path, part_bytes: int = PART_BYTES) -> None:
    """Write the folder, one part after the other. The generation config stops where the chat template does."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = in_parts(weights.tensors, part_bytes // weights.dtype.itemsize)
    names = [WHOLE] if len(parts) == 1 else [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file({tensor.name: weights.read(tensor) for tensor in part}, folder / name, {"format": "pt"})
    if len(parts) > 1:
        total = sum(tensor.numel for tensor in weights.tensors) * weights.dtype.itemsize
        places = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_configs(weights, tokenizer, folder)
    tokenizer.save_pretrained(folder)


def in_parts(tensors: Iterable[Tensor], most: int) -> list[list[Tensor]]:
    """Tensors in their order, cut so that no part has more than `most` elements, unless one tensor has."""
    parts: list[list[Tensor]] = [[]]
    room = most
    for tensor in tensors:
        if parts[-1] and tensor.numel > room:
            parts.append([])
            room = most
        parts[-1].append(tensor)
        room -= tensor.numel
    return parts


def _write_configs(weights: FoldedWeights, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config = weights.config
    config.architectures, config.dtype = [type(weights.plain).__name__], weights.dtype
    for name, token in special_roles(tokenizer).items():
        setattr(config, name, token)
    config.save_pretrained(folder)
    generation_config(tokenizer).save_pretrained(folder)


def load_merged(folder: Path, device: torch.device) -> PreTrainedModel:
    """The folder as a user loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
    return model.eval()
