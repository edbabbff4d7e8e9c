"""The policy of a run: a base, checked to stop where its template does and known by its fingerprint, and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import Lora, Model
from posttrain.kernels.nf4 import flatten_scales
from posttrain.models.adapters import load_adapter, new_adapter
from posttrain.models.base import load_base, model_identity, train_all_weights
from posttrain.models.checkpoint import chat_hashes
from posttrain.models.special_tokens import check_stop_token

Policy: TypeAlias = PeftModel | PreTrainedModel  # an adapter on its base, or a model that trains or answers as it is


def open_policy(
    settings: Model,
    quantization: str,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | Lora | None,
    *,
    trainable: bool,
    seed: int = 0,
) -> tuple[Policy, dict[str, Any]]:
    """The base alone, with an adapter from a folder, or with a new one; and the manifest's entry of the base.

    A base alone that is `trainable` trains all of its weights. `seed` decides the random half of a new adapter.

    Raises:
        UserError: the base cannot be loaded, its parts disagree on the stop token, or the new adapter fits none of its layers.
    """
    base = load_base(settings, quantization, tokenizer)
    if trainable:
        flatten_scales(base)  # a training step unpacks every layer two or three times
    check_stop_token(base, tokenizer)
    identity = model_identity(settings, quantization, base) | chat_hashes(tokenizer)
    if adapter is None:
        return train_all_weights(base) if trainable else base, identity
    if isinstance(adapter, Lora):
        return new_adapter(base, adapter, tokenizer, seed), identity
    return load_adapter(base, adapter, trainable), identity
