"""Special tokens that a chat template emits: which of their embedding rows are untrained, and which of them to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import Lora
from posttrain.errors import UserError
from posttrain.models.chat import chat_ids, special_ids, stop_token

SAME_ROW_COSINE = 0.999  # SmolLM2-Instruct tells <|im_start|> and <|im_end|> apart, and their cosine is 0.99


def special_token_report(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """For every special token that the template emits: how the norm of its embedding row compares with those of ordinary rows.

    Llama-3 *base* models never saw `<|eot_id|>` or the header tokens, LoRA leaves their rows frozen, and a model that
    cannot tell them apart cannot learn to stop (unsloth#873). `z` is the distance of the row's norm from the mean norm of
    ordinary rows, in standard deviations. `twin` is the largest cosine with another special row. A row counts as untrained
    if its norm is far below the others', or if it cannot be told from another special row.
    """
    weight = base_embedding(model).detach().float().cpu()
    specials = [token for token in template_specials(tokenizer) if token < weight.shape[0]]
    ordinary = torch.arange(0, min(weight.shape[0], 100_000), max(1, weight.shape[0] // 4000))
    norms = weight[ordinary].norm(dim=1)
    mean, spread = norms.mean().item(), max(norms.std().item(), 1e-9)
    rows = torch.nn.functional.normalize(weight[specials], dim=1)
    cosines = rows @ rows.T - 2 * torch.eye(len(specials))
    report = []
    for index, token in enumerate(specials):
        norm = weight[token].norm().item()
        twin = cosines[index].max().item() if len(specials) > 1 else 0.0
        report.append(
            {
                "token": tokenizer.convert_ids_to_tokens(token),
                "id": token,
                "norm": round(norm, 4),
                "z": round((norm - mean) / spread, 2),
                "twin": round(twin, 3),
                "untrained": norm < mean - 4 * spread or norm < 0.1 * mean or twin > SAME_ROW_COSINE,
            }
        )
    return report


def special_tokens_to_train(model: nn.Module, lora: Lora, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if lora.train_special_tokens == "never":
        return []
    report = special_token_report(model, tokenizer)
    return [row["id"] for row in report if row["untrained"] or lora.train_special_tokens == "always"]


def base_embedding(model: nn.Module) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    return getattr(embedding, "original_module", embedding).weight


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's config and its generation config the tokenizer's stop, pad and begin token."""
    model.generation_config = generation_config(tokenizer)
    for name, token in special_roles(tokenizer).items():
        setattr(model.config, name, token)


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The three tokens, and nothing of the base's own: a run says itself how it samples, a penalty of the base's is in no
    measurement, and transformers refuses to save settings that contradict each other (a temperature without do_sample).
    """
    return GenerationConfig(**special_roles(tokenizer))


def special_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}


def check_stop_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a run unless template, tokenizer, model and generation config stop on one and the same token."""
    stops = {
        "chat template": tokenizer.convert_tokens_to_ids(stop_token(tokenizer)),
        "tokenizer.eos_token_id": tokenizer.eos_token_id,
        "model.config.eos_token_id": model.config.eos_token_id,
        "generation_config.eos_token_id": model.generation_config.eos_token_id,
    }
    if len({str(stop) for stop in stops.values()}) > 1:
        raise UserError(f"the parts disagree on the stop token: {stops}; align them with align_special_tokens")


def template_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens in a rendered two-turn conversation, in order of first use."""
    ids = chat_ids(tokenizer, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    specials = special_ids(tokenizer)
    return [token for token in dict.fromkeys(ids) if token in specials]
