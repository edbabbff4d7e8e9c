"""What the engine "transformers" cannot decode, read off a model's config: refused before a run begins, in one line.

It decodes full and sliding attention, attention sinks, capped scores and mixtures of experts (docs/models.md). guard.py
compares what it decodes with the model itself, for what no config says.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.models.chat import config_of
from posttrain.runs.process import num_processes

LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_engine(settings: Model, engine: str, remedy: str) -> None:
    """Raises UserError, with the remedy in it, if `engine` would compute another model than `settings` names, or cannot start."""
    number = num_processes()
    if engine == "vllm" and number > 1:  # each would start it on the first GPU
        raise UserError(f"engine vllm runs in one process, and there are {number}: start the script with python; {remedy}")
    config = config_of(settings)
    if reason := why_not(config, engine):
        raise UserError(f"engine {engine} cannot decode {settings.name_or_path}: {reason}; {remedy}")


def why_not(config: Any, engine: str) -> str | None:
    if engine == "continuous_batching":
        # transformers' paged attention leaves the cap out (integrations/eager_paged.py, 5.23). It keeps windows and sinks.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        return "transformers' continuous batching leaves out attn_logit_softcapping" if capped else None
    return _why_not_ours(config) if engine == "transformers" else None


def _why_not_ours(config: Any) -> str | None:
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder"
    if config.get_text_config() is not config:
        return f"{config.model_type} has parts beside its text model, and the text model alone is supported"
    types = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if others := sorted(types - LAYER_TYPES - {"attention"}):
        return f"it has layers of type {', '.join(others)}, which decoding does not know"
    return next((reason for name, reason in _ASKS.items() if getattr(config, name, None)), None) or _why_not_its_class(config)


_ASKS = {
    "attention_chunk_size": "its attention works in chunks",
    "num_kv_shared_layers": "its layers share keys and values",
    "kv_lora_rank": "it compresses keys and values (latent attention)",
    "alibi": "it has no positions but a bias on the scores (ALiBi)",
}


def _why_not_its_class(config: Any) -> str | None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{config.model_type} is no causal language model"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class._is_stateful or config.model_type in ("bloom", "mpt"):
        return f"{config.model_type} keeps another memory than keys and values, or has no positions"
    return None
