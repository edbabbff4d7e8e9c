"""Tokenizer and chat format: how a conversation becomes token ids, and on which token an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config import Tokenizer

# Llama-3 ships a token for right padding; padding with the end token would hide it from everything that masks padding.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")


def load_tokenizer(settings: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer with the run's chat template, an end token that the template really emits, and a pad token.

    Raises:
        ValueError: the model cannot be found or reached, has no chat template, or the template ends a turn with a
            token that the tokenizer does not treat as one.
    """
    tokenizer = from_hub(AutoTokenizer, settings)
    if settings.chat_template:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{settings.name_or_path} ships no chat template: set model.chat_template "
            "(configs/templates/llama3.jinja for Llama-3 base models, configs/templates/plain.jinja for k-shot prompts)"
        )
    tokenizer.eos_token = stop_token(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which the chat template ends an assistant turn: the one source of truth for "stop".

    Training on one end token and stopping on another makes every completion run to its limit; TRL reads the
    tokenizer's `eos_token` for generation and for the truncation mask alike (grpo_trainer.py, `eos_token_ids`).
    """
    turn = [{"role": "user", "content": "1+1?"}]
    prompt = chat_ids(tokenizer, turn, add_generation_prompt=True)
    whole = chat_ids(tokenizer, [*turn, {"role": "assistant", "content": "2"}])
    if whole[: len(prompt)] != prompt:
        raise ValueError("the chat template renders a prompt differently once it is answered: pin model.chat_template")
    specials = set(tokenizer.all_special_ids)
    for token in whole[len(prompt) :]:
        if token in specials:
            return tokenizer.convert_ids_to_tokens(token)
    raise ValueError("the chat template never ends an assistant turn with a special token: generation could not stop")


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    """Token ids of a rendered conversation. SFT, GRPO and evaluation all build their prompts with this call."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )["input_ids"]


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    return next((token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token), tokenizer.eos_token)


def template_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens in a rendered two-turn conversation, in order of first use."""
    ids = chat_ids(tokenizer, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in dict.fromkeys(ids) if token in specials]



def from_hub(auto_class: Any, settings: Tokenizer, **kwargs: Any) -> Any:
    """`from_pretrained` with the errors a user can cause turned into one line and a remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = settings.name_or_path
    if looks_local(name) and not Path(name, "config.json").is_file():
        raise ValueError(f"{name} holds no model (no config.json): check model.name_or_path, or run `make model`")
    try:
        return auto_class.from_pretrained(name, revision=settings.revision, **kwargs)
    except OSError as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError) or "gated" in str(error):
            raise ValueError(
                f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
            ) from error
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise ValueError(f"{name} is not on the Hub, or is private: check model.name_or_path and HF_TOKEN") from error
        raise ValueError(
            f"{name} could not be loaded: no copy in the local cache and the Hub did not answer. Connect to the network, "
            f"or set model.name_or_path to a local folder ({str(error).splitlines()[0]})"
        ) from error


def looks_local(name: str) -> bool:
    """A folder on this disk rather than an `owner/name` on the Hub."""
    return Path(name).exists() or name.startswith((".", "/", "~", "models/", "runs/")) or name.count("/") != 1
